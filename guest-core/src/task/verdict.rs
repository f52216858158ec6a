//! The result of a check: of one task, and of the whole guest.

use super::TaskId;
use crate::addr::Gva;
use crate::unwind::{Frame, UnwindError};

/// Whether a context is inside an old function.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum State {
    /// In none of them.
    Clear,
    /// In one of them: the name of the function, and the stack.
    Inside(String, Vec<Frame>),
    /// Not known.
    Unsure(Why),
    /// Not known: it was running when it was checked.
    Running,
}

/// Why a context cannot be found safe.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Why {
    /// Its stack could not be unwound.
    #[error("its stack holds an address that may be of an old function, and cannot be unwound")]
    Stack(#[from] UnwindError),
    /// Its stack pointer is not on its stack.
    #[error("its stack pointer {sp:#x} is not on its stack")]
    StackPointer {
        /// The saved stack pointer.
        sp: u64,
    },
    /// A vCPU is in the kernel, but its GS base is of no CPU, or of another vCPU's CPU.
    #[error("vCPU {vcpu} at {rip:#x}: it cannot be told which CPU it is")]
    WhichCpu {
        /// Index of the vCPU.
        vcpu: usize,
        /// Its instruction pointer.
        rip: u64,
    },
    /// The guest has loaded or unloaded a module, or started or stopped tracing, since the tasks were checked.
    #[error("the kernel has loaded or unloaded code since the tasks were checked")]
    CodeChanged,
    /// More vCPUs are in user mode than the kernel has CPUs online.
    #[error("there are more vCPUs in user mode than CPUs online")]
    TooManyVcpus,
    /// It ran, and was not checked since.
    #[error("it was not checked since it ran")]
    NotChecked,
    /// It may be reading memory that is going to be wiped.
    #[error("it has the address {word:#x}, in the patch's module, and may be reading there")]
    References {
        /// The address.
        word: u64,
    },
    /// The stacks of the tasks before it had as many frames as are walked at most.
    #[error("the guest has more stack frames to unwind than vmpatch walks")]
    TooManyFrames,
    /// The stack of an unlisted task holds an address that it must not hold.
    #[error(
        "a task that no list of tasks names, most likely because it is ending, has {holds} on its kernel stack at {stack}"
    )]
    Unlisted {
        /// Lowest guest-virtual address of the stack.
        stack: Gva,
        /// What the stack holds.
        holds: String,
    },
    /// No vCPU is in the context of a CPU that the kernel has online, so that the CPU's task cannot be checked.
    #[error("CPU {cpu} is online, but no vCPU is in its context: it runs a nested guest, or firmware")]
    NoVcpu {
        /// The CPU.
        cpu: usize,
    },
    /// It has an address that may be of an old function, and its CPU is in the entry code, where unwinding is unreliable.
    #[error(
        "its stack holds an address that may be of an old function, and is not unwound from the entry code (at {rip:#x})"
    )]
    Entry {
        /// Its instruction pointer.
        rip: u64,
    },
    /// Its CPU is in the middle of a task switch, or on an unknown stack.
    #[error("CPU {cpu} at {rip:#x}: stack pointer {sp:#x} is on no stack that it should be on")]
    Between {
        /// The CPU.
        cpu: usize,
        /// Its instruction pointer.
        rip: u64,
        /// Its stack pointer.
        sp: u64,
    },
}

/// A task inside an old function.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Blocker {
    /// The task.
    pub task: TaskId,
    /// Name of the old function.
    pub function: String,
    /// Its stack, innermost frame first, up to [`Blocker::FRAMES_MAX`] frames.
    pub stack: Vec<Frame>,
}

impl Blocker {
    /// Most frames of a stack that a report keeps. In a hostile guest, every task may be inside, with thousands of frames.
    pub const FRAMES_MAX: usize = 64;
}

/// A task that may be inside an old function.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unsure {
    /// The task; `None` where the reason concerns the whole guest.
    pub task: Option<TaskId>,
    /// Why it cannot be found safe.
    pub why: Why,
}

/// Whether old functions may be changed now.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Verdict {
    /// Tasks inside an old function; at most [`Verdict::NAMED_MAX`].
    pub blockers: Vec<Blocker>,
    /// Tasks that may be inside an old function; at most [`Verdict::NAMED_MAX`].
    pub unsure: Vec<Unsure>,
    /// All tasks inside an old function, each with the name of the innermost one.
    pub inside: Vec<(Gva, String)>,
}

impl Verdict {
    /// Most tasks that a verdict names in each list.
    pub const NAMED_MAX: usize = 16;

    /// True where every context is clear of every old function.
    pub fn is_safe(&self) -> bool {
        self.blockers.is_empty() && self.unsure.is_empty()
    }
}
