//! A guest of KVM, paused and read without asking the program that runs it.
//!
//! [`Vm::find`] finds the vCPUs of a process and their threads, without stopping any. [`Armed`] has KVM store each vCPU's registers where
//! they can be read ([`run`]). [`Paused`] is a guest whose vCPU threads are stopped; dropped, they run.
//!
//! Nothing is called in the other process, and no thread of it but the vCPUs' is stopped: its disks, monitor and devices go on.

mod armed;
mod descriptors;
pub mod run;
mod vm;

pub use armed::{ArmError, Armed, PauseError, Paused};
pub use descriptors::Vcpu;
pub use vm::{FindError, Vm};
