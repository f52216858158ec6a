//! Is any task inside an old function? All threads, all idle tasks, all CPUs.
//!
//! [`Quiescence`] is found once in a kernel. [`Quiescence::survey`] looks at every task's stack while the guest runs;
//! [`Survey::settle`] looks again at those that ran meanwhile; [`Survey::recheck`], with all vCPUs stopped, looks at
//! what runs and at what ran since, and gives the [`Verdict`].
//!
//! Why a look at a running guest counts: a task that is not on a CPU does not change its stack. The kernel counts, in
//! the task, how often it was switched out (`nvcsw`, `nivcsw`). Where the task was off its CPU (`on_cpu` is 0) and the
//! counts were the same before and after its stack was read, the stack was read whole; and where in the pause the
//! counts are still the same and no CPU is running it, the stack is as it was read.

mod cpus;
mod layout;
mod list;
mod look;
mod recheck;
mod survey;
mod unlisted;
mod verdict;

#[cfg(test)]
mod tests;

pub use survey::{Quiescence, Survey};
pub use verdict::{Blocker, Unsure, Verdict, Why};

use crate::addr::Gva;
use crate::text::plain;
use crate::unwind::KernelView;
use std::fmt;

/// Who a task is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TaskId {
    /// Its `struct task_struct`.
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
        // a tenant chooses the name: nothing in it may move an operator's terminal
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
