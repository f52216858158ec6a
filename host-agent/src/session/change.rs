//! Changes of a guest, as the core's engine says: the clock, and what vmpatch's own failures mean to the engine.

use super::{PatchError, Session};
use crate::chain::chain;
use guest_core::commit::{CommitError, CommitOptions, Committed, NotSafe};
use guest_core::plan::{self, Plan};
use guest_core::registry::{Entry, Record, State};
use guest_core::transaction::{
    Classify, Clock, Driver, End, Ended, Engine, FailureKind, LeftInGuest, Operation, Transient, drive,
};
use std::time::{Duration, Instant};

/// What is recovered, in messages: only what is found tells which patch it is of.
const CUT_OFF: &str = "what was cut off";

/// Plans, where need be more than once, and changes nothing. `id` is the patch, for messages.
pub(super) fn plan(
    operation: Operation,
    id: &str,
    timeout: Duration,
    plan: impl FnMut() -> Result<Plan, PatchError>,
) -> Result<Plan, PatchError> {
    let clock = SinceStart(Instant::now());
    let planned = drive(&mut Engine::new(operation, timeout), &mut Planning(plan), &clock);
    planned.map_err(|ended| failure_of(ended, operation, id, clock.elapsed()))
}

/// Plans and commits; plans anew where the guest is not any more as it was planned for, and recovers where taking back failed.
pub(super) fn carry_out(
    session: &mut Session,
    operation: Operation,
    id: &str,
    options: CommitOptions,
    mut plan: impl FnMut(&Session) -> Result<Plan, PatchError>,
) -> Result<(Record, Committed), PatchError> {
    let commit = &mut |session: &mut Session, plan: Plan, timeout| {
        let committed = session.commit(&plan, operation, CommitOptions { timeout, ..options })?;
        Ok((plan.record, committed))
    };
    run(session, operation, id, options.timeout, &mut plan, commit)
}

/// Takes back whatever was cut off; of a revert the rest is done.
pub(super) fn recover(session: &mut Session, options: CommitOptions) -> Result<(), PatchError> {
    let operation = Operation::Recover;
    let plan = &mut |session: &Session| Ok(plan::recovery(&session.live(), &session.registry)?);
    let commit = &mut |session: &mut Session, plan: Option<Plan>, timeout| match plan {
        Some(plan) => session
            .commit(&plan, operation, CommitOptions { timeout, ..options })
            .map(|_| true),
        None => Ok(false),
    };
    while run(session, operation, CUT_OFF, options.timeout, plan, commit)? {}
    Ok(())
}

/// Makes a plan of the guest as it is now.
type PlanWith<'a, P> = &'a mut dyn FnMut(&Session) -> Result<P, PatchError>;
/// Carries a plan out, within that time.
type CommitWith<'a, P, D> = &'a mut dyn FnMut(&mut Session, P, Duration) -> Result<D, PatchError>;

fn run<P, D>(
    session: &mut Session,
    operation: Operation,
    id: &str,
    timeout: Duration,
    plan: PlanWith<'_, P>,
    commit: CommitWith<'_, P, D>,
) -> Result<D, PatchError> {
    let clock = SinceStart(Instant::now());
    let mut changing = Changing {
        session,
        plan,
        commit,
        half_done: None,
    };
    let done = drive(&mut Engine::new(operation, timeout), &mut changing, &clock);
    let half_done = changing.half_done;
    done.map_err(|ended| {
        let failure = failure_of(ended, operation, id, clock.elapsed());
        match half_done {
            Some(half_done) => half_done.followed_by(failure, operation),
            None => failure,
        }
    })
}

/// A commit that was left half done.
struct HalfDone {
    /// The patch.
    id: String,
    /// What it ended with.
    said: String,
}

impl HalfDone {
    /// The failure that came after it: the guest is as this one has left it, not as before.
    fn followed_by(self, failure: PatchError, operation: Operation) -> PatchError {
        match failure {
            // These say what the guest is like.
            PatchError::NotResumed { .. } | PatchError::TakenBack { .. } => failure,
            PatchError::Commit { ref source, .. } if matches!(**source, CommitError::HalfDone { .. }) => failure,
            failure => {
                let undo = chain(&failure).join(": ");
                failed(self.id, operation, CommitError::HalfDone { first: self.said, undo })
            }
        }
    }
}

/// What a change that was not made ends with.
fn failure_of(ended: Ended<PatchError>, operation: Operation, id: &str, waited: Duration) -> PatchError {
    let Ended { end, failure } = ended;
    match (end, failure) {
        (End::GaveUp { tries }, failure) => {
            let why_text = failure.transient().unwrap_or_default();
            let source = CommitError::NotSafe {
                why: NotSafe::Changing,
                why_text,
                tries,
                waited,
            };
            failed(id.to_owned(), operation, source)
        }
        (End::Recovered, PatchError::Commit { operation, id, source }) => match *source {
            CommitError::HalfDone { first, .. } => PatchError::TakenBack { operation, id, first },
            source => failed(id, operation, source),
        },
        (_, failure) => failure,
    }
}

/// A change that was not made.
pub(super) fn failed(id: String, operation: Operation, source: CommitError) -> PatchError {
    PatchError::Commit {
        operation,
        id,
        source: Box::new(source),
    }
}

