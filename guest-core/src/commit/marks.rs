//! Sets and takes away the marks of tasks in the pause, for a transition: see [`crate::kernel::patch_state`].
//!
//! Marks are outside of what a commit rolls back, as nothing that a supervisor has tells which memory is still a task's. What a commit leaves of
//! them that did not come to its end is harmless: without trampolines nobody reads them, and the next vmpatch takes them away, since
//! `klp_transition_patch` still points at a patch of vmpatch. Where a transition ends, the marks go before the first jump changes, so that no task is led to the
//! old code by one function and to the new by another.

use super::{CommitError, NotSafe};
use crate::addr::{Gpa, Gva};
use crate::change::{Change, ChangeError};
use crate::kernel::patch_state::{Mark, PatchState, UNDEFINED};
use crate::kernel::{KernelError, Live};
use crate::memory::VirtMemory;
use crate::plan::{FORK, Marks};
use crate::task::{Snapshot, Verdict};
use std::collections::{BTreeMap, BTreeSet};

/// The marks of one commit.
#[derive(Debug)]
pub(super) struct Marking {
    fields: PatchState,
    kind: Kind,
    /// The tasks whose marks the commit may change, as the journal names them.
    journaled: BTreeMap<Gva, TaskMark>,
    /// True where the journal was given without some of them.
    is_journal_old: bool,
    /// The tasks of the last look, each with its start time, which tells it from a later one at that address.
    known: BTreeSet<(Gva, u64)>,
    /// Those of them that were marked.
    marked: BTreeSet<Gva>,
}

#[derive(Debug)]
enum Kind {
    /// The change of `klp_transition_patch` that begins the transition, and the mark of the tasks inside.
    Set(Change, Mark),
    Clear,
}

/// The changes that mark one task.
#[derive(Debug, Clone)]
struct TaskMark {
    state: Change,
    flag: Change,
}

/// What a pause does with marks, and whether the plan's changes may follow.
#[derive(Debug, Default)]
pub(super) struct Decision {
    pub not_safe: Option<NotSafe>,
    writes: Vec<(Change, Vec<u8>)>,
}

impl Marking {
    /// The marks of a plan; `None` where it leaves them.
    pub fn of(live: &Live<'_>, marks: &Marks) -> Result<Option<Self>, CommitError> {
        let (fields, kind) = match *marks {
            Marks::Leave => return Ok(None),
            Marks::Clear { fields } => (fields, Kind::Clear),
            Marks::Set { fields, owner, mark } => {
                let change = Change::word("klp_transition_patch", physical(live, fields.owner)?, 0, owner.0);
                (fields, Kind::Set(change.of_data(), mark))
            }
        };
        Ok(Some(Self {
            fields,
            kind,
            journaled: BTreeMap::new(),
            is_journal_old: true,
            known: BTreeSet::new(),
            marked: BTreeSet::new(),
        }))
    }

    /// What the journal names of marks, by address.
    pub fn journal(&self) -> Vec<Change> {
        let owner = match &self.kind {
            Kind::Set(owner, _) => Some(owner.clone()),
            Kind::Clear => None,
        };
        let marks = self
            .journaled
            .values()
            .flat_map(|mark| [mark.state.clone(), mark.flag.clone()]);
        let mut all: Vec<_> = owner.into_iter().chain(marks).collect();
        all.sort_by_key(Change::gpa);
        all
    }

    /// True once after the journal's marks have become more.
    pub fn take_journal_old(&mut self) -> bool {
        std::mem::take(&mut self.is_journal_old)
    }

