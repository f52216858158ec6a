//! The snapshot of all tasks: which of them are inside an old function, checked while the guest runs.

use super::TaskId;
use super::check::StackCheck;
use super::cpus::Cpus;
use super::layout::TaskLayout;
use super::list::{Counts, TaskList};
use super::unlisted::StackArea;
use super::verdict::{Blocker, State, Unsure, Verdict};
use crate::addr::{Gpa, Gva};
use crate::unwind::{CodeMap, HookedReturns, KernelView, OldCode, PatchCode, PtRegs, SetupError};
use std::cell::Cell;

/// Most passes of a rescan. A pass is repeated if tasks are born during it.
const PASSES_MAX: usize = 3;
/// Most frames that are walked in one rescan or recheck, of all tasks together. Tasks beyond are unsure. A busy guest with 10,000 tasks,
/// all of them traced, has a third of that; a hostile one has 262,144 tasks that share a stack of 2048 frames.
pub(super) const FRAMES_MAX: usize = 1 << 20;
/// `TASK_DEAD` (include/linux/sched.h): the task will never run again. It is bit 7 since 4.14.
const TASK_DEAD: u32 = 0x80;
/// Names of the code at which a new task starts: since 6.6, and before.
const FORK_ENTRIES: [&str; 2] = ["ret_from_fork_asm", "ret_from_fork"];

/// What is needed to find every task and its stack, looked up once for a kernel.
#[derive(Debug, Clone)]
pub struct Quiescence {
    pub(super) layout: TaskLayout,
    pub(super) list: TaskList,
    pub(super) cpus: Cpus,
    pub(super) regs: PtRegs,
    pub(super) returns: HookedReturns,
    pub(super) fork_entry: Option<Gva>,
    pub(super) stacks: StackArea,
}

impl Quiescence {
    /// Looks everything up.
    ///
    /// # Errors
    ///
    /// The kernel lacks a symbol or member, or has another layout.
    pub fn find(view: &dyn KernelView) -> Result<Self, SetupError> {
        let layout = TaskLayout::read(view)?;
        Ok(Self {
            list: TaskList::read(view, &layout)?,
            cpus: Cpus::read(view)?,
            regs: PtRegs::read(view.btf())?,
            returns: HookedReturns::read(view)?,
            fork_entry: FORK_ENTRIES.iter().find_map(|name| view.symbol(name)),
            stacks: StackArea::read(view, &layout)?,
            layout,
        })
    }

    /// Checks every task. `old` are the functions that must be quiescent, `patches` the code of all patches in the guest.
    ///
    /// # Errors
    ///
    /// The guest's list of tasks, or of the code that the kernel has loaded, cannot be read.
    pub fn snapshot(
        &self,
        view: &dyn KernelView,
        old: OldCode,
        patches: Vec<PatchCode>,
    ) -> Result<Snapshot<'_>, SetupError> {
        let code = CodeMap::read(view, &patches)?;
        let (tasks, unlisted, switches, buffer) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let mut snapshot = Snapshot {
            finder: self,
            old,
            patches,
            code,
            tasks,
            unlisted,
            counts: None,
            switches,
            buffer,
            frames_left: Cell::new(FRAMES_MAX),
        };
        snapshot.rescan(view)?;
        Ok(snapshot)
    }
}

/// One task, as it was when it was checked last.
#[derive(Debug)]
pub(super) struct Task {
    pub at: Gva,
    /// Guest-physical address of its switch counts, so that the pause need not translate it; `None` where they are not mapped.
    pub switches_at: Option<Gpa>,
    pub start_time: u64,
    pub switches: [u8; 16],
    pub state: State,
}

/// All tasks of a guest, and whether they are inside an old function.
#[derive(Debug)]
pub struct Snapshot<'q> {
    pub(super) finder: &'q Quiescence,
    pub(super) old: OldCode,
    pub(super) patches: Vec<PatchCode>,
    pub(super) code: CodeMap,
    /// Sorted by address.
    pub(super) tasks: Vec<Task>,
    /// Stacks that tasks may use which `tasks` does not have.
    pub(super) unlisted: Vec<Gva>,
    /// The kernel's counts of tasks for which `tasks` is complete; `None` where the counts changed in each pass.
    pub(super) counts: Option<Counts>,
    /// Each CPU's task switches before the last pass.
    pub(super) switches: Vec<u64>,
    pub(super) buffer: Vec<u8>,
    /// How many of [`FRAMES_MAX`] frames may still be walked.
    pub(super) frames_left: Cell<usize>,
}

