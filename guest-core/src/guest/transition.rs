//! Applies or reverts a patch task by task where that can't be done at one instant, and ends a transition.

use super::change;
use super::{Changed, Guest, GuestState, PatchError, PatchFile, PatchOptions, Vmm, commit_options};
use crate::addr::Gva;
use crate::commit::{CommitError, CommitOptions, Model};
use crate::kernel::patch_state::{Mark, UNDEFINED};
use crate::memory::VirtMemory;
use crate::plan::{self, Marks, NoTransition, Refusal, RevertError, TransitionError};
use crate::registry::State;
use crate::task::{Blocker, Quiescence, TaskId, Unsure};
use crate::transaction::Operation;
use crate::unwind::OldCode;
use std::time::{Duration, Instant};

/// How long the end of another patch's transition is waited for before something else is done.
const OTHER_TIME_MAX: Duration = Duration::from_secs(1);

impl<V: Vmm> Guest<V> {
    /// Applies `file` at one instant, if there is one so soon; else begins a transition, and waits for its end.
    pub(super) fn apply_hybrid(
        &mut self,
        file: PatchFile<'_>,
        options: &PatchOptions,
    ) -> Result<Changed, PatchError<V::Error>> {
        let at_once = |guest: &mut Self, timeout| guest.apply_at_once(file, &PatchOptions { timeout, ..*options });
        let begin = |guest: &mut Self, chosen| {
            guest.change(Operation::Apply, file.name, chosen, |guest| {
                guest.plan(file, options, true)
            })
        };
        self.hybrid(options, at_once, begin)
    }

    /// Reverts the patch `id` in the same way.
    pub(super) fn revert_hybrid(&mut self, id: &str, options: &PatchOptions) -> Result<Changed, PatchError<V::Error>> {
        if plan::in_transition(&self.registry).is_some_and(|(_, record)| record.id != id) {
            self.finish_other()?;
        }
        let at_once = |guest: &mut Self, timeout| guest.revert_at_once(id, timeout);
        let begin = |guest: &mut Self, chosen| {
            guest.change(Operation::Revert, id, chosen, |guest| {
                let (live, registry) = (guest.live(), &guest.registry);
                plan::begin_revert(&live, registry, id).map_err(PatchError::revert(id))
            })
        };
        self.hybrid(options, at_once, begin)
    }

    fn hybrid(
        &mut self,
        options: &PatchOptions,
        at_once: impl Fn(&mut Self, Duration) -> Result<Changed, PatchError<V::Error>>,
        begin: impl FnOnce(&mut Self, CommitOptions) -> Result<Changed, PatchError<V::Error>>,
    ) -> Result<Changed, PatchError<V::Error>> {
        let start = Instant::now();
        let left = || options.timeout.saturating_sub(start.elapsed());
        let blocked = match at_once(self, options.grace.min(options.timeout)) {
            Err(failure) if failure.is_not_safe() => failure,
            done => return done,
        };
        let begun = begin(self, commit_options(Model::Hybrid, left()));
        let why = match begun.map_err(PatchError::into_no_transition) {
            Ok(begun) => return self.end_of(begun, left()),
            Err(Err(failure)) => return Err(failure),
            Err(Ok(why)) => why,
        };
        at_once_or_say_why(left(), || at_once(self, left()), blocked, why)
    }

    /// Waits for the end of the transition that has just begun.
    fn end_of(&mut self, begun: Changed, timeout: Duration) -> Result<Changed, PatchError<V::Error>> {
        let pause_us_max = begun.committed.pause_us_max;
        let tries = begun.committed.tries;
        let finished = match self.finish(timeout)? {
            Some(finished) => finished,
            None => return Ok(begun),
        };
        let mut committed = finished.committed;
        committed.pause_us_max = committed.pause_us_max.max(pause_us_max);
        committed.tries += tries;
        Ok(Changed { committed, ..finished })
    }

    /// Ends the transition that is under way in the guest, as soon as no task runs the code that it leads away from; `None` where none is.
    ///
    /// # Errors
    ///
    /// [`PatchError::InTransition`] where tasks still run that code after `timeout`.
    pub fn finish(&mut self, timeout: Duration) -> Result<Option<Changed>, PatchError<V::Error>> {
        let Some((entry, record)) = plan::in_transition(&self.registry) else {
            return Ok(None);
        };
        let (id, mark) = (record.id.clone(), mark(entry.state));
        let finished = change::finish(self, &id, commit_options(Model::Hybrid, timeout));
        let finished = finished.map_err(|source| match source.guest_state() {
            GuestState::AsBefore => PatchError::InTransition {
                id,
                mark,
                source: Box::new(source),
            },
            // It says what the guest is like.
            _ => source,
        })?;
        let reverted = mark == Mark::New;
        if reverted && finished.is_some() {
            self.recover().map_err(PatchError::afterwards)?;
        }
        Ok(finished.map(|(record, committed)| Changed {
            record,
            committed,
            by_task: true,
            reverted,
            left: None,
        }))
    }

