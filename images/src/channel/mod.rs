//! The channel to the guest: runs commands there and brings back their output and exit status.
//!
//! It is a virtio port, not a serial line, because a port loses nothing: each side stops when the other doesn't read.

mod client;
pub(crate) mod frame;
mod running;
/// The guest's end, so that the tests of this room can run the real one without a guest.
#[cfg(test)]
#[path = "../../agent/serve.rs"]
mod serve;
mod stream;

pub use client::Client;
pub use running::{Request, Running};

use std::io;
use std::time::Duration;

/// Why a command gave no result.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The channel's socket can't be used.
    #[error("can't {action} the guest's channel")]
    Socket {
        /// What was being done.
        action: &'static str,
        /// The cause.
        source: io::Error,
    },
    /// The channel ended, which happens when QEMU does.
    #[error("the guest's channel was lost while waiting for {waiting_for}: {reason}")]
    Lost {
        /// What was waited for.
        waiting_for: String,
        /// What the channel said.
        reason: String,
    },
    /// The guest has booted again since the command was started.
    #[error("the guest rebooted under {command:?}")]
    Rebooted {
        /// The command.
        command: String,
    },
    /// The guest could not start the program.
    #[error("the guest can't run {reason}")]
    NotStarted {
        /// The program and why.
        reason: String,
    },
    /// What was waited for did not happen in time.
    #[error("{waiting_for} did not happen within {} s", limit.as_secs_f32())]
    Timeout {
        /// What was waited for.
        waiting_for: String,
        /// How long.
        limit: Duration,
    },
    /// The command failed, where only success was of use.
    #[error("{command:?} in the guest failed: {status}: {stderr}")]
    Failed {
        /// The command.
        command: String,
        /// How it ended.
        status: std::process::ExitStatus,
        /// What it wrote to standard error.
        stderr: String,
    },
}
