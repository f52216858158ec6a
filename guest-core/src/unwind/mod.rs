//! Which functions a context of the guest's kernel is in: stacks, unwound by the kernel's own ORC tables.
//!
//! - [`OldCode`], [`mod@scan`]: the cheap first pass over a stack's words;
//! - [`CodeMap`]: all known code, and its ORC tables;
//! - [`Unwinder`]: the walk from frame to frame;
//! - [`Returns`]: return addresses that a tracer has taken off the stack.
//!
//! A stack that cannot be unwound to its end is not safe; nothing here guesses. Who has which stack is told by
//! [`crate::task`].

mod bpf;
pub mod code;
mod error;
mod kretprobes;
pub(crate) mod list;
mod modules;
pub mod orc;
pub mod returns;
pub mod scan;
pub mod stack;
pub mod table;
mod trampolines;
mod view;
pub mod walk;

#[cfg(test)]
mod bpf_tests;
#[cfg(test)]
mod orc_tests;
#[cfg(test)]
mod scan_tests;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod walk_tests;

pub use code::{CodeMap, PatchCode};
pub use error::{SetupError, UnwindError};
pub use returns::Returns;
pub use scan::{OldCode, OldFunction, scan};
pub use stack::{Stack, StackKind};
pub use table::OrcTable;
pub use view::KernelView;
pub use walk::{Frame, PtRegs, Start, Unwinder};
