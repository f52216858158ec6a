//! What an error of QEMU's means: whether trying again would fail again, and whether it is the host that forbids it.

use crate::domains::Uuid;
use crate::hypervisor::error::causes;
use crate::hypervisor::ram::RamError;
use crate::hypervisor::{Meaning, ReachError};
use guest_core::machine::MachineError;
use qmp::machine::{PauseError, QueryError, StubOpenError};
use qmp::memory::{BackingError, RamMapError};
use qmp::{CommandError, ConnectError, LibvirtError, TextError};
use std::error::Error;
use std::io;
use std::path::PathBuf;

/// Why a guest of QEMU can't be reached.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// No QMP connection.
    #[error("connecting to {socket}")]
    Connect {
        /// The socket: QEMU's, or libvirt's.
        socket: PathBuf,
        /// Why.
        source: qmp::machine::AttachError,
    },
    /// The host does not say which process owns the socket.
    #[error("{route} does not tell which process is at its other end")]
    NoPeer {
        /// How QEMU was reached.
        route: String,
    },
    /// It is a way to a guest, and not to QEMU.
    #[error("{route} leads to no monitor")]
    NoMonitor {
        /// How the guest is reached.
        route: String,
    },
    /// The guest that libvirt knows by the UUID of this QEMU is another process's.
    #[error("process {pid} runs a guest with the UUID {uuid}, and libvirt's guest of that UUID is not in that process")]
    OtherProcess {
        /// The UUID.
        uuid: Uuid,
        /// The process.
        pid: i32,
    },
    /// QEMU did not tell the vCPUs' registers.
    #[error("reading the vCPUs' registers")]
    Query(#[from] QueryError),
    /// QEMU did not answer a command, which the cause names.
    #[error("running a QMP command")]
    Command(#[from] CommandError),
    /// The RAM map could not be read.
    #[error("finding the guest's RAM")]
    RamMap(#[from] RamMapError),
    /// The RAM can't be reached.
    #[error("reaching the guest's RAM")]
    Ram(#[from] RamError),
    /// The vCPUs can't be stopped or resumed.
    #[error(transparent)]
    Machine(#[from] MachineError),
}

/// An error of QEMU's, with its meaning.
pub(super) fn reach<E: Error + Send + Sync + 'static>(error: E) -> ReachError {
    ReachError::new(meaning(&error), error)
}

fn meaning(error: &(dyn Error + 'static)) -> Meaning {
    // An error that was wrapped before has its meaning.
    if let Some(meaning) = ReachError::meaning_in(error) {
        return meaning;
    }
    match causes(error).find_map(|cause| cause.downcast_ref()) {
        Some(PauseError::Busy(_)) => return Meaning::Busy,
        Some(PauseError::State(_)) => return Meaning::NotRunning,
        _ => {}
    }
    if causes(error).any(is_permanent) {
        return Meaning::Permanent;
    }
    if causes(error).any(is_forbidden) {
        let memory_of = causes(error).find_map(|cause| match cause.downcast_ref()? {
            RamMapError::Process { pid, .. } | RamMapError::Backing { pid, .. } => Some(*pid),
            _ => None,
        });
        return Meaning::Forbidden { memory_of };
    }
    match causes(error).any(is_gone) {
        true => Meaning::Gone,
        false => Meaning::MayPass,
    }
}

/// True where nobody listens on QEMU's socket.
fn is_gone(error: &(dyn Error + 'static)) -> bool {
    matches!(
        error.downcast_ref(),
        Some(qmp::machine::AttachError::Connect(
            ConnectError::NoSocket { .. } | ConnectError::Refused { .. }
        ))
    )
}

/// True where the host refused.
fn is_forbidden(error: &(dyn Error + 'static)) -> bool {
    let is_denied = |error: &io::Error| error.kind() == io::ErrorKind::PermissionDenied;
    // It passes its causes on as if they were its own, so that the chain does not have the error inside.
    let connecting: Option<&qmp::machine::AttachError> = error.downcast_ref();
    let is_closed = |error: &qmp::machine::AttachError| {
        matches!(
            error,
            qmp::machine::AttachError::Connect(
                ConnectError::Permission { .. } | ConnectError::Libvirt(LibvirtError::Permission { .. })
            )
        )
    };
    connecting.is_some_and(is_closed) || error.downcast_ref().is_some_and(is_denied)
}

/// True where QEMU refused, its answer is not understood, or it holds the guest in a form that is not supported.
fn is_permanent(error: &(dyn Error + 'static)) -> bool {
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
            (AttachError::NoPeer { route: "/q".into() }, false),
        ] {
            assert_eq!(meaning(&error) == Meaning::Permanent, lasts, "{error:?}");
        }
        let gone = BackingError::Proc {
            path: "/proc/1/maps".into(),
            cause: std::io::ErrorKind::NotFound.into(),
        };
        let process = RamMapError::Process { pid: 1, cause: gone };
        assert_eq!(meaning(&AttachError::RamMap(process)), Meaning::MayPass);
    }

    #[test]
    fn a_qemu_that_has_ended_is_told_from_one_that_does_not_answer() {
        let path = || PathBuf::from("/q");
        let held = ConnectError::Held {
            path: path(),
            within_ms: 1,
        };
        for (source, expected) in [
            (ConnectError::Refused { path: path() }, Meaning::Gone),
            (ConnectError::NoSocket { path: path() }, Meaning::Gone),
            (held, Meaning::MayPass),
        ] {
            let source = qmp::machine::AttachError::Connect(source);
            let socket = path();
            assert_eq!(reach(AttachError::Connect { socket, source }).meaning(), expected);
        }
    }

    #[test]
    fn a_stub_of_the_operators_lasts_wherever_it_is_met() {
        let foreign = StubOpenError::Foreign { at: "tcp::1234".into() };
        let pause = qmp::machine::PauseError::Open(foreign);
        let error = AttachError::Machine(MachineError::new("preparing the pause", reach(pause)));
        assert_eq!(meaning(&error), Meaning::Permanent);
    }

    #[test]
    fn a_guest_that_qemu_works_on_and_one_that_has_panicked_are_told_apart() {
        let migration = PauseError::Busy(qmp::machine::Busy::Migration("active".to_owned()));
        let panicked = PauseError::State(qmp::machine::RunState::Other("guest-panicked".to_owned()));
        assert_eq!(reach(migration).meaning(), Meaning::Busy);
        assert_eq!(reach(panicked).meaning(), Meaning::NotRunning);
    }

    #[test]
    fn a_process_whose_memory_the_host_hides_is_named() {
        let denied = || io::Error::from(io::ErrorKind::PermissionDenied);
        let cause = BackingError::Proc {
            path: "/proc/7/maps".into(),
            cause: denied(),
        };
        let memory = AttachError::RamMap(RamMapError::Process { pid: 7, cause });
        assert_eq!(reach(memory).meaning(), Meaning::Forbidden { memory_of: Some(7) });
        let connect = qmp::machine::AttachError::Connect(ConnectError::Permission { path: "/q".into() });
        let connect = AttachError::Connect {
            socket: "/q".into(),
            source: connect,
        };
        assert_eq!(reach(connect).meaning(), Meaning::Forbidden { memory_of: None });
    }
}
