//! A guest of KVM, paused and read without asking the program that runs it.
//!
//! [`Vm::find`] finds the vCPUs of a process and their threads, without stopping any. [`Armed`] has KVM store each vCPU's registers where
//! they can be read ([`run`]). [`Paused`] is a guest whose vCPU threads are stopped; dropped, they run.
//!
//! [`Slots`] are where its memory is.
//!
//! Nothing is called in the other process, and no thread of it but the vCPUs' is stopped: its disks, monitor and devices go on.

mod armed;
mod descriptors;
mod host_kernel;
pub mod run;
mod slots;
mod vm;

pub use armed::{ArmError, Armed, PauseError, Paused};
pub use descriptors::Vcpu;
pub use host_kernel::HostKernelError;
pub use slots::{Slot, Slots, SlotsError};
pub use vm::{FindError, Vm};
