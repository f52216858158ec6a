//! Talks to QEMU, and knows nothing of what runs in the guest.
//!
//! - [`Client`]: a QMP connection: typed commands, events, descriptor passing.
//! - [`RamMap`]: which guest-physical ranges are RAM, and where the QEMU process holds them.
pub mod addr;
pub mod client;
pub mod memory;
pub mod text;

pub use addr::{Gpa, Hva};
pub use client::{Client, CommandError, ConnectError, Event};
pub use memory::{Backing, RamMap, RamRegion};
pub use text::TextError;
