//! Finds kernel stacks whose task is on no list.
//!
//! A task can run the kernel's code, and sleep in it, without being on a list that [`super::list`] walks. These are the cases, with their
//! places in the kernel (of 6.1.170):
//!
//! | task | kernel source | how it is found |
//! |---|---|---|
//! | ending: unhashed by `release_task()`, and still in the rest of `do_exit()` | kernel/exit.c: `exit_notify()`, `__unhash_process()` | here, by its stack |
//! | ending and reaped by its parent, or replaced as leader (`de_thread()`, fs/exec.c) | kernel/exit.c: `wait_task_zombie()` | here, by its stack |
//! | being forked | kernel/fork.c: `copy_process()` links a task before `wake_up_new_task()` lets it run | it has not run yet |
//! | idle, also of a CPU that is off | kernel/fork.c: `fork_idle()`, kernel/sched/core.c: `init_idle()` | `rq->idle` of every possible CPU |
//! | kernel threads, workers, io_uring's and vhost's threads | kernel/fork.c: all come from `copy_process()` | listed |
//!
//! With `CONFIG_VMAP_STACK` (since 4.9) a task's stack is an area of vmalloc: pages in a row at a multiple of their size,
//! and a page behind them that is not mapped (kernel/fork.c: `alloc_thread_stack_node`). Before the task runs, the word at the stack's
//! start is set to `STACK_END_MAGIC`. When the stack is freed, either RCU (`thread_stack_delayed_free`, since 5.18) or vmalloc
//! (`vfree_atomic`) overwrites the word with a list pointer; or the stack is unchanged among the few that each CPU keeps
//! (`cached_stacks`). A stack with the word that is neither cached nor a listed task's may be in use by an unlisted task.
//!
//! The page tables of vmalloc are read, not its list of areas: an entry of a table is valid or not, whatever the guest changes meanwhile,
//! but a list may be torn while it changes.

use super::cpus::Cpus;
use super::layout::TaskLayout;
use crate::addr::Gva;
use crate::paging::PAGE_SIZE;
use crate::unwind::{KernelView, SetupError};
use std::ops::Range;

/// `STACK_END_MAGIC`, include/uapi/linux/magic.h.
const STACK_END_MAGIC: u64 = 0x57ac_6e9d;
/// `NR_CACHED_STACKS`, kernel/fork.c. In a kernel with more, the others would count as stacks in use.
const CACHED_STACKS: u64 = 2;
/// Most page tables of the vmalloc area that are read. They map 128 GiB, more than a guest uses.
const TABLES_MAX: usize = 1 << 16;
/// Most stacks of unlisted tasks that are accepted, more than a guest has.
const UNLISTED_MAX: usize = 1 << 12;

/// Where the kernel keeps the stacks of tasks.
#[derive(Debug, Clone)]
pub(super) struct StackArea {
    vmalloc: Range<Gva>,
    /// Per-CPU address of pointers to `struct vm_struct`, and the offset of `addr` in that structure.
    cached: Option<(Gva, u64)>,
    pages: usize,
    bytes: u64,
}

impl StackArea {
    pub fn read(view: &dyn KernelView, layout: &TaskLayout) -> Result<Self, SetupError> {
        let word = |name: &str| {
            let at = view.symbol(name).ok_or_else(|| SetupError::NoSymbol(name.to_owned()))?;
            let what = "the bounds of the vmalloc area";
            let word = view.read_u64(at);
            word.map(Gva)
                .map_err(|source| SetupError::Unreadable { what, at, source })
        };
        let cached = match view.symbol("cached_stacks") {
            Some(at) => Some((at, view.btf().structure("vm_struct")?.offset("addr")?)),
            None => None,
        };
        Ok(Self {
            // vmalloc is between the direct map and vmemmap (`kaslr_regions`, arch/x86/mm/kaslr.c).
            vmalloc: word("vmalloc_base")?..word("vmemmap_base")?,
            cached,
            pages: usize::try_from(layout.stack_bytes / PAGE_SIZE).unwrap_or(0),
            bytes: layout.stack_bytes,
        })
    }

