//! What an operator can do about a failure.

use super::Failure;
use crate::program::cli::PATCHES_DEFAULT;
use guest_core::commit::{CommitError, NotSafe};
use guest_core::guest;
use guest_core::registry::RegistryError;
use guest_core::transaction::Operation;
use host_agent::domains::is_undumpable_own;
use host_agent::find::FindError;
use host_agent::hypervisor::{Meaning, ReachError};
use host_agent::session::{BusyError, HostError, OpenError, PatchError};
use host_agent::upgrade::UpgradeError;
use std::path::Path;

const WAIT: &str = "try again when that is over";

/// What the operator can do about it.
pub fn of(failure: &Failure) -> Option<&'static str> {
    match failure {
        Failure::After { source, .. } => of(source),
        Failure::Patch(error) => of_patch(error),
        Failure::Open(error) => of_open(error),
        Failure::Upgrade(error) | Failure::Find(FindError::Upgrade(error)) => of_upgrade(error),
        #[cfg(feature = "build")]
        Failure::Build(error) => error.hint(),
        Failure::File { path, .. } if path.as_path() == Path::new(PATCHES_DEFAULT) => {
            Some("that is where the bare command looks for modules: put them there, or say --patches DIR")
        }
        _ => None,
    }
}

fn of_open(error: &OpenError) -> Option<&'static str> {
    match error {
        OpenError::Host(error) => of_host(error),
        OpenError::Registry(error) => of_registry(error),
        _ => None,
    }
}

fn of_patch(error: &PatchError) -> Option<&'static str> {
    match error {
        PatchError::Guest(error) => of_guest(error),
        PatchError::Refused { .. } => None,
    }
}

fn of_guest(error: &guest::PatchError<HostError>) -> Option<&'static str> {
    match error {
        guest::PatchError::Afterwards { source } => of_guest(source),
        guest::PatchError::Vmm(error) => of_host(error),
        guest::PatchError::Registry(error) => of_registry(error),
        guest::PatchError::NotResumed { runs: false, .. } => Some(
            "QMP `cont` lets the guest run; `vmpatch status` then says what is in force, and the next `apply` or `revert` takes \
             back what is half done",
        ),
        guest::PatchError::Commit { operation, source, .. } => of_commit(*operation, source),
        _ => None,
    }
}

fn of_host(error: &HostError) -> Option<&'static str> {
    match error {
        HostError::Busy(error) => of_busy(error),
        HostError::Reach(error) => of_reach(error),
        HostError::Lock(_) | HostError::Supervisor(_) => None,
    }
}

fn of_commit(operation: Operation, error: &CommitError) -> Option<&'static str> {
    match error {
        CommitError::NotSafe {
            why: NotSafe::Stacks(_),
            ..
        } if operation == Operation::Apply => Some(
            "try again later or with a longer --timeout; --model hybrid lets tasks that are inside finish in the old code, and moves all others over at once; \
             --model none mixes old and new code",
        ),
        CommitError::NotSafe {
            why: NotSafe::Stacks(_),
            ..
        } if operation == Operation::Revert => Some(
            "try again later or with a longer --timeout; --model hybrid lets tasks that are inside finish in the new code, and moves all others over at once",
        ),
        // What else is in the way is so under every model.
        CommitError::NotSafe { .. } => Some("try again later or with a longer --timeout"),
        error if ReachError::meaning_in(error) == Some(Meaning::Busy) => Some(WAIT),
        CommitError::HalfDone { .. } => Some(
            "the guest may be half patched: run the command again, which rolls back what is left, or of a revert does the rest; where it says this again, plan a reboot of the guest",
        ),
        _ => None,
    }
}

fn of_busy(error: &BusyError) -> Option<&'static str> {
    match error {
        BusyError::Busy(_) => Some(WAIT),
        BusyError::Reach(error) => of_reach(error),
    }
}

fn of_registry(error: &RegistryError) -> Option<&'static str> {
    match error {
        RegistryError::NoCave => {
            Some("this kernel was built without page-table isolation, which is where the room comes from")
        }
        _ => None,
    }
}

fn of_reach(error: &ReachError) -> Option<&'static str> {
    match error.meaning() {
        Meaning::Forbidden { memory_of: Some(pid) } if is_undumpable_own(pid) => Some(
            "vmpatch runs as the user that QEMU runs as, but that process is not dumpable (it has changed its user or its \
             capabilities, or said so by prctl), and the host shows its memory to root alone: run vmpatch as root",
        ),
        Meaning::Forbidden { .. } => Some("run vmpatch as root, or as the user that QEMU runs as"),
        _ => None,
    }
}

fn of_upgrade(error: &UpgradeError) -> Option<&'static str> {
    match error {
        UpgradeError::Moved { source } => of_upgrade(source),
        UpgradeError::Open(error) => of_open(error),
        UpgradeError::Busy(error) => of_busy(error),
        UpgradeError::Libvirt { .. } => Some(
            "`virsh managedsave` and `virsh start` bring it up in the installed QEMU, with a pause; `virsh migrate --live` moves it \
             to a host that has it",
        ),
        UpgradeError::Ended { .. } | UpgradeError::Unresponsive { .. } => Some(
            "`upgrade --check` starts the new process without touching the guest; --data-dir names its firmware's folder",
        ),
        UpgradeError::Stranded { .. } => Some(
            "it has run in the old process alone: QMP `cont` lets it go on there, as soon as what is in the way is gone",
        ),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use guest_core::machine::MachineError;

    #[test]
    fn what_passes_by_itself_is_to_be_waited_for_and_what_does_not_is_not() {
        for (meaning, passes) in [(Meaning::Busy, true), (Meaning::NotRunning, false)] {
            let error = ReachError::new(meaning, "it is not to be paused");
            let error = PatchError::Guest(guest::PatchError::Commit {
                operation: Operation::Apply,
                id: "fix".to_owned(),
                source: Box::new(MachineError::new("pausing the guest", error).into()),
            });
            assert_eq!(of(&Failure::Patch(error)).is_some(), passes, "{meaning:?}");
        }
    }

    #[test]
    fn who_may_not_reach_a_guest_is_told_as_whom_to_run() {
        let denied = OpenError::from(ReachError::new(
            Meaning::Forbidden { memory_of: None },
            "permission denied",
        ));
        let failure = Failure::Open(denied);
        assert_eq!(
            of(&failure),
            Some("run vmpatch as root, or as the user that QEMU runs as")
        );
    }
}
