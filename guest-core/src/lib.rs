//! The patch core of vmpatch: given a guest's physical memory and its vCPUs, find the Linux kernel in it and
//! change that kernel's functions. No I/O, no async, no unsafe; any VMM can embed it.
#![forbid(unsafe_code)]

pub mod addr;
pub mod btf;
pub mod change;
pub mod commit;
pub mod guest_module;
pub mod kernel;
pub mod machine;
pub mod memory;
pub mod module;
pub mod paging;
pub mod pattern;
pub mod per_cpu;
pub mod place;
pub mod plan;
pub mod reads;
pub mod redirect;
pub mod task;
pub mod unwind;
pub mod vcpu;

#[cfg(test)]
mod testing;
mod text;

pub use addr::{Gpa, Gva};
pub use kernel::Kernel;
pub use memory::{MemoryError, PhysMemory, VirtMemory};
pub use vcpu::Registers;
