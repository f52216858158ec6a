//! Why a stack cannot be unwound, or why a kernel's stacks cannot be unwound at all.

use crate::addr::Gva;
use crate::btf::BtfError;
use crate::memory::MemoryError;

/// Why the kernel's stacks cannot be unwound at all: something that unwinding needs was not found.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SetupError {
    /// The kernel lacks a symbol, or has several of that name.
    #[error("the kernel has no single symbol {0}")]
    NoSymbol(String),
    /// The kernel lacks a structure or member.
    #[error("the kernel's types lack what unwinding needs")]
    Btf(#[from] BtfError),
    /// Guest memory cannot be read.
    #[error("reading {what} at {at}")]
    Unreadable {
        /// What was being read.
        what: &'static str,
        /// Guest-virtual address.
        at: Gva,
        /// Why.
        source: MemoryError,
    },
    /// The kernel's own ORC table has no entry for a function that every kernel has.
    #[error("reading the kernel's ORC entry for {function}")]
    NoOrcEntry {
        /// The function.
        function: &'static str,
        /// Why.
        source: Box<UnwindError>,
    },
    /// The kernel has something in an unknown form.
    #[error("{what}: found {found}, expected {expected}")]
    NotUnderstood {
        /// What was examined.
        what: &'static str,
        /// What was found.
        found: String,
        /// What was expected.
        expected: String,
    },
}

/// Why a stack cannot be unwound to its end. Such a stack is not safe.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UnwindError {
    /// A frame's code belongs neither to the kernel nor to a module, a patch or BPF: it is a kprobe's slot, or garbage.
    #[error("frame {ip} (stack pointer {sp:#x}) is in unknown code")]
    NotText {
        /// The frame's instruction or return address.
        ip: Gva,
        /// Its stack pointer.
        sp: u64,
    },
    /// The frame is in a module that was built without ORC, or whose table is too long.
    #[error("frame {ip} is in the module {module}, which has no ORC table")]
    NoTable {
        /// The frame's instruction or return address.
        ip: Gva,
        /// The module's name.
        module: String,
    },
    /// The frame is in BPF's code, and may not have a frame pointer there.
    #[error("frame {ip} is in BPF's {name}, {why}")]
    Bpf {
        /// The frame's instruction or return address.
        ip: Gva,
        /// The name by which `/proc/kallsyms` lists the code.
        name: String,
        /// Why it may have no frame pointer.
        why: &'static str,
    },
    /// The code has no ORC table, or its ORC entry says that the stack layout is unknown.
    #[error("frame {ip}: its stack layout is unknown (no ORC entry)")]
    NoOrc {
        /// The frame's instruction or return address.
        ip: Gva,
    },
    /// The ORC entry has a register or a type that does not exist.
    #[error("frame {ip}: its ORC entry holds {what} {found}")]
    BadOrc {
        /// The frame's instruction or return address.
        ip: Gva,
        /// The field.
        what: &'static str,
        /// Its value.
        found: u64,
    },
    /// The ORC entry needs a register whose value is unknown there.
    #[error("frame {ip}: the value of {register} is unknown there")]
    MissingRegister {
        /// The frame's instruction or return address.
        ip: Gva,
        /// Name of the register.
        register: &'static str,
    },
    /// The next frame is on no stack of the task or CPU, or on one that the walk has left.
    #[error("frame {ip}: {at:#x} is on no stack of this task that the walk may still use")]
    OffStack {
        /// The frame's instruction or return address.
        ip: Gva,
        /// The address that should be on a stack.
        at: u64,
    },
    /// The next frame would be at a lower address of the same stack.
    #[error("frame {ip}: the stack pointer goes from {from:#x} back to {to:#x}")]
    WrongWay {
        /// The frame's instruction or return address.
        ip: Gva,
        /// This frame's stack pointer.
        from: u64,
        /// The next one's.
        to: u64,
    },
    /// The walk would end before the stack does, and would miss outer frames.
    #[error("frame {ip}: its stack seems to end at {at:#x}, where it does not")]
    NotTheEnd {
        /// The frame's instruction or return address.
        ip: Gva,
        /// The address at which the stack would end.
        at: u64,
    },
    /// Saved registers have a code segment that is neither the kernel's nor user mode's: they are no registers.
    #[error("frame {ip}: the registers saved there have the code segment {found:#x}")]
    BadSegment {
        /// The frame's instruction or return address.
        ip: Gva,
        /// The segment.
        found: u64,
    },
    /// The task has more of something than any task has: a cycle, or garbage.
    #[error("more than {max} {what}")]
    TooMany {
        /// What there are too many of.
        what: &'static str,
        /// The maximum.
        max: usize,
    },
    /// A tracer has replaced a return address on the stack, and its copy of the address was not found.
    #[error("a tracer has replaced the return address at {slot:#x}, and its copy was not found")]
    HiddenReturn {
        /// Address on the stack that holds the tracer's trampoline instead.
        slot: u64,
    },
    /// The tracer's code that restores a return address is running.
    #[error("frame {ip}: a tracer is restoring a return address")]
    Returning {
        /// The frame's instruction or return address.
        ip: Gva,
    },
    /// Guest memory cannot be read.
    #[error("reading {what} at {at:#x}")]
    Unreadable {
        /// What was being read.
        what: &'static str,
        /// Guest-virtual address.
        at: u64,
        /// Why.
        source: MemoryError,
    },
}