    /// Finds the stacks that an unlisted task may use. `owned` are the stacks of the listed tasks, sorted.
    ///
    /// # Errors
    ///
    /// The kernel's stacks are not as described above, so that the search would find nothing.
    pub fn unlisted(&self, view: &dyn KernelView, cpus: &Cpus, owned: &[Gva]) -> Result<Vec<Gva>, SetupError> {
        let (mut found, mut is_understood) = (Vec::new(), false);
        let cached = self.cached(view, cpus);
        let whole = view.visit_small_tables(&self.vmalloc, TABLES_MAX, &mut |at, pages| {
            for (index, group) in pages.chunks_exact(self.pages.max(1)).enumerate() {
                let behind = pages.get((index + 1) * group.len());
                let (Some(&Some(first)), true) = (group.first(), group.iter().all(Option::is_some)) else {
                    continue;
                };
                if behind.is_some_and(Option::is_some) {
                    continue;
                }
                let stack = at.wrapping_add(index as u64 * self.bytes);
                let is_owned = owned.binary_search(&stack).is_ok();
                if (is_owned && is_understood) || cached.contains(&stack) {
                    continue;
                }
                let mut word = [0; 8];
                let is_stack =
                    view.read_physical(first, &mut word).is_ok() && u64::from_le_bytes(word) == STACK_END_MAGIC;
                match is_owned {
                    true => is_understood = is_stack,
                    false if is_stack && found.len() <= UNLISTED_MAX => found.push(stack),
                    false => {}
                }
            }
        });
        let not_understood = |found: String, expected: &str| SetupError::NotUnderstood {
            what: "the kernel stacks of tasks",
            found,
            expected: expected.to_owned(),
        };
        let unreadable = |source| SetupError::Unreadable {
            what: "the page tables of vmalloc",
            at: self.vmalloc.start,
            source,
        };
        if !whole.map_err(unreadable)? {
            let found = format!("more than {TABLES_MAX} page tables");
            return Err(not_understood(found, "fewer in the vmalloc area"));
        }
        if found.len() > UNLISTED_MAX {
            let found = format!("more than {UNLISTED_MAX} of tasks that no list names");
            return Err(not_understood(found, "a few at the most"));
        }
        if !is_understood {
            let expected = "each a vmalloc area that begins with STACK_END_MAGIC (CONFIG_VMAP_STACK)";
            return Err(not_understood(
                format!("none of {} in {:?}", owned.len(), self.vmalloc),
                expected,
            ));
        }
        Ok(found)
    }

    /// Those of `stacks` that may still be in use.
    pub fn still(&self, view: &dyn KernelView, cpus: &Cpus, stacks: &[Gva]) -> Vec<Gva> {
        if stacks.is_empty() {
            return Vec::new();
        }
        let cached = self.cached(view, cpus);
        let in_use = |stack: &&Gva| view.read_u64(**stack) == Ok(STACK_END_MAGIC) && !cached.contains(stack);
        stacks.iter().filter(in_use).copied().collect()
    }

    /// The freed stacks that CPUs keep for new tasks.
    fn cached(&self, view: &dyn KernelView, cpus: &Cpus) -> Vec<Gva> {
        let Some((cached, addr)) = self.cached else {
            return Vec::new();
        };
        let slots = (0..cpus.count()).flat_map(|cpu| (0..CACHED_STACKS).map(move |slot| (cpu, slot)));
        let stack = |(cpu, slot): (usize, u64)| {
            let area = view.read_u64(cpus.on(cpu, cached).wrapping_add(8 * slot)).ok()?;
            view.read_u64(Gva(area).wrapping_add(addr)).ok().map(Gva)
        };
        slots.filter_map(stack).collect()
    }
}
