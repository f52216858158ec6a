//! The engine that decides, and the loop that asks it.

use super::Operation;
use std::time::Duration;

/// Fewest attempts of a change while the guest changes what the plans are made from, however short the time is.
const TRIES_MIN: u32 = 8;
/// First wait before a further attempt. It doubles.
const WAIT_FIRST: Duration = Duration::from_millis(1);
/// Longest wait. A guest takes some milliseconds to load a module.
const WAIT_MAX: Duration = Duration::from_millis(32);
/// Most recoveries of a change whose rollback failed in the pause.
const RECOVERIES_MAX: u32 = 8;

/// What happened since the engine was asked last.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// The plan or the commit failed.
    Failed(FailureKind),
    /// The recovery has ended.
    Recovered(LeftInGuest),
}

/// What the engine needs to know of a failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FailureKind {
    /// The guest was changing what the plan reads or replaces. Nothing was changed. See [`Transient`](super::Transient).
    Transient,
    /// The rollback failed in the pause: the guest may be half patched, and it runs.
    HalfDone,
    /// A further attempt would not help, or must not be made.
    Final,
}

/// What a recovery has left of the patch in the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LeftInGuest {
    /// Nothing.
    Nothing,
    /// The patch, which is in force, or half reverted.
    Patch,
    /// Unknown, perhaps a part of it: the recovery failed.
    Unknown,
}

/// What the engine decides.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Plan and commit again.
    Again {
        /// How long to wait before.
        wait: Duration,
    },
    /// Recover the half-done commit, with a commit of its own.
    Recover,
    /// End.
    End(End),
}

/// How a change ends that was not made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// The last failure ends it. If the failure is of a recovery, the guest is as the half-done commit has left it.
    Failed,
    /// The guest kept changing what the plans were made from.
    GaveUp {
        /// Number of attempts.
        tries: u32,
    },
    /// The half-done change was undone.
    Recovered,
    /// The half-done change may still be in the guest.
    HalfPatched,
}

/// Decides what to do next.
#[derive(Debug, Clone)]
pub struct Engine {
    operation: Operation,
    timeout: Duration,
    tries: u32,
    wait: Duration,
    recoveries: u32,
}

impl Engine {
    /// Starts an operation, which is tried again until `timeout` has passed.
    pub fn new(operation: Operation, timeout: Duration) -> Self {
        Self {
            operation,
            timeout,
            tries: 0,
            wait: WAIT_FIRST,
            recoveries: 0,
        }
    }

    /// The time that is left, `elapsed` after the start.
    pub fn left(&self, elapsed: Duration) -> Duration {
        self.timeout.saturating_sub(elapsed)
    }

    /// Decides what to do after `event`, `elapsed` after the start.
    pub fn next(&mut self, event: Event, elapsed: Duration) -> Action {
        match event {
            Event::Failed(FailureKind::Transient) => self.again(self.left(elapsed)),
            Event::Failed(FailureKind::HalfDone) if self.may_recover() => {
                self.recoveries += 1;
                Action::Recover
            }
            Event::Failed(_) => Action::End(End::Failed),
            // The rest of the revert must be done.
            Event::Recovered(LeftInGuest::Patch) if self.operation == Operation::Revert => {
                Action::Again { wait: Duration::ZERO }
            }
            Event::Recovered(LeftInGuest::Nothing) => Action::End(End::Recovered),
            Event::Recovered(_) => Action::End(End::HalfPatched),
        }
    }

    /// True where a recovery may be tried. A failed recovery is left to the next vmpatch, and so is a removal, which is a part of each.
    fn may_recover(&self) -> bool {
        let is_part_of_recovery = matches!(self.operation, Operation::Recover | Operation::Discard);
        !is_part_of_recovery && self.recoveries < RECOVERIES_MAX
    }

    fn again(&mut self, left: Duration) -> Action {
        self.tries += 1;
        if self.tries >= TRIES_MIN && self.wait > left {
            return Action::End(End::GaveUp { tries: self.tries });
        }
        let wait = self.wait.min(left);
        self.wait = (self.wait * 2).min(WAIT_MAX);
        Action::Again { wait }
    }
}

/// Plans, commits and recovers, as the engine decides.
pub trait Driver {
    /// The plan of a change.
    type Plan;
    /// The result of a commit.
    type Done;
    /// The failures of all three.
    type Failure: Classify;

    /// Plans the change for the guest as it is now.
    ///
    /// # Errors
    ///
    /// There is no plan.
    fn plan(&mut self) -> Result<Self::Plan, Self::Failure>;

