//! What a transition needs of a snapshot: which tasks there are, which may be marked in a pause, and which memory is still a task's.

use super::TaskId;
use super::snapshot::Snapshot;
use super::verdict::State;
use crate::addr::Gva;
use crate::unwind::KernelView;

impl Snapshot<'_> {
    /// Guest-virtual addresses of all tasks, ascending.
    pub fn tasks(&self) -> impl Iterator<Item = Gva> {
        self.tasks.iter().map(|task| task.at)
    }

    /// The same, each with its start time.
    pub fn births(&self) -> impl Iterator<Item = (Gva, u64)> {
        self.tasks.iter().map(|task| (task.at, task.start_time))
    }

    /// Who a task is.
    pub fn identify(&self, view: &dyn KernelView, at: Gva) -> TaskId {
        TaskId::read(view, &self.finder.layout, at)
    }

    /// The tasks that a pause may find inside an old function: those that are inside, and those that run.
    pub fn may_be_inside(&self) -> impl Iterator<Item = Gva> {
        let tasks = self.tasks.iter();
        let may_be = tasks.filter(|task| matches!(task.state, State::Inside(..) | State::Running));
        may_be.map(|task| task.at)
    }

    /// True for a task that is off its CPU, and was found clear of all old functions.
    pub fn is_clear(&self, at: Gva) -> bool {
        let found = self.tasks.binary_search_by_key(&at, |task| task.at);
        let task = found.ok().and_then(|index| self.tasks.get(index));
        task.is_some_and(|task| task.state == State::Clear)
    }

    /// True where `at` is still a task: it is on its process's list of threads, or a CPU's idle task. What a task leaves behind is poisoned or reused
    /// (`list_del_rcu`, `__unhash_process`). Only valid in a pause.
    pub fn is_alive(&self, view: &dyn KernelView, at: Gva) -> bool {
        let node = at.wrapping_add(self.finder.layout.thread_node);
        // `struct list_head`: next, prev.
        let before = view.read_u64(node.wrapping_add(8)).map(Gva);
        if before.is_ok_and(|before| view.read_u64(before) == Ok(node.0)) {
            return true;
        }
        let cpus = 0..self.finder.cpus.count();
        cpus.into_iter()
            .any(|cpu| self.finder.cpus.idle(view, cpu) == Ok(Some(at)))
    }
}
