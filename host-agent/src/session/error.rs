//! Why a guest was not opened, or not patched.

use crate::hypervisor::{Meaning, ReachError, Route};
use crate::lock::LockError;
use crate::outcome::{GuestState, Reason};
use crate::sandbox::SandboxError;
use guest_core::commit::CommitError;
use guest_core::guest;
use guest_core::kernel::KernelError;
use guest_core::plan::Refusal;
use guest_core::registry::RegistryError;
use std::io;
use std::path::{Path, PathBuf};

/// Why a guest was not opened. Nothing of it was changed.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Another vmpatch is at work there.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// Another process answers than the one that was found.
    #[error("{route} is answered by process {found}, not by the domain's process {expected}")]
    OtherProcess {
        /// How it was reached.
        route: Route,
        /// The process that has that socket on its command line.
        expected: i32,
        /// The process at its other end.
        found: i32,
    },
    /// The host did not do what opening the guest needs.
    #[error(transparent)]
    Host(HostError),
    /// The kernel is not understood.
    #[error("understanding the guest's kernel")]
    Kernel(#[from] KernelError),
    /// The registry is not understood.
    #[error("understanding the guest's patches")]
    Registry(#[from] RegistryError),
    /// The sandbox was required, and the host does not give it.
    #[error(transparent)]
    Sandbox(#[from] SandboxError),
    /// The program to start the supervisor from was not found.
    #[error("finding the program of this vmpatch")]
    Program(#[source] io::Error),
}

impl From<ReachError> for OpenError {
    fn from(error: ReachError) -> Self {
        Self::Host(error.into())
    }
}

impl From<guest::OpenError<HostError>> for OpenError {
    fn from(error: guest::OpenError<HostError>) -> Self {
        match error {
            guest::OpenError::Vmm(error) => Self::Host(error),
            guest::OpenError::Kernel(error) => Self::Kernel(error),
            guest::OpenError::Registry(error) => Self::Registry(error),
        }
    }
}

impl OpenError {
    /// Why it was not opened.
    pub fn reason(&self) -> Reason {
        match self {
            Self::Lock(_) | Self::OtherProcess { .. } => Reason::Unreachable,
            Self::Host(error) => error.reason(),
            Self::Kernel(_) | Self::Registry(_) | Self::Sandbox(_) => Reason::Refused,
            Self::Program(_) => Reason::Failed,
        }
    }
}

/// What it means that a VM was not reached. A refusal is not "unreachable", which scripts try again.
fn reached(error: &ReachError) -> Reason {
    match error.meaning() {
        Meaning::Permanent => Reason::Refused,
        _ => Reason::Unreachable,
    }
}

/// That a guest can't be changed now, as its hypervisor does something with its memory.
#[derive(Debug, thiserror::Error)]
pub enum BusyError {
    /// It is doing something that a patch would not survive.
    #[error("the hypervisor is busy with {0}: changes from outside would be lost")]
    Busy(String),
    /// It did not answer what it is doing.
    #[error("reaching the guest")]
    Reach(#[from] ReachError),
}

impl BusyError {
    /// Why it can't be changed now.
    pub fn reason(&self) -> Reason {
        match self {
            Self::Busy(_) => Reason::Refused,
            Self::Reach(error) => reached(error),
        }
    }
}

/// Why the host did not permit a change, or did not do what the change needs. Nothing was changed.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// The guest can't be changed now.
    #[error(transparent)]
    Busy(#[from] BusyError),
    /// The guest was opened only to be read.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// The VM can't be reached any more.
    #[error("reaching the guest")]
    Reach(#[from] ReachError),
    /// The supervisor can't be started.
    #[error("starting the supervisor")]
    Supervisor(#[source] io::Error),
}

impl HostError {
    fn reason(&self) -> Reason {
        match self {
            Self::Busy(error) => error.reason(),
            Self::Lock(_) => Reason::Unreachable,
            Self::Reach(error) => reached(error),
            Self::Supervisor(_) => Reason::Failed,
        }
    }
}

/// Why a patch was not applied, reverted or recovered.
#[derive(Debug, thiserror::Error)]
pub enum PatchError {
    /// A module does not fit.
    #[error("{path} does not fit the guest")]
    Refused {
        /// The module.
        path: PathBuf,
        /// Why.
        source: Box<Refusal>,
    },
    /// All else, as the core says it.
    #[error(transparent)]
    Guest(#[from] guest::PatchError<HostError>),
}

impl From<HostError> for PatchError {
    fn from(error: HostError) -> Self {
        Self::Guest(guest::PatchError::Vmm(error))
    }
}

impl From<BusyError> for PatchError {
    fn from(error: BusyError) -> Self {
        HostError::from(error).into()
    }
}

impl PatchError {
    /// The core's error of the module in `file`.
    pub(super) fn of(file: &Path) -> impl FnOnce(guest::PatchError<HostError>) -> Self {
        move |error| match error {
            guest::PatchError::Refused { source, .. } => Self::Refused {
                path: file.to_owned(),
                source,
            },
            error => error.into(),
        }
    }

    /// What the guest is like.
    pub fn guest_state(&self) -> GuestState {
        match self {
            Self::Refused { .. } => GuestState::AsBefore,
            Self::Guest(error) => error.guest_state().into(),
        }
    }

    /// Why it failed.
    pub fn reason(&self) -> Reason {
        match self {
            Self::Refused { .. } => Reason::Refused,
            Self::Guest(error) => reason_of(error),
        }
    }
}

fn reason_of(error: &guest::PatchError<HostError>) -> Reason {
    use guest::PatchError::*;
    match error {
        Afterwards { source } | InTransition { source, .. } | OnlyAtOnce { source, .. } => reason_of(source),
        Vmm(error) => error.reason(),
        Kernel(_) | Registry(_) | Refused { .. } | Revert { .. } | Recovery(_) | Transition { .. } | Guard(_) => {
            Reason::Refused
        }
        Commit { source, .. } => match **source {
            CommitError::NotSafe { .. } => Reason::NotSafe,
            ref error if will_not(error) => Reason::Refused,
            _ => Reason::Failed,
        },
        RolledBack { .. } | NotResumed { .. } => Reason::Failed,
    }
}

/// True where the hypervisor would refuse it again, works on the guest's memory, or has a guest that is not to be paused.
fn will_not(error: &CommitError) -> bool {
    matches!(
        ReachError::meaning_in(error),
        Some(Meaning::Permanent | Meaning::Busy | Meaning::NotRunning)
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use guest_core::machine::MachineError;
    use guest_core::plan::RevertError;
    use guest_core::transaction::Operation;

    #[test]
    fn a_guest_that_its_hypervisor_works_on_at_the_pause_is_refused_as_before_it() {
        for (meaning, reason) in [
            (Meaning::Busy, Reason::Refused),
            (Meaning::NotRunning, Reason::Refused),
            (Meaning::Permanent, Reason::Refused),
            (Meaning::MayPass, Reason::Failed),
        ] {
            let error = ReachError::new(meaning, "it is not to be paused");
            let error = PatchError::Guest(guest::PatchError::Commit {
                operation: Operation::Apply,
                id: "fix".to_owned(),
                source: Box::new(MachineError::new("pausing the guest", error).into()),
            });
            assert_eq!(
                (error.reason(), error.guest_state()),
                (reason, GuestState::AsBefore),
                "{meaning:?}"
            );
        }
    }

    #[test]
    fn an_error_names_the_step_and_the_thing_that_failed() {
        let io = || io::Error::from(io::ErrorKind::StorageFull);
        let unknown = RevertError::Unknown {
            id: "fix".to_owned(),
            applied: Vec::new(),
        };
        let revert = guest::PatchError::Revert {
            id: "fix".to_owned(),
            source: unknown,
        };
        let messages = [
            OpenError::Program(io()).to_string(),
            PatchError::from(HostError::Supervisor(io())).to_string(),
            PatchError::Guest(revert).to_string(),
        ];
        assert_eq!(
            messages,
            [
                "finding the program of this vmpatch",
                "starting the supervisor",
                "fix can't be reverted",
            ]
        );
    }

    #[test]
    fn a_guest_that_could_not_be_read_after_its_change_is_not_as_before() {
        let busy = guest::PatchError::Vmm(HostError::Busy(BusyError::Busy("a snapshot".to_owned())));
        let source = Box::new(busy);
        let error = PatchError::Guest(guest::PatchError::Afterwards { source });
        assert_eq!(
            (error.reason(), error.guest_state()),
            (Reason::Refused, GuestState::InForce)
        );
    }

    #[test]
    fn the_file_of_a_module_that_does_not_fit_is_named() {
        let error = guest::PatchError::Refused {
            name: "fix".to_owned(),
            source: Box::new(Refusal::NoModules),
        };
        let error = PatchError::of(Path::new("/tmp/fix.ko"))(error);
        assert_eq!(error.to_string(), "/tmp/fix.ko does not fit the guest");
    }
}
