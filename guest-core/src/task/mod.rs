//! Checks whether any task is inside an old function: all threads, all idle tasks, all CPUs.
//!
//! [`Quiescence`] is found once in a kernel. [`Quiescence::snapshot`] checks every task's stack while the guest runs;
//! [`Snapshot::rescan`] checks the tasks again that ran meanwhile. [`Snapshot::recheck`], with all vCPUs paused, checks the tasks that run or
//! ran since, and gives the [`Verdict`].
//!
//! A check in a running guest is valid because a task that is not on a CPU does not change its stack. The kernel counts, in the task, how
//! often the task was switched out (`nvcsw`, `nivcsw`). If the task was off its CPU (`on_cpu` is 0) and the counts were the same before and
//! after its stack was read, the stack was read whole. If in the pause the counts are still the same and no CPU is running the task, the
//! stack is as it was read.

mod check;
mod cpus;
mod in_pause;
mod layout;
mod list;
mod marks;
mod snapshot;
mod unlisted;
mod verdict;

#[cfg(test)]
mod tests;

pub use snapshot::{Quiescence, Snapshot};
pub use verdict::{Blocker, Unsure, Verdict, Why};

pub(crate) use cpus::current;

use crate::addr::Gva;
use crate::text::plain;
use crate::unwind::KernelView;
use std::fmt;

/// The identity of a task.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TaskId {
    /// Guest-virtual address of its `struct task_struct`.
    pub at: Gva,
    /// Its thread id (`gettid`).
    pub pid: u32,
    /// Its process id (`getpid`).
    pub tgid: u32,
    /// Its command name.
    pub comm: String,
}

impl TaskId {
    fn read(view: &dyn KernelView, layout: &layout::TaskLayout, at: Gva) -> Self {
        let number = |offset| view.read_u32(at.wrapping_add(offset)).unwrap_or(0);
        let mut comm = vec![0; layout.comm_bytes];
        // A tenant chooses the name: nothing in it may move the cursor of an operator's terminal.
        let comm = match view.read(at.wrapping_add(layout.comm), &mut comm) {
            Ok(()) => plain(&comm),
            Err(_) => "?".to_owned(),
        };
        Self {
            at,
            pid: number(layout.pid),
            tgid: number(layout.tgid),
            comm,
        }
    }
}

impl fmt::Display for TaskId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (pid {})", self.comm, self.pid)
    }
}
