//! The plan of taking a patch out.

use super::{Plan, from_reads, guard, known};
use crate::addr::Gva;
use crate::change::Change;
use crate::kernel::guard::Armed;
use crate::kernel::livepatch::{self, Held};
use crate::kernel::{KernelError, Live, ftrace, sites, tracers};
use crate::paging::PAGE_SIZE;
use crate::place::{Entry, FILLER, Record, Redirect, Registry, State};
use crate::reads::Preconditions;
use crate::unwind::OldFunction;

/// Why a patch can't be taken out. Nothing was changed.
#[derive(Debug, thiserror::Error)]
pub enum RevertError {
    /// No such patch.
    #[error("no patch {id} in this guest; it has: {}", if known.is_empty() { "none".to_owned() } else { known.join(", ") })]
    Unknown {
        /// The name asked for.
        id: String,
        /// The names that are there.
        known: Vec<String>,
    },
    /// The guest began to trace it when ftrace had been told to leave it alone.
    #[error(
        "{function} is wanted by a tracer that the guest started after it was patched: taking the patch out now would make the guest turn its tracing off for good; end that tracer first"
    )]
    Traced {
        /// The function.
        function: String,
    },
    /// The guest loaded a livepatch for it when ftrace had been told to leave it alone.
    #[error(
        "{function} is wanted by {livepatch}, a livepatch that the guest loaded after it was patched: taking the patch out now would make the guest turn its tracing off for good; disable that livepatch in the guest first, and load it again afterwards"
    )]
    OwnLivepatch {
        /// The function.
        function: String,
        /// The livepatch's module.
        livepatch: String,
    },
    /// The guest traces or probes the new function: its site holds a call.
    #[error("{function}, which the patch brought along, is traced or probed by the guest; end what traces it first")]
    NewTraced {
        /// The new function.
        function: String,
    },
    /// Somebody in the guest uses the patch's module.
    #[error(
        "{id} is in use: the guest holds {references} references to its module; end what traces or probes it first"
    )]
    InUse {
        /// The patch.
        id: String,
        /// How many.
        references: u32,
    },
    /// A later patch, or a module that the guest loaded since, hangs on a static key, and on what the patch has added to it.
    #[error(
        "branches of {id} hang on the static key {key}, and so do those of a later patch or module; take that one out first"
    )]
    KeyInUse {
        /// The patch.
        id: String,
        /// The key.
        key: String,
    },
    /// The guest has set a kprobe in the new code, and would change that code when it takes it back.
    #[error("{id} is in use: the guest has set a kprobe in its code, at {at}; end what probes it first")]
    Probed {
        /// The patch.
        id: String,
        /// Where.
        at: Gva,
    },
    /// The guest's integrity guard would stop the guest, or may.
    #[error(transparent)]
    Guard(#[from] Armed),
    /// The guest could not be read.
    #[error("reading the guest's kernel")]
    Kernel(#[from] KernelError),
}

/// Plans to take out the patch `id`: sites get their old bytes, and its text becomes filler, in one pause.
///
/// The text is wiped within the pause because only there code that was already run may be written.
pub fn revert(live: &Live<'_>, registry: &Registry, id: &str) -> Result<Plan, RevertError> {
    from_reads::plan(live, |live| plan(live, registry, id))
}

fn plan(live: &Live<'_>, registry: &Registry, id: &str) -> Result<Plan, RevertError> {
    let with_record = |entry| Option::zip(Some(entry), Entry::record(entry));
    let mut patches = registry.entries.iter().filter_map(with_record);
    let Some((entry, record)) = patches.find(|(_, record)| record.id == id) else {
        let known = registry.records().map(|record| record.id.clone()).collect();
        return Err(RevertError::Unknown {
            id: id.to_owned(),
            known,
        });
    };
    let text = Gva(record.text.start)..Gva(record.text.start.saturating_add(record.text.len));
    if let Some(at) = sites::probe_in(live, &text)? {
        return Err(RevertError::Probed { id: id.to_owned(), at });
    }
    guard::require_survival::<RevertError>(live)?;
    require_untraced(live, record)?;
    let mut paused = Vec::new();
    // What is original already was put back by a vmpatch that was killed in this pause, and its supervisor with it.
    for change in record.changes.iter().rev().map(Change::undone) {
        // One that can't be read fails where it is to be made.
        if !matches!(change.is_made(live), Ok(true)) {
            paused.push(change);
        }
    }
    if let Some(module) = &record.known {
        known::require_unused(live, id, module)?;
        known::require_untraced(live, module)?;
        paused.extend(known::unlist(live, id, module)?);
        paused.extend(known::forget(live, module)?);
        paused.extend(known::give_back(live, module)?);
    }
    paused.extend(wipe_text(live, registry, entry, record)?);
    paused.push(registry.state_change(entry.slot, State::Applied, State::Reverted));
    let occupied = vec![OldFunction {
        name: format!("the new code of {id}"),
        code: text,
    }];
    Ok(Plan {
        before: Vec::new(),
        paused,
        requires: Preconditions::default(),
        occupied,
        unread: record.known_memory(),
        laid: registry.laid_code(),
        record: record.clone(),
    })
}

/// Demands that ftrace can take the functions back.
///
/// ftrace has not counted the tracers that were started while a record was disabled. If one of them ended when it no longer
/// is, ftrace would count below zero, warn, and turn itself off for good (`__ftrace_hash_rec_update`, kernel/trace/ftrace.c).
fn require_untraced(live: &Live<'_>, record: &Record) -> Result<(), RevertError> {
    for function in record.functions.iter().filter(|f| f.redirect == Redirect::Ftrace) {
        let Some(site) = ftrace::record(live, Gva(function.old))? else {
            continue;
        };
        if tracers::is_wanted(live, site.site)? {
            let function = (function.name.clone(), Gva(function.old));
            return Err(wanted(live, function)?);
        }
    }
    Ok(())
}

/// Who wants a function, given by name and address: a livepatch of the guest's own, else some tracer.
fn wanted(live: &Live<'_>, (function, at): (String, Gva)) -> Result<RevertError, KernelError> {
    let held = livepatch::held(live)?;
    Ok(match Held::last_of(&held, at) {
        Some(held) => RevertError::OwnLivepatch {
            function,
            livepatch: held.livepatch.clone(),
        },
        None => RevertError::Traced { function },
    })
}

/// Filler over the text pages: the record says how many bytes of the entry's first pages are text.
fn wipe_text(
    live: &Live<'_>,
    registry: &Registry,
    entry: &Entry,
    record: &Record,
) -> Result<Option<Change>, KernelError> {
    let pages = record.text.len.div_ceil(PAGE_SIZE).min(entry.pages.count);
    let mut old = vec![0; usize::try_from(record.text.len.min(pages * PAGE_SIZE)).unwrap_or(0)];
    let (gpa, at) = (registry.page(entry.pages.first), registry.mapped(entry.pages.first));
    live.memory
        .read(gpa, &mut old)
        .map_err(|source| KernelError::Unreadable {
            what: "the patch's text",
            at,
            source,
        })?;
    let filler = vec![FILLER; old.len()];
    Ok(Some(Change::replace("the patch's text", gpa, old, filler)))
}
