//! What is said about a task, and about the guest.

use super::TaskId;
use crate::addr::Gva;
use crate::unwind::{Frame, UnwindError};

/// One context's state with regard to the old functions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum State {
    /// In none of them.
    Clear,
    /// In one of them: its name, and the stack.
    Inside(String, Vec<Frame>),
    /// Not known.
    Unsure(Why),
    /// It was running when it was looked at; nothing is known.
    Running,
}

/// Why nothing is known of a context.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Why {
    /// Its stack could not be unwound.
    #[error("its stack holds an address that needs a closer look, and cannot be unwound")]
    Stack(#[from] UnwindError),
    /// Its stack pointer is not on its stack.
    #[error("its stack pointer {sp:#x} is not on its stack")]
    StackPointer {
        /// The saved stack pointer.
        sp: u64,
    },
    /// Its vCPU is in the kernel, but its GS base is of no CPU, or of that of another vCPU.
    #[error("vCPU {vcpu} at {rip:#x}: it cannot be told which CPU it is")]
    WhichCpu {
        /// Index of the vCPU.
        vcpu: usize,
        /// Its instruction pointer.
        rip: u64,
    },
    /// The guest has loaded or unloaded a module, or begun or ended to trace, since the tasks were looked at.
    #[error("what code the kernel has loaded has changed since the tasks were looked at")]
    CodeChanged,
    /// There are more vCPUs in user mode than CPUs that the kernel has online.
    #[error("there are more vCPUs in user mode than CPUs online")]
    TooManyVcpus,
    /// It ran, and was not looked at since.
    #[error("it was not looked at since it ran")]
    NotLookedAt,
    /// It may be reading what is going to be wiped.
    #[error("it has the address {word:#x}, in the patch's module, and may be reading there")]
    Reads {
        /// The address.
        word: u64,
    },
    /// The stacks of the tasks before it took all that a look may take.
    #[error("the guest has more stacks to unwind than are looked at")]
    TooManyFrames,
    /// A stack whose task is on no list has what it must not have.
    #[error(
        "a task that no list of tasks names, most likely because it is ending, has {holds} on its kernel stack at {stack}"
    )]
    Unlisted {
        /// Its lowest address.
        stack: Gva,
        /// What it holds.
        holds: String,
    },
    /// No vCPU is in the context of a CPU that the kernel has online, so that what its thread is doing can't be seen.
    #[error("CPU {cpu} is online, but no vCPU is in its context: it runs a nested guest, or firmware")]
    NoVcpu {
        /// The CPU.
        cpu: usize,
    },
    /// It has an address that needs a closer look, and its CPU is where no stack can be relied on to unwind.
    #[error(
        "its stack holds an address that needs a closer look, and is not unwound from the entry code (at {rip:#x})"
    )]
    Entry {
        /// Its instruction pointer.
        rip: u64,
    },
    /// Its CPU is in the middle of a task switch, or on a stack that is not known.
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
    /// Who.
    pub task: TaskId,
    /// The old function.
    pub function: String,
    /// Its stack, innermost frame first, with what of it lies below the old function; at most
    /// [`Blocker::FRAMES_MAX`] frames.
    pub stack: Vec<Frame>,
}

impl Blocker {
    /// How much of a stack is kept for a report. Every task of a hostile guest may be inside, with thousands of frames.
    pub const FRAMES_MAX: usize = 64;
}

/// A task of which it is not known whether it is inside an old function.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unsure {
    /// Who, where there is a task.
    pub task: Option<TaskId>,
    /// Why.
    pub why: Why,
}

/// Whether old functions may be changed now.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Verdict {
    /// Tasks inside an old function; at most [`Verdict::NAMED_MAX`].
    pub blockers: Vec<Blocker>,
    /// Tasks of which nothing certain is known; at most [`Verdict::NAMED_MAX`].
    pub unsure: Vec<Unsure>,
}

impl Verdict {
    /// How many tasks a verdict names.
    pub const NAMED_MAX: usize = 16;

    /// True where every context is clear of every old function.
    pub fn is_safe(&self) -> bool {
        self.blockers.is_empty() && self.unsure.is_empty()
    }
}
