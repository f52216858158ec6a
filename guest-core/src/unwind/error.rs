//! Why a stack could not be unwound, or why the kernel's means for it are not understood.

use crate::addr::Gva;
use crate::btf::BtfError;
use crate::memory::MemoryError;

/// Why what unwinding rests on was not found in the kernel. Nothing can be said about any stack then.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SetupError {
    /// A symbol that is needed is not there, or not unique.
    #[error("the kernel has no single symbol {0}")]
    NoSymbol(String),
    /// A struct or member that is needed is not there.
    #[error("the kernel's types lack what unwinding needs")]
    Btf(#[from] BtfError),
    /// Something could not be read.
    #[error("reading {what} at {at}")]
    Unreadable {
        /// What was being read.
        what: &'static str,
        /// Where.
        at: Gva,
        /// Why.
        source: MemoryError,
    },
    /// Something is not as every known kernel has it.
    #[error("{what}: found {found}, expected {expected}")]
    NotUnderstood {
        /// What was looked at.
        what: &'static str,
        /// What it holds.
        found: String,
        /// What it should hold.
        expected: String,
    },
}

/// Why a stack could not be unwound to its end. Such a stack is not safe.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UnwindError {
    /// A frame's code is no text of the kernel, of a module, of a patch or of BPF: a kprobe's slot, or garbage.
    #[error("frame {ip} (stack pointer {sp:#x}) is not in known kernel text")]
    NotText {
        /// The frame's instruction or return address.
        ip: Gva,
        /// Its stack pointer.
        sp: u64,
    },
    /// The frame is in a module that was built without ORC, or whose table is not understood.
    #[error("frame {ip} is in the module {module}, which has no ORC table")]
    NoTable {
        /// The frame's instruction or return address.
        ip: Gva,
        /// The module's name.
        module: String,
    },
    /// The frame is in code that the kernel's BPF compiler has made, and it is not certain that it has a frame pointer there.
    #[error("frame {ip} is in BPF's {name}, {why}")]
    Bpf {
        /// The frame's instruction or return address.
        ip: Gva,
        /// The name by which `/proc/kallsyms` lists the code.
        name: String,
        /// What is in the way.
        why: &'static str,
    },
    /// The code has no ORC table, or its entry says that the stack is not known there.
    #[error("frame {ip}: its stack layout is unknown (no ORC entry)")]
    NoOrc {
        /// The frame's instruction or return address.
        ip: Gva,
    },
    /// An ORC entry with a register or a type that does not exist.
    #[error("frame {ip}: its ORC entry holds {what} {found}")]
    BadOrc {
        /// The frame's instruction or return address.
        ip: Gva,
        /// Which field.
        what: &'static str,
        /// Its value.
        found: u64,
    },
    /// The entry needs a register whose value at that point is not known.
    #[error("frame {ip}: the value of {register} is not known there")]
    MissingRegister {
        /// The frame's instruction or return address.
        ip: Gva,
        /// Name of the register.
        register: &'static str,
    },
    /// The next frame lies on none of the task's and CPU's stacks, or on one that was already left.
    #[error("frame {ip}: {at:#x} is on no stack of this task that is still to come")]
    OffStack {
        /// The frame's instruction or return address.
        ip: Gva,
        /// The address that should be on a stack.
        at: u64,
    },
    /// The next frame would lie further down the same stack.
    #[error("frame {ip}: the stack pointer goes from {from:#x} back to {to:#x}")]
    WrongWay {
        /// The frame's instruction or return address.
        ip: Gva,
        /// This frame's stack pointer.
        from: u64,
        /// The next one's.
        to: u64,
    },
    /// The walk would end before the stack does: what is further out was not seen.
    #[error("frame {ip}: its stack seems to end at {at:#x}, where it does not")]
    NotTheEnd {
        /// The frame's instruction or return address.
        ip: Gva,
        /// Where the stack would end.
        at: u64,
    },
    /// Saved registers whose code segment is neither the kernel's nor user mode's: they are no registers.
    #[error("frame {ip}: the registers saved there have the code segment {found:#x}")]
    BadSegment {
        /// The frame's instruction or return address.
        ip: Gva,
        /// The segment.
        found: u64,
    },
    /// More frames than any stack has.
    #[error("more than {0} frames")]
    TooMany(usize),
    /// A tracer has taken a return address off the stack, and where it put it was not found.
    #[error("a traced return is in flight: the return address that belongs at {slot:#x} was not found")]
    HiddenReturn {
        /// Where on the stack the tracer's trampoline stands instead.
        slot: u64,
    },
    /// The code that gives a return address back to a traced function is running.
    #[error("frame {ip}: a traced return is being given back")]
    Returning {
        /// The frame's instruction or return address.
        ip: Gva,
    },
    /// The stack could not be read.
    #[error("reading the stack at {at:#x}")]
    Unreadable {
        /// Where.
        at: u64,
        /// Why.
        source: MemoryError,
    },
}
