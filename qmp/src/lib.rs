//! A client of QEMU. It knows nothing of what runs in the guest, and uses only the shared types of `guest_core`: addresses and registers.
//!
//! - [`Client`]: a QMP monitor: typed commands, events and descriptor passing over any [`Transport`]. It is asynchronous.
//! - [`Machine`]: one QEMU, with blocking methods: its properties, its guest's RAM ([`RamMap`]) and vCPUs ([`guest_core::Registers`]).
//! - [`Paused`]: a paused guest: registers, writes that change translated code, and a resume on every path.
//! - [`migrate`]: the migration of a guest to another QEMU of the same host.

pub mod client;
pub mod cpu;
#[doc(hidden)]
pub mod fuzzed;
pub mod gdb;
pub mod machine;
pub mod memory;
pub mod migrate;
pub mod text;

pub use client::{Client, CommandError, ConnectError, Event, LibvirtError, LibvirtGuest, Transport};
pub use machine::{Machine, PauseError, PauseTimes, Paused, RunState};
pub use memory::{Backing, RamMap, RamRegion};
pub use text::TextError;