    /// True where it is this module that is being applied in a transition.
    pub(super) fn is_in_transition(&self, file: &[u8]) -> bool {
        plan::in_transition(&self.registry)
            .is_some_and(|(entry, record)| entry.state == State::Transition && record.digest == plan::digest(file))
    }

    /// True where the begin of such a revert was cut off.
    pub(super) fn is_revert_cut_off(&self) -> bool {
        let mut entries = self.registry.entries.iter();
        entries.any(|entry| entry.state == State::StartUnpatching)
    }

    /// True where the patch `id` is being reverted in a transition.
    pub(super) fn is_being_reverted(&self, id: &str) -> bool {
        let under_way = plan::in_transition(&self.registry);
        under_way.is_some_and(|(entry, record)| entry.state == State::Unpatching && record.id == id)
    }

    /// Ends another patch's transition, if that is so soon.
    pub(super) fn finish_other(&mut self) -> Result<(), PatchError<V::Error>> {
        match self.finish(OTHER_TIME_MAX) {
            // What is to be done then says what is in the way.
            Err(PatchError::InTransition { .. }) => Ok(()),
            finished => finished.map(drop),
        }
    }
}

/// Where a patch can't be in transition, a safe instant is waited for as long as there is time. The failure then says why nothing else was tried.
fn at_once_or_say_why<E: std::error::Error + 'static>(
    left: Duration,
    apply: impl FnOnce() -> Result<Changed, PatchError<E>>,
    blocked: PatchError<E>,
    why: NoTransition,
) -> Result<Changed, PatchError<E>> {
    let applied = if left.is_zero() { Err(blocked) } else { apply() };
    applied.map_err(|failure| match failure.is_not_safe() {
        true => PatchError::OnlyAtOnce {
            why,
            source: Box::new(failure),
        },
        false => failure,
    })
}

/// What marked tasks run while a patch is in that state.
fn mark(state: State) -> Mark {
    match state {
        State::Unpatching => Mark::New,
        _ => Mark::Old,
    }
}

/// A patch in transition, and the tasks that still run the code that they were in.
#[derive(Debug, Clone)]
pub struct InTransition {
    /// The patch.
    pub id: String,
    /// Which code that is: the old one in an apply, the new one in a revert.
    pub mark: Mark,
    /// Number of tasks in the guest, with one idle task for each CPU.
    pub tasks: usize,
    /// Those that are marked.
    pub marked: Vec<TaskId>,
    /// Those of all tasks that are inside that code, each with its stack; [`NAMED_MAX`](crate::task::Verdict::NAMED_MAX) at the most.
    pub inside: Vec<Blocker>,
    /// Those of which it can't be told, and why; as many at the most.
    pub unsure: Vec<Unsure>,
}

impl<V: Vmm> Guest<V> {
    /// The patch that is in transition, and which tasks are marked, as they are while the guest runs; `None` where none is.
    ///
    /// # Errors
    ///
    /// The guest's tasks cannot be read.
    pub fn in_transition(&self) -> Result<Option<InTransition>, TransitionError> {
        let live = self.live();
        let Some((entry, _)) = plan::in_transition(&self.registry) else {
            return Ok(None);
        };
        let Some(plan) = plan::finish(&live, &self.registry)? else {
            return Ok(None);
        };
        let Marks::Clear { fields } = plan.marks else {
            return Ok(None);
        };
        let finder = Quiescence::find(&live)?;
        let old = plan
            .must_be_quiescent
            .into_iter()
            .filter(|function| !function.name.starts_with(plan::FORK));
        let snapshot = finder.snapshot(&live, OldCode::new(old.collect()), plan.patch_code)?;
        let state = |task: &Gva| live.read_u32(task.wrapping_add(fields.state));
        let is_marked = |task: &Gva| state(task).is_ok_and(|state| state != UNDEFINED);
        let marked = snapshot.tasks().filter(is_marked);
        let verdict = snapshot.preview(&live);
        Ok(Some(InTransition {
            id: plan.record.id,
            mark: mark(entry.state),
            tasks: snapshot.tasks().count(),
            marked: marked.map(|task| snapshot.identify(&live, task)).collect(),
            inside: verdict.blockers,
            unsure: verdict.unsure,
        }))
    }
}

impl<E: 'static> PatchError<E> {
    /// True where no moment was safe, and the guest is as before.
    pub fn is_not_safe(&self) -> bool {
        matches!(self, Self::Commit { source, .. } if matches!(**source, CommitError::NotSafe { .. }))
    }

    /// Why a patch can't be in transition, or another failure.
    fn into_no_transition(self) -> Result<NoTransition, Self> {
        match self {
            Self::Refused { name, source } => match *source {
                Refusal::NoTransition(why) => Ok(why),
                source => {
                    let source = Box::new(source);
                    Err(Self::Refused { name, source })
                }
            },
            Self::Revert { id, source } => match source {
                RevertError::NoTransition(why) => Ok(why),
                source => Err(Self::Revert { id, source }),
            },
            other => Err(other),
        }
    }
}
