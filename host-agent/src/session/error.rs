//! Why a guest was not opened, or not patched.

use crate::hypervisor::{Meaning, ReachError, Route};
use crate::lock::LockError;
use crate::outcome::{GuestState, Reason};
use guest_core::commit::{CommitError, Effect};
use guest_core::kernel::KernelError;
use guest_core::kernel::guard::Armed;
use guest_core::plan::{Refusal, RevertError};
use guest_core::registry::RegistryError;
use guest_core::transaction::Operation;
use std::io;
use std::path::PathBuf;

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
    /// The VM can't be reached, or its memory.
    #[error("reaching the guest")]
    Reach(#[from] ReachError),
    /// The kernel is not understood.
    #[error("understanding the guest's kernel")]
    Kernel(#[from] KernelError),
    /// The registry is not understood.
    #[error("understanding the guest's patches")]
    Registry(#[from] RegistryError),
    /// The program to start the supervisor from was not found.
    #[error("finding the program of this vmpatch")]
    Program(#[source] io::Error),
}

impl OpenError {
    /// Why it was not opened.
    pub fn reason(&self) -> Reason {
        match self {
            Self::Lock(_) | Self::OtherProcess { .. } => Reason::Unreachable,
            Self::Reach(error) => reached(error),
            Self::Kernel(_) | Self::Registry(_) => Reason::Refused,
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
    #[error("QEMU is busy with {0}: changes from outside would be lost")]
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

/// Why a patch was not applied, reverted or recovered.
#[derive(Debug, thiserror::Error)]
pub enum PatchError {
    /// The guest can't be changed now.
    #[error(transparent)]
    Busy(#[from] BusyError),
    /// The guest was opened only to be read.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// The VM can't be reached any more.
    #[error("reaching the guest")]
    Reach(#[from] ReachError),
    /// The kernel is not understood.
    #[error("understanding the guest's kernel")]
    Kernel(#[from] KernelError),
    /// The registry is not understood.
    #[error("understanding the guest's patches")]
    Registry(#[from] RegistryError),
    /// A module does not fit.
    #[error("{path} does not fit the guest")]
    Refused {
        /// The module.
        path: PathBuf,
        /// Why.
        source: Box<Refusal>,
    },
    /// A patch can't be reverted.
    #[error("{id} can't be reverted")]
    Revert {
        /// The patch.
        id: String,
        /// Why.
        source: RevertError,
    },
    /// What is left of a patch can't be wiped: the guest's integrity guard would stop the guest, or may.
    #[error("wiping what is left of reverted patches")]
    Guard(#[from] Armed),
    /// The supervisor can't be started.
    #[error("starting the supervisor")]
    Supervisor(#[source] io::Error),
    /// A change was not made.
    #[error("{operation} {id}")]
    Commit {
        /// What was to be done.
        operation: Operation,
        /// The patch.
        id: String,
        /// Why.
        source: Box<CommitError>,
    },
    /// A change was not made; taking it back failed in its pause, and was done by a commit of its own.
    #[error("{operation} {id}: {first}; what had been written was taken back")]
    TakenBack {
        /// What was to be done.
        operation: Operation,
        /// The patch.
        id: String,
        /// What failed.
        first: String,
    },
    /// The guest did not run again after the pause of a change; the supervisor was to resume it.
    #[error("{operation} {id}: {}", by_supervisor(*runs, *change))]
    NotResumed {
        /// What was to be done.
        operation: Operation,
        /// The patch.
        id: String,
        /// Whether the supervisor has resumed it.
        runs: bool,
        /// How much of the patch's change is in the guest.
        change: Effect,
        /// Why.
        source: Box<CommitError>,
    },
    /// The change was made, and what came afterwards failed.
    #[error("{source}")]
    Afterwards {
        /// What failed.
        source: Box<PatchError>,
    },
}

fn by_supervisor(runs: bool, change: Effect) -> String {
    match runs {
        true => format!("the supervisor had to resume the guest, which runs; the change is {change}"),
        false => "the guest was not seen to run again".to_owned(),
    }
}

impl PatchError {
    /// That the patch `id` can't be reverted.
    pub(super) fn revert(id: &str) -> impl FnOnce(RevertError) -> Self {
        let id = id.to_owned();
        move |source| Self::Revert { id, source }
    }

    /// This error, where the change itself was made before.
    pub(super) fn afterwards(self) -> Self {
        let source = Box::new(self);
        Self::Afterwards { source }
    }

    /// What the guest is like.
    pub fn guest_state(&self) -> GuestState {
        match self {
            Self::Afterwards { source } => source.guest_state().or(GuestState::InForce),
            Self::Commit { source, .. } => source.effect().into(),
            Self::NotResumed { runs: true, change, .. } => (*change).into(),
            Self::NotResumed { change, .. } => GuestState::Paused { change: *change },
            _ => GuestState::AsBefore,
        }
    }

    /// Why it failed.
    pub fn reason(&self) -> Reason {
        match self {
            Self::Afterwards { source } => source.reason(),
            Self::Busy(error) => error.reason(),
            Self::Lock(_) => Reason::Unreachable,
            Self::Reach(error) => reached(error),
            Self::Kernel(_) | Self::Registry(_) | Self::Refused { .. } | Self::Revert { .. } | Self::Guard(_) => {
                Reason::Refused
            }
            Self::Commit { source, .. } => match **source {
                CommitError::NotSafe { .. } => Reason::NotSafe,
                ref error if will_not(error) => Reason::Refused,
                _ => Reason::Failed,
            },
            Self::Supervisor(_) | Self::TakenBack { .. } | Self::NotResumed { .. } => Reason::Failed,
        }
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

    #[test]
    fn a_guest_that_its_hypervisor_works_on_at_the_pause_is_refused_as_before_it() {
        for (meaning, reason) in [
            (Meaning::Busy, Reason::Refused),
            (Meaning::NotRunning, Reason::Refused),
            (Meaning::Permanent, Reason::Refused),
            (Meaning::MayPass, Reason::Failed),
        ] {
            let error = ReachError::new(meaning, "it is not to be paused");
            let error = PatchError::Commit {
                operation: Operation::Apply,
                id: "fix".to_owned(),
                source: Box::new(MachineError::new("pausing the guest", error).into()),
            };
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
        let messages = [
            OpenError::Program(io()).to_string(),
            PatchError::Supervisor(io()).to_string(),
            PatchError::revert("fix")(unknown).to_string(),
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
        let error = PatchError::Busy(BusyError::Busy("a snapshot".to_owned())).afterwards();
        assert_eq!(
            (error.reason(), error.guest_state()),
            (Reason::Refused, GuestState::InForce)
        );
    }
}