    /// Looks, while the guest runs, which marks a pause may have to change. Gives true where a pause may do something, although `verdict` finds tasks asleep inside.
    pub fn look(&mut self, live: &Live<'_>, snapshot: &Snapshot<'_>, verdict: &Verdict) -> Result<bool, CommitError> {
        self.known = snapshot.births().collect();
        self.marked = match self.kind {
            Kind::Set(..) => BTreeSet::new(),
            Kind::Clear => snapshot.tasks().filter(|task| self.is_marked(live, *task)).collect(),
        };
        match self.kind {
            Kind::Set(..) => {
                let may_be_inside: Vec<_> = snapshot.may_be_inside().collect();
                self.add(live, may_be_inside)?;
                Ok(true)
            }
            Kind::Clear => {
                self.add(live, self.marked.clone())?;
                let left = self.marked.iter().any(|task| snapshot.is_clear(*task));
                Ok(left || self.blockers(&verdict.inside, &self.marked).next().is_none())
            }
        }
    }

    fn add(&mut self, live: &Live<'_>, tasks: impl IntoIterator<Item = Gva>) -> Result<(), CommitError> {
        for task in tasks {
            if !self.journaled.contains_key(&task) {
                self.journaled.insert(task, self.mark(live, task)?);
                self.is_journal_old = true;
            }
        }
        Ok(())
    }

    /// The tasks inside that keep a transition from its end. A fork matters where its task is marked.
    fn blockers<'v>(
        &self,
        inside: &'v [(Gva, String)],
        marked: &'v BTreeSet<Gva>,
    ) -> impl Iterator<Item = &'v (Gva, String)> {
        inside
            .iter()
            .filter(|(task, function)| !function.starts_with(FORK) || marked.contains(task))
    }

    /// Decides in the pause. What the journal does not name is left for the next pause.
    pub fn decide(
        &mut self,
        live: &Live<'_>,
        snapshot: &Snapshot<'_>,
        verdict: Verdict,
    ) -> Result<Decision, CommitError> {
        match self.kind {
            Kind::Set(..) => self.decide_set(live, snapshot, verdict),
            Kind::Clear => self.decide_clear(live, snapshot, verdict),
        }
    }

    fn decide_set(
        &mut self,
        live: &Live<'_>,
        snapshot: &Snapshot<'_>,
        verdict: Verdict,
    ) -> Result<Decision, CommitError> {
        let Kind::Set(owner, _) = &self.kind else {
            return Ok(Decision::default());
        };
        let mut wanted = vec![owner.clone()];
        let mut unnamed = Vec::new();
        for (task, _) in &verdict.inside {
            match self.journaled.get(task) {
                Some(mark) if snapshot.is_alive(live, *task) => wanted.extend([mark.state.clone(), mark.flag.clone()]),
                _ => unnamed.push(*task),
            }
        }
        // A begin that was cut off has made some.
        let mut changes = Vec::new();
        for change in wanted {
            if !change.is_made(live.memory)? {
                changes.push(change);
            }
        }
        if !verdict.unsure.is_empty() || !unnamed.is_empty() {
            self.add(live, unnamed)?;
            return Ok(Decision::of(Some(why(verdict))));
        }
        Decision::writing(live, None, changes)
    }

    fn decide_clear(
        &mut self,
        live: &Live<'_>,
        snapshot: &Snapshot<'_>,
        verdict: Verdict,
    ) -> Result<Decision, CommitError> {
        let born = snapshot.births().filter(|birth| !self.known.contains(birth));
        let marked = born.map(|(task, _)| task).chain(self.marked.iter().copied());
        let marked: BTreeSet<Gva> = marked.filter(|task| self.is_marked(live, *task)).collect();
        let is_end = verdict.unsure.is_empty() && self.blockers(&verdict.inside, &marked).next().is_none();
        let (mut changes, mut unnamed) = (Vec::new(), Vec::new());
        let inside: BTreeSet<Gva> = verdict.inside.iter().map(|(task, _)| *task).collect();
        for task in marked {
            if !is_end && (inside.contains(&task) || !snapshot.is_clear(task)) {
                continue;
            }
            match self.journaled.get(&task) {
                Some(mark) if snapshot.is_alive(live, task) => {
                    // The task may have cleared its flag itself, and be about to change its state.
                    if mark.flag.is_made(live.memory)? {
                        changes.push(mark.flag.undone());
                    }
                    changes.push(mark.cleared(live)?);
                }
                _ => unnamed.push(task),
            }
        }
        let not_safe = !is_end || !unnamed.is_empty();
        self.add(live, unnamed)?;
        Decision::writing(live, not_safe.then(|| why(verdict)), changes)
    }

    /// True for a task that is marked, or was being marked when vmpatch was killed.
    fn is_marked(&self, live: &Live<'_>, task: Gva) -> bool {
        let state = live.read_u32(task.wrapping_add(self.fields.state));
        state.is_ok_and(|state| state != UNDEFINED)
    }

    fn mark(&self, live: &Live<'_>, task: Gva) -> Result<TaskMark, CommitError> {
        let (state, flag) = (
            physical(live, task.wrapping_add(self.fields.state))?,
            physical(live, task.wrapping_add(self.fields.pending))?,
        );
        let mark = match self.kind {
            Kind::Set(_, mark) => mark,
            // What is there is read in the pause.
            Kind::Clear => Mark::Old,
        };
        let bytes = |word: u32| word.to_le_bytes().to_vec();
        let state = Change::replace("patch_state of a task", state, bytes(UNDEFINED), bytes(mark as u32));
        Ok(TaskMark {
            state: state.of_data(),
            flag: Change::set_bits("the thread flags of a task", flag, self.fields.pending_mask).of_data(),
        })
    }
}

