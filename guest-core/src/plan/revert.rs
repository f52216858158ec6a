//! The plan of taking a patch out.

use super::{Plan, from_reads, guard, known, old};
use crate::addr::Gva;
use crate::change::Change;
use crate::kernel::guard::Armed;
use crate::kernel::livepatch::{self, Held};
use crate::kernel::{KernelError, Live, ftrace, modules, sites, tracers};
use crate::paging::PAGE_SIZE;
use crate::place::{Entry, FILLER, Record, Redirect, Registry, State};
use crate::reads::Preconditions;
use crate::unwind::OldFunction;
use std::ops::Range;

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
        "{id} is in use: the guest holds {references} references to its module; end what uses it (a file that its code has opened or \
         that is its own, a tracer, a probe), then revert again"
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

/// Plans to take out the patch `id`: sites get their old bytes in one pause. Its text becomes filler in the same pause, because
/// only there code that was already run may be written; unless the guest may still use what the patch
/// [has handed out](Record::escapes): then its code and variables stay, and all that the guest knows of them.
pub fn revert(live: &Live<'_>, registry: &Registry, id: &str) -> Result<Plan, RevertError> {
    from_reads::plan(live, |live| plan(live, registry, id))
}

fn plan(live: &Live<'_>, registry: &Registry, id: &str) -> Result<Plan, RevertError> {
    let with_record = |entry| Option::zip(Some(entry), Entry::record(entry));
    let patches = registry.entries.iter().filter(|entry| entry.state != State::Kept);
    let mut patches = patches.filter_map(with_record);
    let Some((entry, record)) = patches.find(|(_, record)| record.id == id) else {
        let known = registry.records().map(|record| record.id.clone()).collect();
        return Err(RevertError::Unknown {
            id: id.to_owned(),
            known,
        });
    };
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
    let (gone, occupied, unread) = match record.must_stay() {
        true => keep(live, registry, record)?,
        false => wipe(live, registry, entry, record)?,
    };
    paused.extend(gone);
    let after = if record.must_stay() {
        State::Kept
    } else {
        State::Reverted
    };
    paused.push(registry.state_change(entry.slot, State::Applied, after));
    Ok(Plan {
        before: Vec::new(),
        paused,
        requires: Preconditions::default(),
        occupied,
        unread,
        laid: registry.laid_code(),
        record: record.clone(),
    })
}

/// What a plan does with a patch's code, what must be on no stack for it, and what nobody may be reading.
type Gone = (Vec<Change>, Vec<OldFunction>, Range<Gva>);

/// Keeps the code, under another name.
fn keep(live: &Live<'_>, registry: &Registry, record: &Record) -> Result<Gone, RevertError> {
    let mut changes = Vec::new();
    if let Some(module) = &record.known {
        changes.extend(module.rename(live, &record.kept_name())?);
    }
    changes.extend(registry.renewal());
    Ok((changes, replacements(live, record)?, Gva(0)..Gva(0)))
}

/// The new functions, with what the compiler split off them: that none of them is under way is all that a revert needs where the
/// code stays. A thread or timer of the patch's own does not hold it up.
pub(super) fn replacements(live: &Live<'_>, record: &Record) -> Result<Vec<OldFunction>, KernelError> {
    let Some(module) = modules::containing(live, Gva(record.text.start))? else {
        return Ok(vec![whole_text(record)]);
    };
    let symbols = modules::symbols(&live.constant(), &module)?;
    let parts = record.functions.iter().flat_map(|function| {
        let at = Gva(function.new);
        let symbol = symbols.iter().find(|symbol| symbol.address == at && symbol.size != 0);
        let name = symbol.map_or(function.name.as_str(), |symbol| symbol.name.as_str());
        old::module_parts(&symbols, name, at, function.new_len)
    });
    Ok(parts.collect())
}

/// Wipes the code, and makes the guest forget it.
fn wipe(live: &Live<'_>, registry: &Registry, entry: &Entry, record: &Record) -> Result<Gone, RevertError> {
    let id = &record.id;
    let text = whole_text(record);
    if let Some(at) = sites::probe_in(live, &text.code)? {
        return Err(RevertError::Probed { id: id.clone(), at });
    }
    let mut changes = Vec::new();
    if let Some(module) = &record.known {
        known::require_unused(live, id, module)?;
        known::require_untraced(live, module)?;
        changes.extend(known::unlist(live, id, module)?);
        changes.extend(known::forget(live, module)?);
        changes.extend(known::give_back(live, module)?);
    }
    changes.extend(wipe_text(live, registry, entry, record)?);
    Ok((changes, vec![text], record.known_memory()))
}

/// All of the patch's code.
pub(super) fn whole_text(record: &Record) -> OldFunction {
    OldFunction {
        name: format!("the new code of {}", record.id),
        code: Gva(record.text.start)..Gva(record.text.start.saturating_add(record.text.len)),
    }
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
