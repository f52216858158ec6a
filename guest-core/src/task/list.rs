//! Lists all threads of the guest: `init_task.tasks`, and each process's threads (`signal->thread_head`).
//!
//! The list may be read while the guest runs. It is complete if no task was born or died meanwhile. It then has as many threads as the
//! kernel counts (`total_forks`, `nr_threads`, kernel/fork.c).

use super::layout::TaskLayout;
use crate::addr::Gva;
use crate::unwind::list::{backward, forward};
use crate::unwind::{KernelView, SetupError};

/// Most threads that are listed: 8 times the default `pid_max` of a guest with few CPUs.
const TASKS_MAX: usize = 1 << 18;
/// How often the list is read again if it changes while it is read.
const READS_MAX: usize = 4;

/// The kernel's counts of births and of living threads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Counts {
    pub forks: u64,
    pub threads: u32,
}

/// Guest-virtual addresses of the list and of the counts.
#[derive(Debug, Clone)]
pub(super) struct TaskList {
    head: Gva,
    forks: Gva,
    threads: Gva,
}

/// The threads of a guest.
#[derive(Debug)]
pub(super) struct Listed {
    pub tasks: Vec<Gva>,
    /// The counts that the list agrees with; `None` where the guest changed the list in each attempt.
    pub counts: Option<Counts>,
}

impl TaskList {
    pub fn read(view: &dyn KernelView, layout: &TaskLayout) -> Result<Self, SetupError> {
        let symbol = |name: &str| view.symbol(name).ok_or_else(|| SetupError::NoSymbol(name.to_owned()));
        let head = symbol("init_task")?.wrapping_add(layout.tasks);
        Ok(Self {
            head,
            forks: symbol("total_forks")?,
            threads: symbol("nr_threads")?,
        })
    }

    pub fn counts(&self, view: &dyn KernelView) -> Result<Counts, SetupError> {
        let unreadable = |at| {
            move |source| SetupError::Unreadable {
                what: "the count of tasks",
                at,
                source,
            }
        };
        let forks = view.read_u64(self.forks).map_err(unreadable(self.forks))?;
        let threads = view.read_u32(self.threads).map_err(unreadable(self.threads))?;
        Ok(Counts { forks, threads })
    }

    /// Lists every thread.
    ///
    /// # Errors
    ///
    /// The list cannot be read to its end in several attempts.
    pub fn all(&self, view: &dyn KernelView, layout: &TaskLayout) -> Result<Listed, SetupError> {
        let mut last = Err(SetupError::NoSymbol("init_task".to_owned()));
        for _ in 0..READS_MAX {
            let before = self.counts(view)?;
            let tasks = self.once(view, layout);
            let after = self.counts(view)?;
            let whole = |tasks: &Vec<Gva>| before == after && tasks.len() == before.threads as usize;
            if tasks.as_ref().is_ok_and(whole) {
                return tasks.map(|tasks| Listed {
                    tasks,
                    counts: Some(before),
                });
            }
            last = tasks;
        }
        last.map(|tasks| Listed { tasks, counts: None })
    }

    fn once(&self, view: &dyn KernelView, layout: &TaskLayout) -> Result<Vec<Gva>, SetupError> {
        let mut tasks = Vec::new();
        for leader in forward(view, "the list of processes", self.head, layout.tasks, TASKS_MAX)? {
            let left = TASKS_MAX.saturating_sub(tasks.len());
            tasks.extend(forward(
                view,
                "a process's threads",
                threads(view, layout, leader)?,
                layout.thread_node,
                left,
            )?);
        }
        Ok(tasks)
    }

    /// Lists the processes behind the last one that `is_listed`, with all their threads. They were born since, because the kernel adds new
    /// processes at the end. The vCPUs must be paused.
    pub fn newest(
        &self,
        view: &dyn KernelView,
        layout: &TaskLayout,
        is_listed: &dyn Fn(Gva) -> bool,
    ) -> Result<Vec<Gva>, SetupError> {
        let mut tasks = Vec::new();
        for leader in backward(
            view,
            "the list of processes",
            self.head,
            layout.tasks,
            TASKS_MAX,
            is_listed,
        )? {
            // Processes of a hostile guest may share a list of threads: one bound for all of them.
            let left = TASKS_MAX.saturating_sub(tasks.len());
            let head = threads(view, layout, leader)?;
            tasks.extend(forward(view, "a process's threads", head, layout.thread_node, left)?);
        }
        Ok(tasks)
    }
}

/// Lists the threads of a process behind the last one that `is_listed`. The vCPUs must be paused.
pub(super) fn newest_threads(
    view: &dyn KernelView,
    layout: &TaskLayout,
    head: Gva,
    is_listed: &dyn Fn(Gva) -> bool,
) -> Result<Vec<Gva>, SetupError> {
    backward(
        view,
        "a process's threads",
        head,
        layout.thread_node,
        TASKS_MAX,
        is_listed,
    )
}

/// Guest-virtual address of the list head of the threads of a task's process.
pub(super) fn threads(view: &dyn KernelView, layout: &TaskLayout, task: Gva) -> Result<Gva, SetupError> {
    let at = task.wrapping_add(layout.signal);
    let signal = view.read_u64(at).map_err(|source| SetupError::Unreadable {
        what: "task->signal",
        at,
        source,
    })?;
    Ok(Gva(signal).wrapping_add(layout.thread_head))
}
