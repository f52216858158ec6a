//! Hooked returns: return addresses that a tracer has replaced on the stack.
//!
//! To see a function return, the function graph tracer and kretprobes replace its return address on the stack by the address of a trampoline
//! (`return_to_handler`, `arch_rethook_trampoline`), and keep the real one elsewhere:
//! - function graph: `task->ret_stack`, up to 6.9 an array of `struct ftrace_ret_stack` up to index
//!   `curr_ret_stack`, from 6.10 words up to offset `curr_ret_stack` in which such structs lie (kernel/trace/fgraph.c);
//! - rethook: the list `task->rethooks` of `struct rethook_node` (kernel/trace/rethook.c, 6.1's kretprobes and later);
//! - kretprobes up to 5.10: [`super::kretprobes`].
//!
//! A scan for old functions would find a task safe that is about to return into one. Therefore only a walk decides if a trampoline is on a
//! stack. Both tracers remember the address on the stack, so that the walk finds the return address that belongs there, in whatever order
//! they are kept. If it finds none, the stack is not safe. That happens in a kernel that keeps them in another way (kretprobes of 5.11 to
//! 5.17), and in one that was paused after it replaced the address and before it recorded it (`rethook_hook`).

use super::error::{SetupError, UnwindError};
use super::kretprobes::Kretprobes;
use super::view::KernelView;
use crate::addr::Gva;
use crate::btf::BtfError;
use std::ops::Range;

/// Trampolines of the function graph tracer, whose addresses replace return addresses on the stack.
const GRAPH_TRAMPOLINE: &str = "return_to_handler";
/// The same for kretprobes, by their names over time.
const PROBE_TRAMPOLINES: [&str; 3] = [
    "arch_rethook_trampoline",
    "__kretprobe_trampoline",
    "kretprobe_trampoline",
];
/// Functions in which the real return address may be in a register only, because they are restoring it.
const HANDLERS: [&str; 5] = [
    "ftrace_return_to_handler",
    "__ftrace_return_to_handler",
    "rethook_trampoline_handler",
    "arch_rethook_trampoline_callback",
    "trampoline_handler",
];
/// Most hooked returns of one task. Graph tracing keeps 50 (`FTRACE_RETFUNC_DEPTH`) or a page; kretprobes nest less.
const HIDDEN_MAX: usize = 512;
/// Name of the entries in [`UnwindError::Unreadable`].
const RECORDS: &str = "the return addresses that a tracer has taken off the stack";
const TOO_MANY: UnwindError = UnwindError::TooMany {
    what: "return addresses that a tracer has taken off the stack",
    max: HIDDEN_MAX,
};

/// A return address that a tracer keeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HookedReturn {
    /// Address on the stack where it belongs.
    pub slot: u64,
    /// The return address.
    pub ret: u64,
}

/// Where the tracers of a kernel keep return addresses.
#[derive(Debug, Clone)]
pub struct HookedReturns {
    trampolines: Vec<Gva>,
    /// Address ranges of the trampolines and their handlers, sorted.
    code: Vec<Range<Gva>>,
    graph: Option<Graph>,
    rethook: Option<Rethook>,
    kretprobes: Option<Kretprobes>,
}

#[derive(Debug, Clone)]
struct Graph {
    index: u64,
    stack: u64,
    /// Bytes for each step of the index.
    step: u64,
    /// Steps in use when the index is 0.
    at_zero: i64,
    ret: u64,
    slot: u64,
    entry: u64,
}

#[derive(Debug, Clone)]
struct Rethook {
    first: u64,
    next: u64,
    ret: u64,
    frame: u64,
}

impl HookedReturns {
    /// Looks up the trampolines and the layouts that this kernel has.
    pub fn read(view: &dyn KernelView) -> Result<Self, SetupError> {
        let names = || PROBE_TRAMPOLINES.iter().chain([&GRAPH_TRAMPOLINE]);
        let mut code: Vec<_> = names()
            .chain(&HANDLERS)
            .filter_map(|name| view.symbol_range(name))
            .collect();
        code.sort_by_key(|range| range.start);
        Ok(Self {
            trampolines: names().filter_map(|name| view.symbol(name)).collect(),
            code,
            graph: graph(view)?,
            rethook: rethook(view)?,
            kretprobes: Kretprobes::find(view)?,
        })
    }

    /// True for the address of a trampoline, which replaces a return address.
    pub fn is_trampoline(&self, at: Gva) -> bool {
        self.trampolines.contains(&at)
    }

    /// True for code in which a real return address may be in a register only.
    pub fn is_returning(&self, at: Gva) -> bool {
        self.code.iter().any(|range| range.contains(&at))
    }

    /// True for a word that shows that the task may have hooked returns.
    pub fn concerns(&self, word: u64) -> bool {
        self.code
            .iter()
            .any(|range| range.start.0 <= word && word <= range.end.0)
    }

    /// The hooked returns of a task. Some of them may have returned already.
    ///
    /// # Errors
    ///
    /// The tracers' entries cannot be read.
    pub fn of_task(&self, view: &dyn KernelView, task: Gva) -> Result<Vec<HookedReturn>, UnwindError> {
        let mut found = Vec::new();
        if let Some(graph) = &self.graph {
            graph.collect(view, task, &mut found)?;
        }
        if let Some(rethook) = &self.rethook {
            rethook.collect(view, task, &mut found)?;
        }
        if let Some(kretprobes) = &self.kretprobes {
            kretprobes.collect(view, task, &mut found)?;
        }
        Ok(found)
    }

