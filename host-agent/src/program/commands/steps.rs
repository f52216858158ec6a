//! The patches that a command deals with one after another, until one fails.

use crate::program::failure::Failure;
use crate::program::report::Patch;
use guest_core::commit::Effect;
use host_agent::outcome::GuestState;

/// What the report says of a patch that was not tried, as an earlier one failed.
const NOT_TRIED: &str = "not tried";
/// A patch that some tasks run, while others run the old code.
pub(super) const IN_TRANSITION: &str = "in transition";

/// How the states of a patch are called that is to be dealt with.
#[derive(Debug, Clone, Copy)]
pub(super) struct Names {
    /// Where all of it was done.
    pub(super) done: &'static str,
    /// Where nothing of it was.
    pub(super) not_done: &'static str,
}

/// For `apply` and the bare command.
pub(super) const APPLY: Names = Names {
    done: "applied",
    not_done: "not applied",
};
/// For `revert`.
pub(super) const REVERT: Names = Names {
    done: "reverted",
    not_done: "not reverted",
};

impl Names {
    /// The state of a patch with which a failure has left the guest.
    pub(super) fn after(self, failure: &Failure) -> &'static str {
        match failure.guest_state() {
            GuestState::InForce
            | GuestState::Paused {
                change: Effect::InForce,
            } => self.done,
            GuestState::InTransition => IN_TRANSITION,
            GuestState::HalfPatched
            | GuestState::Paused {
                change: Effect::HalfPatched,
            } => "half applied",
            _ => self.not_done,
        }
    }
}

/// What was done, and what failed.
#[derive(Debug)]
pub(super) struct Steps {
    names: Names,
    /// The patches, in the order in which they were dealt with.
    pub(super) patches: Vec<Patch>,
    /// The first failure.
    pub(super) failure: Option<Failure>,
}

impl Steps {
    /// Nothing yet.
    pub(super) fn new(names: Names) -> Self {
        Self {
            names,
            patches: Vec::new(),
            failure: None,
        }
    }

    /// Deals with one more patch, unless an earlier one failed; `undone` is it where it is not dealt with.
    pub(super) fn step(&mut self, undone: Patch, work: impl FnOnce() -> Result<Patch, Failure>) {
        let left = |state: &str, reason| Patch {
            state: state.to_owned(),
            reason: Some(reason),
            ..undone
        };
        let patch = match (&self.failure, work) {
            (Some(_), _) => left(self.names.not_done, NOT_TRIED.to_owned()),
            (None, work) => match work() {
                Ok(patch) => patch,
                Err(failure) => {
                    let patch = left(self.names.after(&failure), failure.chain().join(": "));
                    self.failure = Some(failure.after(so_far(&self.patches)));
                    patch
                }
            },
        };
        self.patches.push(patch);
    }
}

/// What the guest is like when these patches were dealt with, and a further one was not.
pub(super) fn so_far(patches: &[Patch]) -> GuestState {
    match patches.iter().any(|patch| patch.pause.is_some()) {
        true => GuestState::PartlyDone,
        false => GuestState::AsBefore,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::program::failure::exit_code;
    use crate::program::report::Pause;
    use guest_core::commit::CommitError;
    use guest_core::transaction::Operation;
    use host_agent::session::BusyError;

    fn patch(id: &str) -> Patch {
        Patch {
            id: id.to_owned(),
            ..Patch::default()
        }
    }

    fn applied(id: &str) -> Patch {
        let pause = Pause {
            total_us: 1,
            stop_us: 0,
            registers_us: 0,
            check_us: 0,
            write_us: 0,
            resume_us: 0,
            tries: 1,
            pause_us_max: 1,
        };
        Patch {
            state: "applied".to_owned(),
            pause: Some(pause),
            ..patch(id)
        }
    }

    fn half_done() -> Failure {
        let source = CommitError::HalfDone {
            first: "a".to_owned(),
            undo: "b".to_owned(),
        };
        let error = guest_core::guest::PatchError::Commit {
            operation: Operation::Apply,
            id: "b".to_owned(),
            source: Box::new(source),
        };
        Failure::Patch(error.into())
    }

    fn states(steps: &Steps) -> Vec<&str> {
        steps.patches.iter().map(|patch| patch.state.as_str()).collect()
    }

    #[test]
    fn behind_the_first_failure_nothing_is_tried() {
        let mut steps = Steps::new(APPLY);
        steps.step(patch("a"), || Ok(applied("a")));
        steps.step(patch("b"), || {
            Err(Failure::Patch(BusyError::Busy("a snapshot".to_owned()).into()))
        });
        steps.step(patch("c"), || panic!("it is not to be tried"));
        assert_eq!(states(&steps), ["applied", "not applied", "not applied"]);
        assert_eq!(steps.patches[2].reason.as_deref(), Some("not tried"));
        let failure = steps.failure.unwrap();
        assert_eq!(
            (exit_code::of(&failure), failure.guest_state()),
            (3, GuestState::PartlyDone)
        );
    }

    #[test]
    fn a_patch_is_told_as_the_failure_has_left_it() {
        let busy = || Failure::Patch(BusyError::Busy("a snapshot".to_owned()).into());
        for (failure, state, code) in [
            (busy(), "not reverted", 3),
            (half_done(), "half applied", 6),
            (busy().after(GuestState::InForce), "reverted", 6),
        ] {
            let mut steps = Steps::new(REVERT);
            steps.step(patch("b"), || Err(failure));
            assert_eq!(states(&steps), [state]);
            assert_eq!(exit_code::of(&steps.failure.unwrap()), code);
        }
    }
}
