//! Why a guest was not moved.

use crate::client::{CommandError, ConnectError};
use std::io;

/// Why a guest was not moved.
#[derive(Debug, thiserror::Error)]
pub enum MigrateError {
    /// The host gave no event loop.
    #[error("cannot set up an event loop")]
    EventLoop(#[source] io::Error),
    /// No connection to the QEMU that has the guest.
    #[error("connecting to the old QEMU")]
    Source(#[source] ConnectError),
    /// No connection to the QEMU that is to get it.
    #[error("connecting to the new QEMU")]
    Destination(#[source] ConnectError),
    /// The new QEMU was to be asked before it was connected to.
    #[error("the new QEMU is not connected yet")]
    NoDestination,
    /// A QEMU did not do as told.
    #[error("{which} QEMU")]
    Command {
        /// `old` or `new`.
        which: &'static str,
        /// What it said.
        #[source]
        cause: CommandError,
    },
    /// No channel for the stream could be made.
    #[error("making a channel between the two QEMUs")]
    Channel(#[source] io::Error),
    /// QEMU gave up.
    #[error("the {which} QEMU gave up: {reason}")]
    Failed {
        /// `old` or `new`.
        which: &'static str,
        /// Its words, or its state.
        reason: String,
    },
    /// The new process is gone.
    #[error("the new QEMU ended in the middle of it")]
    DestinationGone,
    /// A connection ended.
    #[error("the {which} QEMU closed its connection in the middle of it")]
    Gone {
        /// `old` or `new`.
        which: &'static str,
    },
    /// It did not come to its end in time.
    #[error("the guest had not moved within {within_s} s ({state})")]
    TooLong {
        /// The time allowed, in seconds.
        within_s: u64,
        /// How far it was.
        state: String,
    },
    /// The operator does not want it any more.
    #[error("cancelled")]
    Cancelled,
}

impl MigrateError {
    pub(super) fn old(cause: CommandError) -> Self {
        Self::Command {
            which: "the old",
            cause,
        }
    }

    pub(super) fn new(cause: CommandError) -> Self {
        Self::Command {
            which: "the new",
            cause,
        }
    }
}
