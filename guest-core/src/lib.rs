//! The patch core of vmpatch: given a guest's physical memory and its vCPUs, find the Linux kernel in it and
//! change that kernel's functions. No I/O, no async, no unsafe; any VMM can embed it.
//!
//! In the order in which a patch passes through them:
//!
//! | | |
//! |---|---|
//! | reach the guest | [`addr`], [`memory`], [`vcpu`]: addresses, memory, registers; [`machine`]: a VM that can be paused |
//! | understand its kernel | [`paging`]; [`kernel`]: image, symbols, ftrace, locks, modules; [`btf`]: its types |
//! | read the patch | [`module`]: a livepatch module, selected, placed and linked as the kernel's loader would do it |
//! | find it a place | [`registry`]: the text cave and the registry in it; [`per_cpu`]; [`guest_module`]: what the guest knows of it |
//! | redirect | [`redirect`]: the jump from an old function to a new one; [`pattern`]: the code that the old one must have |
//! | plan | [`reads`]: what a plan is made from; [`change`]: one write that knows what it replaces; [`plan`]: all of an apply, a revert, a recovery |
//! | know when it is safe | [`unwind`]: one stack; [`task`]: every stack of the guest |
//! | commit | [`commit`]: stage, pause, check, write, read back, resume, or restore |
//! | try again, recover, or end | [`transaction`]: decided without clock or guest |
//! | all of it, for embedders | [`guest`]: open a guest, check, apply, revert, finish, status, recover |
//!
//! An embedder gives guest memory by guest-physical address ([`PhysMemory`]) and the vCPUs' registers ([`Registers`]); to change a guest,
//! also a machine that can pause ([`machine::Machine`]). `examples/memory_dump.rs` reads a guest from a file, `examples/embedder.rs`
//! applies a patch. A guest without a kernel is an error, with the reason:
//!
//! ```
//! use guest_core::{Gpa, Kernel, MemoryError, PhysMemory, Registers};
//! use std::ops::Range;
//!
//! /// One page of RAM at address 0, which holds zeroes.
//! struct Zeroes([Range<Gpa>; 1]);
//!
//! impl PhysMemory for Zeroes {
//!     fn read(&self, at: Gpa, buf: &mut [u8]) -> Result<(), MemoryError> {
//!         let len = buf.len();
//!         if !self.0[0].contains(&at) || len as u64 > self.0[0].end.0 - at.0 {
//!             return Err(MemoryError::NotRam { at, len });
//!         }
//!         buf.fill(0);
//!         Ok(())
//!     }
//!
//!     fn write(&self, at: Gpa, bytes: &[u8]) -> Result<(), MemoryError> {
//!         Err(MemoryError::NotRam { at, len: bytes.len() })
//!     }
//!
//!     fn ram(&self) -> &[Range<Gpa>] {
//!         &self.0
//!     }
//! }
//!
//! let memory = Zeroes([Gpa(0)..Gpa(4096)]);
//! let in_firmware = Registers::default();
//! let error = Kernel::find(&memory, &[in_firmware]).unwrap_err();
//! assert_eq!(error.to_string(), "finding the kernel image");
//! ```
#![forbid(unsafe_code)]

pub mod addr;
pub mod btf;
pub mod change;
pub mod commit;
pub mod guest;
pub mod guest_module;
pub mod kernel;
pub mod machine;
pub mod memory;
pub mod module;
pub mod paging;
pub mod pattern;
pub mod per_cpu;
pub mod plan;
pub mod reads;
pub mod redirect;
pub mod registry;
pub mod task;
mod trampoline;
pub mod transaction;
pub mod unwind;
pub mod vcpu;

#[cfg(test)]
mod testing;
mod text;

pub use addr::{Gpa, Gva, Hva};
pub use kernel::Kernel;
pub use memory::{MemoryError, PhysMemory, VirtMemory};
pub use vcpu::Registers;
