//! Plans the revert of a patch.

use super::removal::Removal;
use super::{NoTransition, Plan, from_reads, stack};
use crate::addr::Gva;
use crate::kernel::guard::Armed;
use crate::kernel::{KernelError, Live};
use crate::registry::{Entry, Record, Registry, State};
use crate::transaction::recovery::Keep;

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
    /// A later patch holds a function of the patch, too, and leads it from the patch's code to its own.
    #[error("{function} of {id} is held by {by}, which was applied later; revert {by} first")]
    Covered {
        /// The patch.
        id: String,
        /// The function.
        function: String,
        /// The later patch.
        by: String,
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
    /// The patch can't be in transition: it can only be reverted at one instant.
    #[error("it can only be reverted at one instant: {0}")]
    NoTransition(#[from] NoTransition),
    /// The guest's integrity guard would or may stop the guest.
    #[error(transparent)]
    Guard(#[from] Armed),
    /// The guest's kernel cannot be read.
    #[error("reading the guest's kernel")]
    Kernel(#[from] KernelError),
}

/// Plans the revert of the patch `id`: in one pause, sites get their old bytes and the patch's text becomes filler. Code that has run may
/// only be overwritten in a pause. Where the guest may still use addresses that the patch [has handed out](crate::registry::Record::escapes), code and
/// variables stay, and stay registered.
///
/// # Errors
///
/// There is no such patch, the guest uses it, or the guest cannot be read.
pub fn revert(live: &Live<'_>, registry: &Registry, id: &str) -> Result<Plan, RevertError> {
    from_reads::plan(live, |live| plan(live, registry, id))
}

/// The patch `id`, which is in force or half reverted, and which no later patch covers.
pub(super) fn find<'r>(registry: &'r Registry, id: &str) -> Result<(&'r Entry, &'r Record), RevertError> {
    let with_record = |entry| Option::zip(Some(entry), Entry::record(entry));
    let is_in_force = |entry: &&Entry| entry.state.is_in_force() || entry.state == State::Reverting;
    let mut patches = registry.entries.iter().filter(is_in_force).filter_map(with_record);
    let Some((entry, record)) = patches.find(|(_, record)| record.id == id) else {
        let applied = registry.records().map(|record| record.id.clone()).collect();
        return Err(RevertError::Unknown {
            id: id.to_owned(),
            applied,
        });
    };
    if let Some((function, by)) = stack::covered(registry.records(), record) {
        return Err(RevertError::Covered {
            id: id.to_owned(),
            function,
            by: by.to_owned(),
        });
    }
    Ok((entry, record))
}

fn plan(live: &Live<'_>, registry: &Registry, id: &str) -> Result<Plan, RevertError> {
    let (entry, record) = find(registry, id)?;
    // It is recorded before the pause that the patch is on its way out.
    let mut staged = Vec::new();
    if entry.state != State::Reverting {
        staged.extend(registry.upgrade());
        staged.push(registry.state_change(entry.slot, entry.state, State::Reverting));
    }
    let removal = Removal {
        live,
        registry,
        entry,
        record,
    };
    let plan = removal.plan(State::Reverting, Keep::IfHandedOut)?;
    Ok(Plan { staged, ..plan })
}