impl TaskMark {
    /// The change of the state as it is now to that of a task in no transition.
    fn cleared(&self, live: &Live<'_>) -> Result<Change, ChangeError> {
        let now = self.state.current(live.memory)?;
        let cleared = Change::replace(self.state.what(), self.state.gpa(), now, UNDEFINED.to_le_bytes().into());
        Ok(cleared.of_data())
    }
}

impl Decision {
    /// A decision without marks.
    pub fn of(not_safe: Option<NotSafe>) -> Self {
        let writes = Vec::new();
        Self { not_safe, writes }
    }

    fn writing(live: &Live<'_>, not_safe: Option<NotSafe>, changes: Vec<Change>) -> Result<Self, CommitError> {
        let prepared = changes.into_iter().map(|change| {
            let bytes = change.prepare(live.memory)?;
            Ok((change, bytes))
        });
        let writes = prepared.collect::<Result<_, ChangeError>>()?;
        Ok(Self { not_safe, writes })
    }

    /// Makes the changes, and reads them back.
    pub fn write(&self, live: &Live<'_>) -> Result<(), CommitError> {
        let writes: Vec<_> = self
            .writes
            .iter()
            .map(|(change, bytes)| (change.gpa(), bytes.clone()))
            .collect();
        if writes.is_empty() {
            return Ok(());
        }
        live.memory.write_all(&writes).map_err(|source| ChangeError::Memory {
            what: "the marks of tasks".to_owned(),
            source,
        })?;
        for (change, _) in &self.writes {
            change.verify(live.memory)?;
        }
        Ok(())
    }

    /// Undoes the marks that a begin has set, in the same pause. What fails is left for the next vmpatch.
    pub fn unset(&self, live: &Live<'_>) {
        for (change, _) in self.writes.iter().rev() {
            let _ = change.restore(live.memory);
        }
    }
}

/// Why a pause was not enough. Tasks that the journal did not name are no reason to name them.
fn why(verdict: Verdict) -> NotSafe {
    match verdict.is_safe() {
        true => NotSafe::Changing,
        false => NotSafe::Stacks(verdict),
    }
}

fn physical(live: &Live<'_>, at: Gva) -> Result<Gpa, KernelError> {
    let physical = live.physical(at);
    physical.map(|(gpa, _)| gpa).map_err(|source| KernelError::Unreadable {
        what: "a task",
        at,
        source,
    })
}
