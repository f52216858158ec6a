//! Talks to QEMU, and knows nothing of what runs in the guest.
//!
//! - [`Client`]: a QMP connection: typed commands, events, descriptor passing.
pub mod client;

pub use client::{Client, CommandError, ConnectError, Event};
