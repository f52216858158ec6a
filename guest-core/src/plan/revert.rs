//! Plans the revert of a patch.

use super::{Plan, from_reads, guard, registration, targets};
use crate::addr::Gva;
use crate::change::Change;
use crate::kernel::guard::Armed;
use crate::kernel::livepatch::{self, Held};
use crate::kernel::{KernelError, Live, ftrace, modules, sites, tracers};
use crate::paging::PAGE_SIZE;
use crate::reads::Preconditions;
use crate::registry::{Entry, FILLER, Record, Redirect, Registry, State};
use crate::unwind::OldFunction;
use std::ops::Range;

/// Why a patch cannot be reverted. Nothing was changed.
#[derive(Debug, thiserror::Error)]
pub enum RevertError {
    /// The guest has no patch of that name.
    #[error("no patch {id} in this guest; it has: {}", if applied.is_empty() { "none".to_owned() } else { applied.join(", ") })]
    Unknown {
        /// The name that was asked for.
        id: String,
        /// The names of the guest's patches.
        applied: Vec<String>,
    },
    /// The guest began to trace the function while the patch had its ftrace record disabled.
    #[error(
        "{function} is wanted by a tracer that the guest started after it was patched: a revert now would make the guest turn its tracing off for good; end that tracer first"
    )]
    Traced {
        /// The function.
        function: String,
    },
    /// The guest loaded a livepatch for the function while the patch had its ftrace record disabled.
    #[error(
        "{function} is wanted by {livepatch}, a livepatch that the guest loaded after it was patched: a revert now would make the guest turn its tracing off for good; disable that livepatch in the guest first, and load it again afterwards"
    )]
    OwnLivepatch {
        /// The function.
        function: String,
        /// The livepatch's module.
        livepatch: String,
    },
    /// The guest traces or probes a new function: the function's ftrace site holds a call.
    #[error("the guest traces or probes {function}, a function of the patch; end what traces it first")]
    NewTraced {
        /// The new function.
        function: String,
    },
    /// The guest holds references to the patch's module.
    #[error(
        "{id} is in use: the guest holds {references} references to its module; end what uses it (a file that its code has opened or \
         that is its own, a tracer, a probe), then revert again"
    )]
    InUse {
        /// The patch.
        id: String,
        /// Number of references.
        references: u32,
    },
    /// A later patch or module has put its branches on the list of a static key behind the patch's.
    #[error("{id} has branches on the static key {key}, and so has a later patch or module; remove that one first")]
    KeyInUse {
        /// The patch.
        id: String,
        /// The key.
        key: String,
    },
    /// The guest has set a kprobe in the new code, and would write to that code when it removes the kprobe.
    #[error("{id} is in use: the guest has set a kprobe in its code, at {at}; end what probes it first")]
    Probed {
        /// The patch.
        id: String,
        /// Guest-virtual address of the kprobe.
        at: Gva,
    },
    /// The guest's integrity guard would or may stop the guest.
    #[error(transparent)]
    Guard(#[from] Armed),
    /// The guest's kernel cannot be read.
    #[error("reading the guest's kernel")]
    Kernel(#[from] KernelError),
}

/// Plans the revert of the patch `id`: in one pause, sites get their old bytes and the patch's text becomes filler. Code that has run may
/// only be overwritten in a pause. Where the guest may still use addresses that the patch [has handed out](Record::escapes), code and
/// variables stay, and stay registered.
///
/// # Errors
///
/// There is no such patch, the guest uses it, or the guest cannot be read.
pub fn revert(live: &Live<'_>, registry: &Registry, id: &str) -> Result<Plan, RevertError> {
    from_reads::plan(live, |live| plan(live, registry, id))
}

fn plan(live: &Live<'_>, registry: &Registry, id: &str) -> Result<Plan, RevertError> {
    let with_record = |entry| Option::zip(Some(entry), Entry::record(entry));
    let patches = registry.entries.iter().filter(|entry| entry.state != State::Kept);
    let mut patches = patches.filter_map(with_record);
    let Some((entry, record)) = patches.find(|(_, record)| record.id == id) else {
        let applied = registry.records().map(|record| record.id.clone()).collect();
        return Err(RevertError::Unknown {
            id: id.to_owned(),
            applied,
        });
    };
    guard::require_survival::<RevertError>(live)?;
    require_untraced(live, record)?;
    let mut atomic = Vec::new();
    // Sites with their old bytes were restored by a vmpatch that was killed in the pause of a revert, together with its supervisor.
    for change in record.changes.iter().rev().map(Change::undone) {
        // A change that cannot be read here fails in the commit.
        if !matches!(change.is_made(live), Ok(true)) {
            atomic.push(change);
        }
    }
    let (removal, must_be_quiescent, unreferenced) = match record.must_stay() {
        true => keep(live, registry, record)?,
        false => wipe(live, registry, entry, record)?,
    };
    atomic.extend(removal);
    let after = if record.must_stay() {
        State::Kept
    } else {
        State::Reverted
    };
    atomic.push(registry.state_change(entry.slot, State::Applied, after));
    Ok(Plan {
        staged: Vec::new(),
        atomic,
        requires: Preconditions::default(),
        must_be_quiescent,
        unreferenced,
        patch_code: registry.patch_code(),
        record: record.clone(),
    })
}

/// The changes for a patch's code, the functions that must be quiescent for them, and the memory that must be unreferenced.
type Removal = (Vec<Change>, Vec<OldFunction>, Range<Gva>);

/// Keeps the code, and renames its module in the guest.
fn keep(live: &Live<'_>, registry: &Registry, record: &Record) -> Result<Removal, RevertError> {
    let mut changes = Vec::new();
    if let Some(module) = &record.registration {
        changes.extend(module.rename(live, &record.kept_name())?);
    }
    changes.extend(registry.upgrade());
    Ok((changes, replacements(live, record)?, Gva(0)..Gva(0)))
}

/// The new functions and their split parts: what must be quiescent for a revert that keeps the code. A thread or timer of the patch's own
/// does not block such a revert.
pub(super) fn replacements(live: &Live<'_>, record: &Record) -> Result<Vec<OldFunction>, KernelError> {
    let Some(module) = modules::containing(live, Gva(record.text.start))? else {
        return Ok(vec![whole_text(record)]);
    };
    let symbols = modules::symbols(&live.constant(), &module)?;
    let parts = record.functions.iter().flat_map(|function| {
        let at = Gva(function.new);
        let symbol = symbols.iter().find(|symbol| symbol.address == at && symbol.size != 0);
        let name = symbol.map_or(function.name.as_str(), |symbol| symbol.name.as_str());
        targets::module_parts(&symbols, name, at, function.new_len)
    });
    Ok(parts.collect())
}

/// Wipes the code, and unregisters its module from the guest.
fn wipe(live: &Live<'_>, registry: &Registry, entry: &Entry, record: &Record) -> Result<Removal, RevertError> {
    let id = &record.id;
    let text = whole_text(record);
    if let Some(at) = sites::probe_in(live, &text.code)? {
        return Err(RevertError::Probed { id: id.clone(), at });
    }
    let mut changes = Vec::new();
    if let Some(module) = &record.registration {
        registration::require_unused(live, id, module)?;
        registration::require_untraced(live, module)?;
        changes.extend(registration::unlist(live, id, module)?);
        changes.extend(registration::unregister(live, module, None)?);
        changes.extend(registration::free_per_cpu(live, module)?);
    }
    changes.extend(wipe_text(live, registry, entry, record)?);
    Ok((changes, vec![text], record.registered_memory()))
}

/// All of the patch's code.
pub(super) fn whole_text(record: &Record) -> OldFunction {
    OldFunction {
        name: format!("the new code of {}", record.id),
        code: Gva(record.text.start)..Gva(record.text.start.saturating_add(record.text.len)),
    }
}

/// Requires that no tracer was started on an old function since the patch was applied.
///
/// ftrace does not count the tracers that start while a record is disabled. If one of them ended after the revert has enabled the record,
/// ftrace would count below zero, warn, and turn itself off for good (`__ftrace_hash_rec_update`, kernel/trace/ftrace.c).
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

/// The error for a function, given by name and address, that a livepatch of the guest's own or a tracer uses.
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

/// Plans filler over the patch's text. The record says how many bytes of the entry's first pages are text.
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
