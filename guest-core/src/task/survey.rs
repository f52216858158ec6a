//! Looking at all tasks while the guest runs.

use super::TaskId;
use super::cpus::Cpus;
use super::layout::TaskLayout;
use super::list::{Counts, TaskList};
use super::look::Look;
use super::unlisted::StackArea;
use super::verdict::{Blocker, State, Unsure, Verdict};
use crate::addr::{Gpa, Gva};
use crate::memory::MemoryError;
use crate::unwind::{CodeMap, KernelView, OldCode, PatchCode, PtRegs, Returns, SetupError};
use std::cell::Cell;

/// How often a pass is repeated where tasks are born during it.
const PASSES_MAX: usize = 3;
/// How many frames all tasks together may have that are walked in one go; beyond, tasks are unsure. A busy guest whose
/// 10,000 tasks are all traced has a third of that; a hostile one has 262,144 tasks that share a stack of 2048 frames.
pub(super) const FRAMES_MAX: usize = 1 << 20;
/// `TASK_DEAD` (include/linux/sched.h): the task will never run again. Bit 7 since 4.14.
const TASK_DEAD: u32 = 0x80;
/// Symbols of the code at which a new task starts: since 6.6, and before.
const FORK_ENTRIES: [&str; 2] = ["ret_from_fork_asm", "ret_from_fork"];

/// All that is needed to find every task and its stack, looked up once for a kernel.
#[derive(Debug, Clone)]
pub struct Quiescence {
    pub(super) layout: TaskLayout,
    pub(super) list: TaskList,
    pub(super) cpus: Cpus,
    pub(super) regs: PtRegs,
    pub(super) returns: Returns,
    pub(super) fork_entry: Option<Gva>,
    pub(super) stacks: StackArea,
}

impl Quiescence {
    /// Looks everything up. Error: what the kernel lacks.
    pub fn find(view: &dyn KernelView) -> Result<Self, SetupError> {
        let layout = TaskLayout::read(view)?;
        Ok(Self {
            list: TaskList::read(view, &layout)?,
            cpus: Cpus::read(view)?,
            regs: PtRegs::read(view.btf())?,
            returns: Returns::read(view)?,
            fork_entry: FORK_ENTRIES.iter().find_map(|name| view.symbol(name)),
            stacks: StackArea::read(view, &layout)?,
            layout,
        })
    }

    /// Looks at every task. `old`: the functions that must not be running; `patches`: code that vmpatch has laid.
    ///
    /// Error: the guest's list of tasks, or what the kernel has loaded, could not be read.
    pub fn survey(
        &self,
        view: &dyn KernelView,
        old: OldCode,
        patches: Vec<PatchCode>,
    ) -> Result<Survey<'_>, SetupError> {
        let code = CodeMap::read(view, &patches)?;
        let (tasks, unlisted, switches, buffer) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let mut survey = Survey {
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
        survey.settle(view)?;
        Ok(survey)
    }
}

/// One task, as it was when it was looked at.
#[derive(Debug)]
pub(super) struct Task {
    pub at: Gva,
    /// Where its switch counts are, so that the pause need not translate; none where they are not mapped.
    pub switches_at: Option<Gpa>,
    pub start_time: u64,
    pub switches: [u8; 16],
    pub state: State,
}

/// Every task of a guest, and whether it was in an old function.
#[derive(Debug)]
pub struct Survey<'q> {
    pub(super) finder: &'q Quiescence,
    pub(super) old: OldCode,
    pub(super) patches: Vec<PatchCode>,
    pub(super) code: CodeMap,
    /// Sorted by address.
    pub(super) tasks: Vec<Task>,
    /// Stacks that may be in use by tasks that `tasks` does not have.
    pub(super) unlisted: Vec<Gva>,
    /// The births and deaths up to which `tasks` is whole; none where the guest did not hold still.
    pub(super) counts: Option<Counts>,
    /// Each CPU's task switches before the last pass.
    pub(super) switches: Vec<u64>,
    pub(super) buffer: Vec<u8>,
    /// What is left of [`FRAMES_MAX`].
    pub(super) frames_left: Cell<usize>,
}

