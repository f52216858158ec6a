//! Why a guest was not opened or not changed, and what it is like then.

use crate::commit::{CommitError, Effect};
use crate::kernel::KernelError;
use crate::kernel::guard::Armed;
use crate::kernel::patch_state::Mark;
use crate::plan::{NoTransition, RecoveryError, Refusal, RevertError, TransitionError};
use crate::registry::RegistryError;
use crate::transaction::{Classify, FailureKind, Operation, Transient};

/// Why a guest was not opened. Nothing of it was changed. `E` is the VMM's error.
#[derive(Debug, thiserror::Error)]
pub enum OpenError<E> {
    /// The VMM did not give the registers.
    #[error(transparent)]
    Vmm(E),
    /// The kernel is not understood.
    #[error("understanding the guest's kernel")]
    Kernel(#[from] KernelError),
    /// The registry is not understood.
    #[error("understanding the guest's patches")]
    Registry(#[from] RegistryError),
}

/// What a guest is like after an operation that failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GuestState {
    /// As it was when the operation began.
    AsBefore,
    /// All that the operation was to change is changed.
    InForce,
    /// The change is in force for some tasks, and not for others; no task sees a part of it.
    InTransition,
    /// Some of the change may be in force.
    HalfPatched,
    /// It was paused, and is not known to run again.
    Paused {
        /// How much of the change is in it.
        change: Effect,
    },
}

impl From<Effect> for GuestState {
    fn from(effect: Effect) -> Self {
        match effect {
            Effect::AsBefore => Self::AsBefore,
            Effect::InForce => Self::InForce,
            Effect::HalfPatched => Self::HalfPatched,
        }
    }
}

/// Why a patch was not applied, reverted or recovered. [`PatchError::guest_state`] tells what the guest is like. `E` is the VMM's error.
#[derive(Debug, thiserror::Error)]
pub enum PatchError<E: 'static> {
    /// The VMM does not permit a change now, or did not do what a change needs.
    #[error(transparent)]
    Vmm(E),
    /// The kernel is not understood.
    #[error("understanding the guest's kernel")]
    Kernel(#[from] KernelError),
    /// The registry is not understood.
    #[error("understanding the guest's patches")]
    Registry(#[from] RegistryError),
    /// A module does not fit.
    #[error("{name} does not fit the guest")]
    Refused {
        /// Its name, as the caller gave it.
        name: String,
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
    /// A transition can't end.
    #[error("the transition of {id} can't end")]
    Transition {
        /// The patch.
        id: String,
        /// Why.
        source: TransitionError,
    },
    /// The patch is in transition: marked tasks still run the code that they were in, all others the other one.
    #[error("{id} is in transition: some tasks still run the {mark} code")]
    InTransition {
        /// The patch.
        id: String,
        /// What they run: the old code in an apply, the new code in a revert.
        mark: Mark,
        /// Why it has not ended.
        source: Box<Self>,
    },
    /// The patch was not applied or reverted, and could only be at one instant.
    #[error("this can only be done at one instant ({why})")]
    OnlyAtOnce {
        /// Why it can't be in transition.
        why: NoTransition,
        /// Why it was not done.
        source: Box<Self>,
    },
    /// A patch whose commit was cut off can't be taken out of force.
    #[error(transparent)]
    Recovery(#[from] RecoveryError),
    /// What is left of a patch can't be wiped: the guest's integrity guard would stop the guest, or may.
    #[error("wiping what is left of reverted patches")]
    Guard(#[from] Armed),
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
    /// A change was not made. Its rollback failed in the pause, and was done by a commit of its own.
    #[error("{operation} {id}: {first}; what had been written was taken back")]
    RolledBack {
        /// What was to be done.
        operation: Operation,
        /// The patch.
        id: String,
        /// What failed.
        first: String,
    },
    /// The guest did not run again after the pause of a change. The supervisor was to resume it.
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
        source: Box<Self>,
    },
}

fn by_supervisor(runs: bool, change: Effect) -> String {
    match runs {
        true => format!("the supervisor had to resume the guest, which runs; the change is {change}"),
        false => "the guest was not seen to run again".to_owned(),
    }
}

impl<E: 'static> PatchError<E> {
    /// That the patch `id` can't be reverted.
    pub(super) fn revert(id: &str) -> impl FnOnce(RevertError) -> Self {
        let id = id.to_owned();
        move |source| Self::Revert { id, source }
    }

    /// That the transition of the patch `id` can't end.
    pub(super) fn transition(id: &str) -> impl FnOnce(TransitionError) -> Self {
        let id = id.to_owned();
        move |source| Self::Transition { id, source }
    }

    /// That a change was not made.
    pub(super) fn commit(id: String, operation: Operation, source: CommitError) -> Self {
        let source = Box::new(source);
        Self::Commit { operation, id, source }
    }

    /// That the guest did not run again after a commit. `resumed` is what the supervisor that resumed it says of the commit.
    pub(super) fn not_resumed(id: String, operation: Operation, resumed: Option<Effect>, source: CommitError) -> Self {
        let change = match resumed.unwrap_or_else(|| source.effect()) {
            // A recovery that is in force has undone the patch's change.
            Effect::InForce if operation == Operation::Recover => Effect::AsBefore,
            Effect::AsBefore if operation == Operation::Recover => Effect::HalfPatched,
            // Nothing leads to what is removed.
            Effect::InForce if operation == Operation::Discard => Effect::AsBefore,
            effect => effect,
        };
        Self::NotResumed {
            operation,
            id,
            runs: resumed.is_some(),
            change,
            source: Box::new(source),
        }
    }

    /// This error, where the change itself was made before.
    pub(super) fn afterwards(self) -> Self {
        let source = Box::new(self);
        Self::Afterwards { source }
    }

    /// What the guest is like.
    pub fn guest_state(&self) -> GuestState {
        match self {
            Self::Afterwards { source } => match source.guest_state() {
                GuestState::AsBefore => GuestState::InForce,
                GuestState::Paused {
                    change: Effect::AsBefore,
                } => GuestState::Paused {
                    change: Effect::InForce,
                },
                worse => worse,
            },
            Self::InTransition { source, .. } => match source.guest_state() {
                GuestState::AsBefore => GuestState::InTransition,
                worse => worse,
            },
            Self::OnlyAtOnce { source, .. } => source.guest_state(),
            Self::Commit { source, .. } => source.effect().into(),
            Self::NotResumed { runs: true, change, .. } => (*change).into(),
            Self::NotResumed { change, .. } => GuestState::Paused { change: *change },
            Self::Vmm(_)
            | Self::Kernel(_)
            | Self::Registry(_)
            | Self::Refused { .. }
            | Self::Revert { .. }
            | Self::Recovery(_)
            | Self::Transition { .. }
            | Self::Guard(_)
            | Self::RolledBack { .. } => GuestState::AsBefore,
        }
    }
}

impl<E: 'static> Transient for PatchError<E> {
    fn transient(&self) -> Option<String> {
        match self {
            Self::Commit { source, .. } => source.transient(),
            Self::Refused { source, .. } => source.transient(),
            Self::Kernel(error) => error.transient(),
            Self::Revert { source, .. } => source.transient(),
            Self::Recovery(error) => error.source.transient(),
            Self::Transition { source, .. } => source.transient(),
            _ => None,
        }
    }
}

impl<E: 'static> Classify for PatchError<E> {
    fn kind(&self) -> FailureKind {
        match self {
            Self::Commit { source, .. } if matches!(**source, CommitError::HalfDone { .. }) => FailureKind::HalfDone,
            failure if failure.transient().is_some() => FailureKind::Transient,
            _ => FailureKind::Final,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::MachineError;

    fn not_resumed(operation: Operation, resumed: Option<Effect>) -> PatchError<MachineError> {
        let source = CommitError::NotResumed {
            effect: Effect::InForce,
            first: None,
            source: MachineError::new("resuming the guest", "no answer").left_paused(true),
        };
        PatchError::not_resumed("fix".to_owned(), operation, resumed, source)
    }

    #[test]
    fn a_guest_that_could_not_be_read_after_its_change_is_not_as_before() {
        let busy = PatchError::Vmm(MachineError::new("asking for migrations", "one is under way"));
        assert_eq!(busy.guest_state(), GuestState::AsBefore);
        assert_eq!(busy.afterwards().guest_state(), GuestState::InForce);
    }

    #[test]
    fn a_guest_that_the_supervisor_did_not_resume_is_paused() {
        let change = Effect::InForce;
        assert_eq!(
            not_resumed(Operation::Apply, None).guest_state(),
            GuestState::Paused { change }
        );
        let resumed = not_resumed(Operation::Apply, Some(Effect::AsBefore));
        assert_eq!(resumed.guest_state(), GuestState::AsBefore);
    }

    #[test]
    fn a_recovery_that_is_in_force_has_undone_the_change_and_one_that_is_not_has_not() {
        for (resumed, state) in [
            (Effect::InForce, GuestState::AsBefore),
            (Effect::AsBefore, GuestState::HalfPatched),
        ] {
            assert_eq!(not_resumed(Operation::Recover, Some(resumed)).guest_state(), state);
        }
    }
}
