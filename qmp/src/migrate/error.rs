//! Errors of migrations.

use crate::client::{CommandError, ConnectError};
use std::io;

/// Why a guest was not migrated.
#[derive(Debug, thiserror::Error)]
pub enum MigrateError {
    /// The event loop cannot be created.
    #[error("cannot set up an event loop")]
    EventLoop(#[source] io::Error),
    /// The connect to the QEMU that has the guest failed.
    #[error("connecting to the old QEMU")]
    Source(#[source] ConnectError),
    /// The connect to the QEMU that is to get the guest failed.
    #[error("connecting to the new QEMU")]
    Destination(#[source] ConnectError),
    /// The new QEMU was used before the connect to it.
    #[error("the new QEMU is not connected yet")]
    NoDestination,
    /// A command to a QEMU failed.
    #[error("{which} QEMU")]
    Command {
        /// `old` or `new`.
        which: &'static str,
        /// The error.
        #[source]
        cause: CommandError,
    },
    /// The channel for the stream cannot be created.
    #[error("making a channel between the two QEMUs")]
    Channel(#[source] io::Error),
    /// A QEMU gave up the migration.
    #[error("the {which} QEMU gave up: {reason}")]
    Failed {
        /// `old` or `new`.
        which: &'static str,
        /// QEMU's reason, or its state.
        reason: String,
    },
    /// The new process has ended.
    #[error("the new QEMU ended in the middle of it")]
    DestinationGone,
    /// A QMP connection ended.
    #[error("the {which} QEMU closed its connection in the middle of it")]
    Gone {
        /// `old` or `new`.
        which: &'static str,
    },
    /// The migration did not end in time.
    #[error("the guest had not moved within {within_s} s ({state})")]
    TooLong {
        /// The time allowed, in seconds.
        within_s: u64,
        /// Its progress.
        state: String,
    },
    /// The operator has cancelled the migration.
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