impl Survey<'_> {
    /// Looks again at what ran since it was last looked at, and at new tasks. Called just before the pause, it leaves
    /// the pause little to do.
    pub fn settle(&mut self, view: &dyn KernelView) -> Result<(), SetupError> {
        self.frames_left.set(FRAMES_MAX);
        for _ in 0..PASSES_MAX {
            self.switches = self.finder.cpus.switches(view)?;
            let counts = self.finder.list.counts(view)?;
            if self.code.refresh(view, &self.patches)? {
                self.forget();
            }
            if self.counts != Some(counts) || self.tasks.is_empty() {
                let listed = self.finder.list.all(view, &self.finder.layout)?;
                self.counts = listed.counts;
                self.replace(view, listed.tasks)?;
                self.unlisted = self.unlisted_stacks(view)?;
            }
            self.look_at_changed(view);
            // whoever bore a task during the pass may already have been looked at
            if self.counts == Some(self.finder.list.counts(view)?) {
                return Ok(());
            }
            self.counts = None;
        }
        Ok(())
    }

    /// What the survey says without a pause: where a sleeping task is inside an old function, a pause is of no use.
    /// Running tasks are left out.
    pub fn outlook(&self, view: &dyn KernelView) -> Verdict {
        let mut verdict = Verdict::default();
        for task in &self.tasks {
            self.report(view, task.at, &task.state, &mut verdict);
        }
        verdict
    }

    /// Number of tasks, with one idle task for each CPU.
    pub fn task_count(&self) -> usize {
        self.tasks.len()
    }

    /// Takes a new list of tasks; keeps what is known of those that stay.
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
            let task = kept.unwrap_or_else(|| self.unknown(view, at));
            self.tasks.push(task);
        }
        Ok(())
    }

    /// The stacks in use that belong to none of the tasks that are known.
    pub(super) fn unlisted_stacks(&self, view: &dyn KernelView) -> Result<Vec<Gva>, SetupError> {
        let Quiescence {
            layout, cpus, stacks, ..
        } = self.finder;
        // a task that is dead already may have given its stack to another one
        let stack = |task: &Task| view.read_u64(task.at.wrapping_add(layout.stack)).ok().map(Gva);
        let mut owned: Vec<Gva> = self.tasks.iter().filter_map(stack).collect();
        owned.sort_unstable();
        stacks.unlisted(view, cpus, &owned)
    }

    /// A task that was not yet looked at.
    pub(super) fn unknown(&self, view: &dyn KernelView, at: Gva) -> Task {
        let switches_at = view.physical(at.wrapping_add(self.finder.layout.switches));
        Task {
            at,
            switches_at,
            start_time: self.start_time(view, at),
            switches: [0; 16],
            state: State::Running,
        }
    }

    /// When a task was born: tells it from another one at the same address.
    pub(super) fn start_time(&self, view: &dyn KernelView, at: Gva) -> u64 {
        view.read_u64(at.wrapping_add(self.finder.layout.start_time))
            .unwrap_or(0)
    }

    fn forget(&mut self) {
        for task in &mut self.tasks {
            task.state = State::Running;
        }
    }

    fn look_at_changed(&mut self, view: &dyn KernelView) {
        let mut tasks = std::mem::take(&mut self.tasks);
        let mut buffer = std::mem::take(&mut self.buffer);
        for task in &mut tasks {
            if task.state == State::Running || switches(view, task) != Ok(task.switches) {
                self.look_while_running(view, task, &mut buffer);
            }
        }
        (self.tasks, self.buffer) = (tasks, buffer);
    }

    /// Looks at a task that may start to run at any moment.
    fn look_while_running(&self, view: &dyn KernelView, task: &mut Task, buffer: &mut Vec<u8>) {
        task.state = State::Running;
        let Ok(before) = switches(view, task) else { return };
        task.switches = before;
        let on_cpu = || view.read_u32(task.at.wrapping_add(self.finder.layout.on_cpu));
        if on_cpu() != Ok(0) {
            return;
        }
        let state = self.look(view).sleeping_or_dead(task.at, buffer);
        if on_cpu() == Ok(0) && switches(view, task) == Ok(before) {
            task.state = state;
        }
    }

    pub(super) fn look<'a>(&'a self, view: &'a dyn KernelView) -> Look<'a> {
        Look {
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

    /// Adds to a verdict what a state means.
    pub(super) fn report(&self, view: &dyn KernelView, at: Gva, state: &State, verdict: &mut Verdict) {
        let id = || TaskId::read(view, &self.finder.layout, at);
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

impl Look<'_> {
    /// A task that is not running, and may never run again.
    pub fn sleeping_or_dead(&self, task: Gva, buffer: &mut Vec<u8>) -> State {
        match self.view.read_u32(task.wrapping_add(self.layout.state)) {
            Ok(state) if state & TASK_DEAD != 0 => State::Clear,
            _ => self.sleeping(task, buffer),
        }
    }
}

/// A task's switch counts now.
pub(super) fn switches(view: &dyn KernelView, task: &Task) -> Result<[u8; 16], MemoryError> {
    let mut bytes = [0; 16];
    let at = task.switches_at.ok_or(MemoryError::NotMapped {
        at: task.at,
        level: 1,
        entry: 0,
    })?;
    view.read_physical(at, &mut bytes)?;
    Ok(bytes)
}
