//! Which failures to reach a guest last: a script that tries again fares no better.

use qmp::machine::{QueryError, StubOpenError};
use qmp::memory::{BackingError, RamMapError};
use qmp::{CommandError, TextError};
use std::error::Error;

/// True where the guest was reached, and somewhere down the chain QEMU refused, said what is not understood, or holds the guest in a
/// way that is not supported. False for what may pass: nobody answers, the process ends, the host forbids it.
pub fn is_permanent(error: &(dyn Error + 'static)) -> bool {
    let mut cause = Some(error);
    while let Some(error) = cause {
        if is_cause(error) {
            return true;
        }
        cause = error.source();
    }
    false
}

fn is_cause(error: &(dyn Error + 'static)) -> bool {
    let command = |error: &CommandError| matches!(error, CommandError::Refused { .. } | CommandError::Reply { .. });
    if let Some(error) = error.downcast_ref::<RamMapError>() {
        return match error {
            RamMapError::Text(_) | RamMapError::OutsideBlock { .. } | RamMapError::NoRam => true,
            RamMapError::Command(error) => command(error),
            RamMapError::Backing { cause, .. } | RamMapError::Process { cause, .. } => {
                matches!(cause, BackingError::NotMapped { .. } | BackingError::Text(_))
            }
        };
    }
    if let Some(error) = error.downcast_ref::<QueryError>() {
        return match error {
            QueryError::Command(error) => command(error),
            QueryError::Text(_) => true,
        };
    }
    error.downcast_ref().is_some_and(command)
        || error.is::<TextError>()
        || matches!(error.downcast_ref(), Some(StubOpenError::Foreign { .. }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attach::AttachError;

    fn refused() -> CommandError {
        CommandError::Refused {
            command: "x-query-ramblock".into(),
            class: "CommandNotFound".into(),
            description: "not found".into(),
        }
    }

    #[test]
    fn what_qemu_says_lasts_and_what_the_host_says_may_pass() {
        let late = || CommandError::Timeout {
            command: "query-status".into(),
            within_ms: 1,
        };
        for (error, lasts) in [
            (AttachError::Command(refused()), true),
            (AttachError::Command(late()), false),
            (AttachError::Query(QueryError::Command(late())), false),
            (AttachError::RamMap(RamMapError::Command(refused())), true),
            (AttachError::RamMap(RamMapError::Command(late())), false),
            (AttachError::RamMap(RamMapError::NoRam), true),
            (AttachError::NoPeer { socket: "/q".into() }, false),
        ] {
            assert_eq!(is_permanent(&error), lasts, "{error:?}");
        }
        let gone = BackingError::Proc {
            path: "/proc/1/maps".into(),
            cause: std::io::ErrorKind::NotFound.into(),
        };
        let process = RamMapError::Process { pid: 1, cause: gone };
        assert!(!is_permanent(&AttachError::RamMap(process)));
    }

    #[test]
    fn a_stub_of_the_operators_lasts_wherever_it_is_met() {
        let foreign = StubOpenError::Foreign { at: "tcp::1234".into() };
        let pause = qmp::machine::PauseError::Open(foreign);
        let error = guest_core::machine::MachineError::new("preparing the pause", pause);
        assert!(is_permanent(&guest_core::commit::CommitError::Machine(error)));
    }
}