impl Classify for PatchError {
    fn kind(&self) -> FailureKind {
        match self {
            Self::Commit { source, .. } if matches!(**source, CommitError::HalfDone { .. }) => FailureKind::HalfDone,
            failure if failure.transient().is_some() => FailureKind::Transient,
            _ => FailureKind::Final,
        }
    }
}

/// The host's clock, from then on.
struct SinceStart(Instant);

impl Clock for SinceStart {
    fn elapsed(&self) -> Duration {
        self.0.elapsed()
    }

    fn sleep(&self, wait: Duration) {
        std::thread::sleep(wait);
    }
}

impl Transient for PatchError {
    fn transient(&self) -> Option<String> {
        match self {
            Self::Commit { source, .. } => source.transient(),
            Self::Refused { source, .. } => source.transient(),
            Self::Kernel(error) => error.transient(),
            Self::Revert { source, .. } => source.transient(),
            _ => None,
        }
    }
}

/// Plans and changes nothing.
struct Planning<F>(F);

impl<F: FnMut() -> Result<Plan, PatchError>> Driver for Planning<F> {
    type Plan = Plan;
    type Done = Plan;
    type Failure = PatchError;

    fn plan(&mut self) -> Result<Plan, PatchError> {
        (self.0)()
    }

    fn commit(&mut self, plan: Plan, _within: Duration) -> Result<Plan, PatchError> {
        Ok(plan)
    }

    fn recover(&mut self, _failure: &PatchError) -> Result<LeftInGuest, PatchError> {
        Ok(LeftInGuest::Unknown)
    }
}

/// Plans and commits.
struct Changing<'a, P, D> {
    session: &'a mut Session,
    plan: PlanWith<'a, P>,
    commit: CommitWith<'a, P, D>,
    /// The last commit that was left so.
    half_done: Option<HalfDone>,
}

impl<P, D> Driver for Changing<'_, P, D> {
    type Plan = P;
    type Done = D;
    type Failure = PatchError;

    fn plan(&mut self) -> Result<P, PatchError> {
        (self.plan)(self.session)
    }

    fn commit(&mut self, plan: P, within: Duration) -> Result<D, PatchError> {
        (self.commit)(self.session, plan, within)
    }

    fn recover(&mut self, failure: &PatchError) -> Result<LeftInGuest, PatchError> {
        let PatchError::Commit { id, source, .. } = failure else {
            return Ok(LeftInGuest::Unknown);
        };
        self.half_done = Some(HalfDone {
            id: id.clone(),
            said: source.to_string(),
        });
        let recovered = self.session.reread().and_then(|()| self.session.tidy());
        match recovered {
            Err(failure @ PatchError::NotResumed { .. }) => Err(failure),
            Err(_) => Ok(LeftInGuest::Unknown),
            Ok(()) => Ok(left_of(id, &self.session.registry.entries)),
        }
    }
}

/// What is in the guest of the patch `id`.
fn left_of(id: &str, entries: &[Entry]) -> LeftInGuest {
    let is_it = |entry: &&Entry| entry.state != State::Kept && entry.record().is_some_and(|record| record.id == id);
    match entries.iter().find(is_it).map(|entry| entry.state) {
        None => LeftInGuest::Nothing,
        Some(State::Applied) => LeftInGuest::Patch,
        Some(_) => LeftInGuest::Unknown,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::outcome::{GuestState, Reason};
    use crate::session::BusyError;
    use guest_core::Gpa;
    use guest_core::change::ChangeError;
    use guest_core::kernel::KernelError;
    use guest_core::machine::MachineError;

    fn changing() -> PatchError {
        let doing = "loading or unloading modules";
        PatchError::Kernel(KernelError::Changed(ChangeError::Changing {
            doing,
            gpa: Gpa(0x1000),
        }))
    }

    fn half_done() -> HalfDone {
        HalfDone {
            id: "fix".to_owned(),
            said: "writing failed".to_owned(),
        }
    }

    #[test]
    fn a_guest_that_keeps_changing_is_not_safe_and_the_message_says_what_it_does() {
        let failure = plan(Operation::Apply, "fix", Duration::ZERO, || Err(changing())).unwrap_err();
        assert_eq!(failure.reason(), Reason::NotSafe);
        let said = chain(&failure).join(": ");
        assert!(said.starts_with("applying fix: not safe within"), "{said}");
        assert!(said.ends_with("the guest keeps loading or unloading modules"), "{said}");
    }

    #[test]
    fn what_fails_after_a_half_done_commit_does_not_say_that_the_guest_is_as_before() {
        let refused = BusyError::Busy("a snapshot".to_owned()).into();
        let failure = half_done().followed_by(refused, Operation::Revert);
        assert_eq!(failure.guest_state(), GuestState::HalfPatched);
        let said = failure.to_string() + &chain(&failure).join(": ");
        assert!(said.contains("writing failed") && said.contains("a snapshot"), "{said}");
    }

    #[test]
    fn a_guest_that_stays_paused_after_a_half_done_commit_is_said_to_be_paused() {
        let source = MachineError::new("resuming the guest", "no answer").left_paused(true);
        let effect = guest_core::commit::Effect::HalfPatched;
        let source = CommitError::NotResumed {
            effect,
            first: None,
            source,
        };
        let paused = PatchError::NotResumed {
            operation: Operation::Revert,
            id: "fix".to_owned(),
            runs: false,
            change: effect,
            source: Box::new(source),
        };
        let failure = half_done().followed_by(paused, Operation::Revert);
        assert_eq!(failure.guest_state(), GuestState::Paused { change: effect });
    }
}