    /// Commits a plan. `within` is the time for finding a safe moment.
    ///
    /// # Errors
    ///
    /// The plan was not committed, or only a part of it.
    fn commit(&mut self, plan: Self::Plan, within: Duration) -> Result<Self::Done, Self::Failure>;

    /// Recovers a commit that ended with `failure` and is half done.
    ///
    /// # Errors
    ///
    /// A failure after which the guest must not be changed any more.
    fn recover(&mut self, failure: &Self::Failure) -> Result<LeftInGuest, Self::Failure>;
}

/// A failure that the engine understands.
pub trait Classify {
    /// The kind of the failure.
    fn kind(&self) -> FailureKind;
}

/// The clock that the loop waits by.
pub trait Clock {
    /// Time since the start of the change.
    fn elapsed(&self) -> Duration;

    /// Waits for that time.
    fn sleep(&self, wait: Duration);
}

/// A change that was not made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ended<F> {
    /// How the change ended.
    pub end: End,
    /// The last failure.
    pub failure: F,
}

/// Plans, commits and recovers until `engine` ends it.
///
/// # Errors
///
/// The change was not made.
pub fn drive<D: Driver>(engine: &mut Engine, driver: &mut D, clock: &dyn Clock) -> Result<D::Done, Ended<D::Failure>> {
    loop {
        let planned = driver.plan();
        let within = engine.left(clock.elapsed());
        let failure = match planned.and_then(|plan| driver.commit(plan, within)) {
            Ok(done) => return Ok(done),
            Err(failure) => failure,
        };
        let failed = Event::Failed(failure.kind());
        let mut action = engine.next(failed, clock.elapsed());
        if action == Action::Recover {
            let end = End::Failed;
            let left = driver.recover(&failure).map_err(|failure| Ended { end, failure })?;
            action = engine.next(Event::Recovered(left), clock.elapsed());
        }
        match action {
            Action::Again { wait } => clock.sleep(wait),
            Action::Recover => {
                return Err(Ended {
                    end: End::HalfPatched,
                    failure,
                });
            }
            Action::End(end) => return Err(Ended { end, failure }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use FailureKind::{Final, HalfDone, Transient};
    use std::cell::Cell;
    use std::rc::Rc;

    const TIMEOUT: Duration = Duration::from_millis(200);

    /// A driver with scripted results. The last one of a list is repeated.
    struct Script {
        plans: Vec<Result<(), FailureKind>>,
        commits: Vec<Result<(), FailureKind>>,
        recoveries: Vec<Result<LeftInGuest, FailureKind>>,
        clock: Rc<Cell<Duration>>,
        done: Vec<&'static str>,
    }

    impl Script {
        fn new(plans: &[Result<(), FailureKind>], commits: &[Result<(), FailureKind>]) -> Self {
            Self {
                plans: plans.to_vec(),
                commits: commits.to_vec(),
                recoveries: Vec::new(),
                clock: Rc::default(),
                done: Vec::new(),
            }
        }

        fn recovering(self, recovered: Result<LeftInGuest, FailureKind>) -> Self {
            let recoveries = vec![recovered];
            Self { recoveries, ..self }
        }

        fn run(&mut self, operation: Operation, timeout: Duration) -> Result<(), Ended<FailureKind>> {
            let clock = Rc::clone(&self.clock);
            drive(&mut Engine::new(operation, timeout), self, &clock)
        }
    }

    fn next<T: Copy>(script: &mut Vec<T>) -> T {
        match script.len() {
            0 => panic!("the script has no such step"),
            1 => script[0],
            _ => script.remove(0),
        }
    }

    impl Driver for Script {
        type Plan = ();
        type Done = ();
        type Failure = FailureKind;

        fn plan(&mut self) -> Result<(), FailureKind> {
            self.done.push("plan");
            self.clock.sleep(Duration::from_millis(1));
            next(&mut self.plans)
        }

        fn commit(&mut self, (): (), _within: Duration) -> Result<(), FailureKind> {
            self.done.push("commit");
            next(&mut self.commits)
        }

        fn recover(&mut self, _failure: &FailureKind) -> Result<LeftInGuest, FailureKind> {
            self.done.push("recover");
            next(&mut self.recoveries)
        }
    }

    impl Classify for FailureKind {
        fn kind(&self) -> FailureKind {
            *self
        }
    }

    impl Clock for Rc<Cell<Duration>> {
        fn elapsed(&self) -> Duration {
            self.get()
        }

        fn sleep(&self, wait: Duration) {
            self.set(self.get() + wait);
        }
    }

    fn ended(end: End, failure: FailureKind) -> Result<(), Ended<FailureKind>> {
        Err(Ended { end, failure })
    }

    #[test]
    fn a_change_is_planned_and_committed_once() {
        let mut script = Script::new(&[Ok(())], &[Ok(())]);
        script.run(Operation::Apply, TIMEOUT).unwrap();
        assert_eq!(script.done, ["plan", "commit"]);
    }

    #[test]
    fn a_change_is_planned_again_after_a_transient_failure() {
        let mut script = Script::new(&[Err(Transient), Ok(())], &[Err(Transient), Ok(())]);
        script.run(Operation::Revert, TIMEOUT).unwrap();
        assert_eq!(script.done, ["plan", "plan", "commit", "plan", "commit"]);
    }

    #[test]
    fn a_guest_that_keeps_changing_is_given_up_after_the_timeout() {
        let mut script = Script::new(&[Err(Transient)], &[]);
        let result = script.run(Operation::Apply, TIMEOUT);
        let tries = u32::try_from(script.done.len()).unwrap();
        assert_eq!(result, ended(End::GaveUp { tries }, Transient));
        assert!(tries > TRIES_MIN, "{tries}");
        assert!(
            (TIMEOUT - WAIT_MAX..TIMEOUT + WAIT_MAX).contains(&script.clock.get()),
            "{:?}",
            script.clock
        );
    }

    #[test]
    fn without_time_a_few_attempts_are_made() {
        let mut script = Script::new(&[Err(Transient)], &[]);
        let gave_up = ended(End::GaveUp { tries: TRIES_MIN }, Transient);
        assert_eq!(script.run(Operation::Apply, Duration::ZERO), gave_up);
    }

    #[test]
    fn a_final_failure_ends_the_change_at_each_step() {
        for (plan, commit, done) in [
            (Err(Final), Ok(()), &["plan"][..]),
            (Ok(()), Err(Final), &["plan", "commit"]),
        ] {
            let mut script = Script::new(&[plan], &[commit]);
            assert_eq!(script.run(Operation::Apply, TIMEOUT), ended(End::Failed, Final));
            assert_eq!(script.done, done);
        }
    }

    #[test]
    fn a_half_done_apply_is_recovered_and_not_tried_again() {
        for (left, end) in [
            (LeftInGuest::Nothing, End::Recovered),
            (LeftInGuest::Patch, End::HalfPatched),
            (LeftInGuest::Unknown, End::HalfPatched),
        ] {
            let mut script = Script::new(&[Ok(())], &[Err(HalfDone)]).recovering(Ok(left));
            assert_eq!(script.run(Operation::Apply, TIMEOUT), ended(end, HalfDone));
            assert_eq!(script.done, ["plan", "commit", "recover"]);
        }
    }

    #[test]
    fn a_half_done_revert_is_finished() {
        let commits = [Err(HalfDone), Ok(())];
        let mut script = Script::new(&[Ok(())], &commits).recovering(Ok(LeftInGuest::Patch));
        script.run(Operation::Revert, TIMEOUT).unwrap();
        assert_eq!(script.done, ["plan", "commit", "recover", "plan", "commit"]);
    }

    #[test]
    fn a_revert_that_stays_half_done_ends() {
        let mut script = Script::new(&[Ok(())], &[Err(HalfDone)]).recovering(Ok(LeftInGuest::Patch));
        assert_eq!(script.run(Operation::Revert, TIMEOUT), ended(End::Failed, HalfDone));
        let recoveries = script.done.iter().filter(|done| **done == "recover").count();
        assert_eq!(u32::try_from(recoveries).unwrap(), RECOVERIES_MAX);
    }

    #[test]
    fn a_failed_recovery_is_not_recovered() {
        let mut script = Script::new(&[Ok(())], &[Err(HalfDone)]);
        assert_eq!(script.run(Operation::Recover, TIMEOUT), ended(End::Failed, HalfDone));
        assert_eq!(script.done, ["plan", "commit"]);
    }

    #[test]
    fn a_guest_that_a_recovery_has_left_paused_is_not_changed_any_more() {
        let mut script = Script::new(&[Ok(())], &[Err(HalfDone)]).recovering(Err(Final));
        assert_eq!(script.run(Operation::Revert, TIMEOUT), ended(End::Failed, Final));
        assert_eq!(script.done, ["plan", "commit", "recover"]);
    }
}
