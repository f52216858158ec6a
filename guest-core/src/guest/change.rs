//! Changes of a guest as the engine decides: what the failures of an operation mean to it, and the clock.

use super::{Guest, PatchError, Vmm};
use crate::commit::{CommitError, CommitOptions, Committed, NotSafe};
use crate::plan::{self, Plan};
use crate::registry::{Entry, Record, SLOTS, State};
use crate::text::chain;
use crate::transaction::{Clock, Driver, End, Ended, Engine, LeftInGuest, Operation, Transient, drive};
use std::error::Error;
use std::time::{Duration, Instant};

/// What a recovery is of, in messages: only a plan tells which patch it is.
const CUT_OFF: &str = "what was cut off";
/// The same for a removal.
const REPLACED: &str = "a patch that was replaced";
/// The same for marks.
const MARKS: &str = "tasks of a transition that was cut off";

/// Plans, more than once if need be, and changes nothing. `id` is the patch, for messages.
pub(super) fn plan<E: Error + 'static>(
    operation: Operation,
    id: &str,
    timeout: Duration,
    plan: impl FnMut() -> Result<Plan, PatchError<E>>,
) -> Result<Plan, PatchError<E>> {
    let clock = SinceStart(Instant::now());
    let planned = drive(&mut Engine::new(operation, timeout), &mut Planning(plan), &clock);
    planned.map_err(|ended| failure_of(ended, operation, id, clock.elapsed()))
}

/// Makes a plan of the guest as it is now.
type PlanWith<'a, V, P> = &'a mut dyn FnMut(&Guest<V>) -> Result<P, PatchError<<V as Vmm>::Error>>;
/// Commits a plan, within that time.
type CommitWith<'a, V, P, D> =
    &'a mut dyn FnMut(&mut Guest<V>, P, Duration) -> Result<D, PatchError<<V as Vmm>::Error>>;