impl Snapshot<'_> {
    /// Checks the tasks again that ran since they were checked, and new tasks. When it is called right before the pause, little is left to
    /// check in the pause.
    ///
    /// # Errors
    ///
    /// The guest's list of tasks, or of the code that the kernel has loaded, cannot be read.
    pub fn rescan(&mut self, view: &dyn KernelView) -> Result<(), SetupError> {
        self.frames_left.set(FRAMES_MAX);
        for _ in 0..PASSES_MAX {
            self.switches = self.finder.cpus.switches(view)?;
            let counts = self.finder.list.counts(view)?;
            if self.code.refresh(view, &self.patches)? {
                self.invalidate();
            }
            if self.counts != Some(counts) || self.tasks.is_empty() {
                let listed = self.finder.list.all(view, &self.finder.layout)?;
                self.counts = listed.counts;
                self.replace(view, listed.tasks)?;
                self.unlisted = self.unlisted_stacks(view)?;
            }
            self.check_changed(view);
            // If a task was born during the pass, its parent may have been checked before.
            if self.counts == Some(self.finder.list.counts(view)?) {
                return Ok(());
            }
            self.counts = None;
        }
        Ok(())
    }

    /// The verdict on the tasks that sleep. Where one of them is inside an old function, a pause is of no use.
    pub fn preview(&self, view: &dyn KernelView) -> Verdict {
        let mut verdict = Verdict::default();
        for task in &self.tasks {
            self.report(view, task.at, &task.state, &mut verdict);
        }
        verdict
    }

    /// Number of tasks, including one idle task for each CPU.
    #[cfg(test)]
    pub(super) fn task_count(&self) -> usize {
        self.tasks.len()
    }

    /// Takes over a new list of tasks, and keeps the states of those that are still the same.
    pub(super) fn replace(&mut self, view: &dyn KernelView, mut list: Vec<Gva>) -> Result<(), SetupError> {
        for cpu in 0..self.finder.cpus.count() {
            list.extend(self.finder.cpus.idle(view, cpu)?);
        }
        list.sort_unstable();
        list.dedup();
        let mut before = std::mem::take(&mut self.tasks).into_iter().peekable();
        for at in list {
            while before.next_if(|task| task.at < at).is_some() {}
            let kept = before.next_if(|task| task.at == at && task.start_time == self.start_time(view, at));
            let task = kept.unwrap_or_else(|| self.unchecked(view, at));
            self.tasks.push(task);
        }
        Ok(())
    }

    /// The stacks in use that belong to no task of the snapshot.
    pub(super) fn unlisted_stacks(&self, view: &dyn KernelView) -> Result<Vec<Gva>, SetupError> {
        let Quiescence {
            layout, cpus, stacks, ..
        } = self.finder;
        // A dead task may have left its stack to another one.
        let stack = |task: &Task| view.read_u64(task.at.wrapping_add(layout.stack)).ok().map(Gva);
        let mut owned: Vec<Gva> = self.tasks.iter().filter_map(stack).collect();
        owned.sort_unstable();
        stacks.unlisted(view, cpus, &owned)
    }

    /// A task that was not checked yet.
    pub(super) fn unchecked(&self, view: &dyn KernelView, at: Gva) -> Task {
        let switches_at = view.physical(at.wrapping_add(self.finder.layout.switches));
        Task {
            at,
            switches_at,
            start_time: self.start_time(view, at),
            switches: [0; 16],
            state: State::Running,
        }
    }

    /// When a task was born. It tells the task from another one at the same address.
    pub(super) fn start_time(&self, view: &dyn KernelView, at: Gva) -> u64 {
        view.read_u64(at.wrapping_add(self.finder.layout.start_time))
            .unwrap_or(0)
    }

    fn invalidate(&mut self) {
        for task in &mut self.tasks {
            task.state = State::Running;
        }
    }

    fn check_changed(&mut self, view: &dyn KernelView) {
        let mut tasks = std::mem::take(&mut self.tasks);
        let mut buffer = std::mem::take(&mut self.buffer);
        for task in &mut tasks {
            if task.state == State::Running || switches(view, task) != Some(task.switches) {
                self.check_while_running(view, task, &mut buffer);
            }
        }
        (self.tasks, self.buffer) = (tasks, buffer);
    }

    /// Checks a task that may start to run at any moment.
    fn check_while_running(&self, view: &dyn KernelView, task: &mut Task, buffer: &mut Vec<u8>) {
        task.state = State::Running;
        let Some(before) = switches(view, task) else { return };
        task.switches = before;
        let layout = &self.finder.layout;
        let on_cpu = || {
            let word = view.read_u32(task.at.wrapping_add(layout.on_cpu));
            word.map(|word| word & layout.on_cpu_mask)
        };
        if on_cpu() != Ok(0) {
            return;
        }
        let state = self.stack_check(view).sleeping_or_dead(task.at, buffer);
        if on_cpu() == Ok(0) && switches(view, task) == Some(before) {
            task.state = state;
        }
    }

    pub(super) fn stack_check<'a>(&'a self, view: &'a dyn KernelView) -> StackCheck<'a> {
        StackCheck {
            view,
            layout: &self.finder.layout,
            cpus: &self.finder.cpus,
            regs: &self.finder.regs,
            returns: &self.finder.returns,
            code: &self.code,
            old: &self.old,
            fork_entry: self.finder.fork_entry,
            frames_left: &self.frames_left,
        }
    }

    /// Adds a task with its state to a verdict.
    pub(super) fn report(&self, view: &dyn KernelView, at: Gva, state: &State, verdict: &mut Verdict) {
        let id = || TaskId::read(view, &self.finder.layout, at);
        if let State::Inside(function, _) = state {
            verdict.inside.push((at, function.clone()));
        }
        match state {
            State::Inside(function, stack) if verdict.blockers.len() < Verdict::NAMED_MAX => {
                verdict.blockers.push(Blocker {
                    task: id(),
                    function: function.clone(),
                    stack: stack.clone(),
                });
            }
            State::Unsure(why) if verdict.unsure.len() < Verdict::NAMED_MAX => {
                verdict.unsure.push(Unsure {
                    task: Some(id()),
                    why: why.clone(),
                });
            }
            _ => {}
        }
    }
}

impl StackCheck<'_> {
    /// Checks a task that is not running, and that may be dead.
    pub fn sleeping_or_dead(&self, task: Gva, buffer: &mut Vec<u8>) -> State {
        match self.view.read_u32(task.wrapping_add(self.layout.state)) {
            Ok(state) if state & TASK_DEAD != 0 => State::Clear,
            _ => self.sleeping(task, buffer),
        }
    }
}

/// A task's switch counts now; `None` where they cannot be read.
pub(super) fn switches(view: &dyn KernelView, task: &Task) -> Option<[u8; 16]> {
    let mut bytes = [0; 16];
    view.read_physical(task.switches_at?, &mut bytes).ok()?;
    Some(bytes)
}