    /// The real return address for the trampoline that is at `slot` on the stack. A function that both tracers trace has two entries.
    ///
    /// # Errors
    ///
    /// No entry has the return address.
    pub fn resolve(&self, hidden: &[HookedReturn], slot: u64) -> Result<Gva, UnwindError> {
        let mut real = hidden
            .iter()
            .filter(|one| one.slot == slot && !self.is_trampoline(Gva(one.ret)));
        let not_found = UnwindError::HiddenReturn { slot };
        let first = real.next().ok_or(not_found.clone())?;
        if real.any(|other| other.ret != first.ret) {
            return Err(not_found);
        }
        Ok(Gva(first.ret))
    }
}

impl Graph {
    fn collect(&self, view: &dyn KernelView, task: Gva, found: &mut Vec<HookedReturn>) -> Result<(), UnwindError> {
        let base = word(view, task.wrapping_add(self.stack))?;
        let at = task.wrapping_add(self.index);
        let index = view
            .read_u32(at)
            .map_err(|source| UnwindError::Unreadable {
                what: RECORDS,
                at: at.0,
                source,
            })?
            .cast_signed();
        let steps = u64::try_from(i64::from(index) + self.at_zero).unwrap_or(0);
        if base == 0 {
            // The task was never traced.
            return Ok(());
        }
        let bytes = steps
            .checked_mul(self.step)
            .filter(|&bytes| bytes <= 8 * HIDDEN_MAX as u64);
        let bytes = bytes.ok_or(TOO_MANY)?;
        let mut buffer = vec![0; usize::try_from(bytes).unwrap_or(0)];
        view.read(Gva(base), &mut buffer)
            .map_err(|source| UnwindError::Unreadable {
                what: RECORDS,
                at: base,
                source,
            })?;
        let words: Vec<u64> = buffer
            .as_chunks::<8>()
            .0
            .iter()
            .map(|word| u64::from_le_bytes(*word))
            .collect();
        // In the newer form, an entry may start at any word: every word is tried as the start of one.
        let stride = if self.step == 8 {
            1
        } else {
            usize::try_from(self.step / 8).unwrap_or(1).max(1)
        };
        for start in (0..words.len()).step_by(stride) {
            let at = |offset: u64| words.get(start + usize::try_from(offset / 8).ok()?).copied();
            if let (Some(ret), Some(slot), true) = (at(self.ret), at(self.slot), at(self.entry - 8).is_some()) {
                found.push(HookedReturn { slot, ret });
            }
        }
        Ok(())
    }
}

impl Rethook {
    fn collect(&self, view: &dyn KernelView, task: Gva, found: &mut Vec<HookedReturn>) -> Result<(), UnwindError> {
        let mut node = word(view, task.wrapping_add(self.first))?;
        for _ in 0..HIDDEN_MAX {
            if node == 0 {
                return Ok(());
            }
            let start = Gva(node).wrapping_offset(-self.next.cast_signed());
            let (ret, slot) = (
                word(view, start.wrapping_add(self.ret))?,
                word(view, start.wrapping_add(self.frame))?,
            );
            found.push(HookedReturn { slot, ret });
            node = word(view, Gva(node))?;
        }
        Err(TOO_MANY)
    }
}

fn word(view: &dyn KernelView, at: Gva) -> Result<u64, UnwindError> {
    view.read_u64(at).map_err(|source| UnwindError::Unreadable {
        what: RECORDS,
        at: at.0,
        source,
    })
}

fn graph(view: &dyn KernelView) -> Result<Option<Graph>, BtfError> {
    let task = view.btf().structure("task_struct")?;
    let (Some(index), Some(stack)) = (task.try_member("curr_ret_stack"), task.try_member("ret_stack")) else {
        return Ok(None);
    };
    let entry = view.btf().structure("ftrace_ret_stack")?;
    let points_to_entries = view
        .btf()
        .pointee(stack.type_id)
        .and_then(|id| view.btf().structure_of(id).ok())
        .is_some();
    let (step, at_zero) = if points_to_entries { (entry.size(), 1) } else { (8, 0) };
    let (ret, slot) = (entry.offset("ret")?, entry.offset("retp")?);
    let (index, stack) = (index.offset(), stack.offset());
    Ok(Some(Graph {
        index,
        stack,
        step,
        at_zero,
        ret,
        slot,
        entry: entry.size().max(8),
    }))
}

fn rethook(view: &dyn KernelView) -> Result<Option<Rethook>, BtfError> {
    let task = view.btf().structure("task_struct")?;
    let Some(first) = task.try_member("rethooks.first") else {
        return Ok(None);
    };
    let node = view.btf().structure("rethook_node")?;
    let (next, ret, frame) = (node.offset("llist")?, node.offset("ret_addr")?, node.offset("frame")?);
    Ok(Some(Rethook {
        first: first.offset(),
        next,
        ret,
        frame,
    }))
}