/// Plans and commits; plans anew where the guest has changed since, and recovers where a rollback failed.
pub(super) fn run<V: Vmm, P, D>(
    guest: &mut Guest<V>,
    operation: Operation,
    id: &str,
    timeout: Duration,
    plan: PlanWith<'_, V, P>,
    commit: CommitWith<'_, V, P, D>,
) -> Result<D, PatchError<V::Error>> {
    let clock = SinceStart(Instant::now());
    let mut changing = Changing {
        guest,
        operation,
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

/// Recovers each patch whose commit was cut off: takes it out of force. Gives their records.
pub(super) fn recover<V: Vmm>(
    guest: &mut Guest<V>,
    options: CommitOptions,
) -> Result<Vec<Record>, PatchError<V::Error>> {
    let plan = &mut |guest: &Guest<V>| plan::recovery(&guest.live(), &guest.registry).map_err(PatchError::from);
    let mut removed = Vec::new();
    // Each patch once: a guest that writes the registry meanwhile does not keep vmpatch here.
    for _ in 0..SLOTS {
        match commit_some(guest, Operation::Recover, CUT_OFF, options, plan)? {
            // The begin of a revert was completed.
            Some((record, _)) if guest.is_being_reverted(&record.id) => {}
            Some((record, _)) => removed.push(record),
            None => break,
        }
    }
    Ok(removed)
}

/// Commits a plan where there is one to be made, and gives its patch.
fn commit_some<V: Vmm>(
    guest: &mut Guest<V>,
    operation: Operation,
    id: &str,
    options: CommitOptions,
    plan: PlanWith<'_, V, Option<Plan>>,
) -> Result<Option<(Record, Committed)>, PatchError<V::Error>> {
    let commit = &mut |guest: &mut Guest<V>, plan: Option<Plan>, timeout| {
        let options = CommitOptions { timeout, ..options };
        let Some(plan) = plan else { return Ok(None) };
        let committed = guest.commit(&plan, operation, options)?;
        Ok(Some((plan.record, committed)))
    };
    run(guest, operation, id, options.timeout, plan, commit)
}

/// Removes a patch that another one has replaced, where there is one.
pub(super) fn discard<V: Vmm>(
    guest: &mut Guest<V>,
    options: CommitOptions,
) -> Result<Option<Committed>, PatchError<V::Error>> {
    let plan =
        &mut |guest: &Guest<V>| plan::discard(&guest.live(), &guest.registry).map_err(PatchError::revert(REPLACED));
    let removed = commit_some(guest, Operation::Discard, REPLACED, options, plan)?;
    Ok(removed.map(|(_, committed)| committed))
}

/// Ends the transition of the patch `id`, where it is under way.
pub(super) fn finish<V: Vmm>(
    guest: &mut Guest<V>,
    id: &str,
    options: CommitOptions,
) -> Result<Option<(Record, Committed)>, PatchError<V::Error>> {
    let plan = &mut |guest: &Guest<V>| plan::finish(&guest.live(), &guest.registry).map_err(PatchError::transition(id));
    commit_some(guest, Operation::Finish, id, options, plan)
}

/// Takes away the marks that a transition has left which has ended otherwise.
pub(super) fn unmark<V: Vmm>(guest: &mut Guest<V>, options: CommitOptions) -> Result<(), PatchError<V::Error>> {
    let plan =
        &mut |guest: &Guest<V>| plan::unmark(&guest.live(), &guest.registry).map_err(PatchError::transition(MARKS));
    commit_some(guest, Operation::Recover, MARKS, options, plan).map(drop)
}

/// A commit that was left half done.
struct HalfDone {
    /// The patch.
    id: String,
    /// The commit's failure.
    said: String,
}

impl HalfDone {
    /// The failure that came after it: the guest is as this commit has left it, not as before.
    fn followed_by<E: Error + 'static>(self, failure: PatchError<E>, operation: Operation) -> PatchError<E> {
        match failure {
            // These say what the guest is like.
            PatchError::NotResumed { .. } | PatchError::RolledBack { .. } => failure,
            PatchError::Commit { ref source, .. } if matches!(**source, CommitError::HalfDone { .. }) => failure,
            failure => {
                let undo = chain(&failure);
                PatchError::commit(self.id, operation, CommitError::HalfDone { first: self.said, undo })
            }
        }
    }
}

/// The failure of a change that was not made.
fn failure_of<E: 'static>(
    ended: Ended<PatchError<E>>,
    operation: Operation,
    id: &str,
    waited: Duration,
) -> PatchError<E> {
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
            PatchError::commit(id.to_owned(), operation, source)
        }
        (End::Recovered, PatchError::Commit { operation, id, source }) => match *source {
            CommitError::HalfDone { first, .. } => PatchError::RolledBack { operation, id, first },
            source => PatchError::commit(id, operation, source),
        },
        (_, failure) => failure,
    }
}

/// The clock, from then on.
struct SinceStart(Instant);

impl Clock for SinceStart {
    fn elapsed(&self) -> Duration {
        self.0.elapsed()
    }

    fn sleep(&self, wait: Duration) {
        std::thread::sleep(wait);
    }
}

/// Plans and changes nothing.
struct Planning<F>(F);

impl<E: 'static, F: FnMut() -> Result<Plan, PatchError<E>>> Driver for Planning<F> {
    type Plan = Plan;
    type Done = Plan;
    type Failure = PatchError<E>;

    fn plan(&mut self) -> Result<Plan, PatchError<E>> {
        (self.0)()
    }

    fn commit(&mut self, plan: Plan, _within: Duration) -> Result<Plan, PatchError<E>> {
        Ok(plan)
    }

    fn recover(&mut self, _failure: &PatchError<E>) -> Result<LeftInGuest, PatchError<E>> {
        Ok(LeftInGuest::Unknown)
    }
}

