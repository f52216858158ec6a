//! Finds the functions that a context of the guest's kernel is in: unwinds stacks with the kernel's own ORC tables.
//!
//! - [`OldCode`], [`mod@scan`]: the cheap first pass over a stack's words;
//! - [`CodeMap`]: all code of the kernel, with its ORC tables;
//! - [`Unwinder`]: the walk from frame to frame;
//! - [`HookedReturns`]: return addresses that a tracer has replaced on the stack.
//!
//! A stack that cannot be unwound to its end is not safe; nothing here guesses. [`crate::task`] tells which task has which stack.

mod bpf;
pub mod code;
mod error;
pub mod hooked_returns;
mod kretprobes;
pub(crate) mod list;
mod modules;
pub mod orc;
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
pub use hooked_returns::HookedReturns;
pub use scan::{OldCode, OldFunction, scan};
pub use stack::{Stack, StackKind};
pub use table::OrcTable;
pub use view::KernelView;
pub use walk::{Frame, PtRegs, Start, Unwinder};
