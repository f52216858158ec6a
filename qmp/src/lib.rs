//! Talks to QEMU, and knows nothing of what runs in the guest.
//!
//! - [`Client`]: a QMP connection: typed commands, events, descriptor passing. Asynchronous.
//! - [`Machine`]: one QEMU, blocking: what it is, where its guest's RAM is ([`RamMap`]), its vCPUs ([`CpuState`]).
//! - [`Paused`]: the guest stopped: registers, writes that reach translated code, resume on every path.
//! - [`migrate`]: a guest moved into another QEMU of the same host.
//! - [`recover`]: undoes and resumes for a process that was killed in its pause.

pub mod addr;
pub mod client;
pub mod cpu;
#[doc(hidden)]
pub mod fuzzed;
pub mod gdb;
pub mod machine;
pub mod memory;
pub mod migrate;
pub mod text;

pub use addr::{Gpa, Hva};
pub use client::{Client, CommandError, ConnectError, Event};
pub use cpu::CpuState;
pub use machine::{Machine, PauseError, PauseTimes, Paused, RunState, recover};
pub use memory::{Backing, RamMap, RamRegion};
pub use text::TextError;