/// Plans and commits.
struct Changing<'a, V: Vmm, P, D> {
    guest: &'a mut Guest<V>,
    operation: Operation,
    plan: PlanWith<'a, V, P>,
    commit: CommitWith<'a, V, P, D>,
    /// The last commit that was left half done.
    half_done: Option<HalfDone>,
}

impl<V: Vmm, P, D> Driver for Changing<'_, V, P, D> {
    type Plan = P;
    type Done = D;
    type Failure = PatchError<V::Error>;

    fn plan(&mut self) -> Result<P, PatchError<V::Error>> {
        (self.plan)(self.guest)
    }

    fn commit(&mut self, plan: P, within: Duration) -> Result<D, PatchError<V::Error>> {
        (self.commit)(self.guest, plan, within)
    }

    fn recover(&mut self, failure: &PatchError<V::Error>) -> Result<LeftInGuest, PatchError<V::Error>> {
        let PatchError::Commit { id, source, .. } = failure else {
            return Ok(LeftInGuest::Unknown);
        };
        self.half_done = Some(HalfDone {
            id: id.clone(),
            said: source.to_string(),
        });
        // The plan of a revert makes what is left of it.
        let recovered = self.guest.reread().and_then(|()| match self.operation {
            // But where it is the begin of a transition, the recovery does.
            Operation::Revert if !self.guest.is_revert_cut_off() => self.guest.ready(),
            _ => self.guest.recover().map(|_| ()),
        });
        match recovered {
            Err(failure @ PatchError::NotResumed { .. }) => Err(failure),
            Err(_) => Ok(LeftInGuest::Unknown),
            Ok(()) => Ok(left_of(id, &self.guest.registry.entries)),
        }
    }
}

/// What is in the guest of the patch `id`.
fn left_of(id: &str, entries: &[Entry]) -> LeftInGuest {
    let is_it = |entry: &&Entry| !entry.state.is_off() && entry.record().is_some_and(|record| record.id == id);
    match entries.iter().find(is_it).map(|entry| entry.state) {
        None => LeftInGuest::Nothing,
        Some(state) if state.is_in_force() || state == State::Reverting => LeftInGuest::Patch,
        Some(_) => LeftInGuest::Unknown,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Gpa;
    use crate::change::ChangeError;
    use crate::commit::Effect;
    use crate::guest::GuestState;
    use crate::kernel::KernelError;
    use crate::machine::MachineError;

    type Failure = PatchError<MachineError>;

    fn changing() -> Failure {
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
        let is_not_safe = |source: &CommitError| matches!(source, CommitError::NotSafe { .. });
        assert!(matches!(&failure, PatchError::Commit { source, .. } if is_not_safe(source)));
        let said = chain(&failure);
        assert!(said.starts_with("applying fix: not safe within"), "{said}");
        assert!(said.ends_with("the guest keeps loading or unloading modules"), "{said}");
    }

    #[test]
    fn what_fails_after_a_half_done_commit_does_not_say_that_the_guest_is_as_before() {
        let busy = Failure::Vmm(MachineError::new("asking for migrations", "a snapshot"));
        let failure = half_done().followed_by(busy, Operation::Revert);
        assert_eq!(failure.guest_state(), GuestState::HalfPatched);
        let said = chain(&failure);
        assert!(said.contains("writing failed") && said.contains("a snapshot"), "{said}");
    }

    #[test]
    fn a_guest_that_stays_paused_after_a_half_done_commit_is_said_to_be_paused() {
        let source = MachineError::new("resuming the guest", "no answer").left_paused(true);
        let change = Effect::HalfPatched;
        let source = CommitError::NotResumed {
            effect: change,
            first: None,
            source,
        };
        let paused = Failure::not_resumed("fix".to_owned(), Operation::Revert, None, source);
        let failure = half_done().followed_by(paused, Operation::Revert);
        assert_eq!(failure.guest_state(), GuestState::Paused { change });
    }
}
