//! The exit code of a failure, as `--help` lists them.

use super::Failure;
use host_agent::outcome::{GuestState, Reason};

const FAILED: u8 = 1;
const USAGE: u8 = 2;
const REFUSED: u8 = 3;
const NOT_SAFE: u8 = 4;
const UNREACHABLE: u8 = 5;
const NOT_AS_BEFORE: u8 = 6;

/// The exit code: 6 for a guest that is not as before. A refusal of one of several patches, and a moment that was not safe for it, keep
/// their codes; the report says what was done before.
pub fn of(failure: &Failure) -> u8 {
    match (failure.guest_state(), of_reason(failure)) {
        (GuestState::AsBefore, code) => code,
        (GuestState::PartlyDone, code @ (REFUSED | NOT_SAFE)) => code,
        _ => NOT_AS_BEFORE,
    }
}

/// The exit code, were the guest as before.
fn of_reason(failure: &Failure) -> u8 {
    let reason = match failure {
        Failure::After { source, .. } => return of_reason(source),
        Failure::NoTarget => return USAGE,
        Failure::Incomplete { code, .. } => return *code,
        Failure::Domain(_) => Reason::Unreachable,
        Failure::Find(error) => error.reason(),
        Failure::Open(error) => error.reason(),
        Failure::Patch(error) => error.reason(),
        Failure::Module(host_agent::module_file::FileError::Packed { .. }) => Reason::Refused,
        #[cfg(feature = "build")]
        Failure::Build(error) => error.reason(),
        Failure::Upgrade(error) => error.reason(),
        Failure::Module(_) | Failure::File { .. } | Failure::Launch(_) | Failure::Supervise(_) | Failure::Output(_) => {
            Reason::Failed
        }
    };
    match reason {
        Reason::Failed => FAILED,
        Reason::Refused => REFUSED,
        Reason::NotSafe => NOT_SAFE,
        Reason::Unreachable => UNREACHABLE,
    }
}

#[cfg(test)]
mod tests {
    use super::super::{guest, json};
    use super::*;
    use guest_core::commit::{CommitError, Effect};
    use guest_core::machine::MachineError;
    use guest_core::transaction::Operation;
    use host_agent::session::BusyError;
    use host_agent::upgrade::UpgradeError;
    use std::io;

    fn committing(source: CommitError) -> Failure {
        let error = guest_core::guest::PatchError::Commit {
            operation: Operation::Apply,
            id: "fix".to_owned(),
            source: Box::new(source),
        };
        Failure::Patch(error.into())
    }

    fn not_resumed(runs: bool, change: Effect) -> Failure {
        let source = MachineError::new("resuming the guest", "no answer").left_paused(true);
        let error = guest_core::guest::PatchError::NotResumed {
            operation: Operation::Apply,
            id: "fix".to_owned(),
            runs,
            change,
            source: Box::new(CommitError::NotResumed {
                effect: change,
                first: None,
                source,
            }),
        };
        Failure::Patch(error.into())
    }

    fn half_done() -> CommitError {
        CommitError::HalfDone {
            first: String::new(),
            undo: String::new(),
        }
    }

    #[test]
    fn exit_1_says_that_the_guest_is_as_before_and_exit_6_that_it_is_not() {
        let stopped = || MachineError::new("pausing the guest", "no answer").into();
        let written = || Failure::Output(io::ErrorKind::StorageFull.into());
        let refused = || Failure::Patch(BusyError::Busy("a snapshot".to_owned()).into());
        let stranded = UpgradeError::Unfinished {
            pid: 1,
            left: String::new(),
            source: io::ErrorKind::Other.into(),
        };
        for (failure, code, state) in [
            (committing(stopped()), 1, "as before"),
            (committing(half_done()), 6, "half patched"),
            (not_resumed(true, Effect::AsBefore), 1, "as before"),
            (not_resumed(true, Effect::InForce), 6, "in force"),
            (not_resumed(false, Effect::AsBefore), 6, "paused"),
            (not_resumed(false, Effect::InForce), 6, "paused"),
            (written(), 1, "as before"),
            (written().after(GuestState::AsBefore), 1, "as before"),
            (written().after(GuestState::InForce), 6, "in force"),
            (refused(), 3, "as before"),
            // One of several: the report says what was done before.
            (refused().after(GuestState::PartlyDone), 3, "partly done"),
            (committing(stopped()).after(GuestState::PartlyDone), 6, "partly done"),
            // The worse of the two.
            (committing(half_done()).after(GuestState::PartlyDone), 6, "half patched"),
            // Reading a guest that was just patched.
            (refused().after(GuestState::InForce), 6, "in force"),
            (Failure::Upgrade(stranded), 6, "in force"),
        ] {
            assert_eq!(
                (of(&failure), guest::name(failure.guest_state())),
                (code, state),
                "{failure}"
            );
        }
    }

    #[test]
    fn a_paused_guest_is_told_with_how_much_of_the_change_is_in_it() {
        let members = json::members(&not_resumed(false, Effect::InForce));
        assert_eq!(members["guest_state"], "paused");
        assert_eq!(members["change"], "in force");
        assert_eq!(members["exit_code"], 6);
        assert!(!json::members(&committing(half_done())).contains_key("change"));
    }
}
