//! Why a guest was not moved into another QEMU. Unless said otherwise, it runs on in the old one, as before.

use super::argv::Refused;
use super::binary::BinaryError;
use super::identity::IdentityError;
use super::process_context::ProcessContextError;
use crate::domains::DomainError;
use crate::lock::LockError;
use crate::outcome::{GuestState, Reason};
use crate::session::{BusyError, OpenError};
use guest_core::MemoryError;
use guest_core::commit::Effect;
use qmp::memory::RamMapError;
use qmp::migrate::MigrateError;
use std::io;
use std::path::PathBuf;

/// Why a guest was not moved into another QEMU.
#[derive(Debug, thiserror::Error)]
pub enum UpgradeError {
    /// The domains of this host can't be listed.
    #[error(transparent)]
    Domain(#[from] DomainError),
    /// Another vmpatch is at work there.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// The guest can't be reached, or is not understood.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The guest can't be moved now.
    #[error(transparent)]
    Busy(#[from] BusyError),
    /// libvirt has its own idea of which process has the guest.
    #[error("{domain} is managed by libvirt, which would lose sight of a guest that moves without it")]
    Libvirt {
        /// The domain's name and pid.
        domain: String,
    },
    /// The new program won't do.
    #[error(transparent)]
    Binary(#[from] BinaryError),
    /// The command line can't be carried over.
    #[error(transparent)]
    Line(#[from] Refused),
    /// What the process runs as can't be found out, or not be taken over.
    #[error(transparent)]
    ProcessContext(#[from] ProcessContextError),
    /// The guest can't be moved as it is.
    #[error("{what}: {reason}")]
    Unfit {
        /// What is in the way.
        what: String,
        /// Why, and what to do.
        reason: String,
    },
    /// The two processes would not make the same machine.
    #[error("the new process has another {what} than the old one ({new}, not {old}): {reason}")]
    Differs {
        /// What differs.
        what: &'static str,
        /// In the old process.
        old: String,
        /// In the new one.
        new: String,
        /// Why that may be.
        reason: &'static str,
    },
    /// The new process ended.
    #[error("the new process ended ({status}): {messages}")]
    Ended {
        /// How.
        status: String,
        /// What it wrote.
        messages: String,
    },
    /// The new process did not do its part.
    #[error("the new process (pid {pid}) did not answer: {messages}")]
    Unresponsive {
        /// The process.
        pid: i32,
        /// What it wrote.
        messages: String,
        /// What was waited for.
        source: MigrateError,
    },
    /// It could not be moved.
    #[error("moving the guest")]
    Migrate(#[from] MigrateError),
    /// The guest's memory could not be read beforehand.
    #[error("reading the guest's memory")]
    Memory(#[from] MemoryError),
    /// The guest's memory in the new process was not found.
    #[error("finding the guest's memory in the new process")]
    Ram(#[from] RamMapError),
    /// What arrived is not what was sent.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// A process or file of the host could not be dealt with.
    #[error("{doing}")]
    Host {
        /// What was being done.
        doing: String,
        /// Why not.
        source: io::Error,
    },
    /// The guest runs in the new process, but not all is done.
    #[error("the guest runs in the new process (pid {pid}), but {left}")]
    Unfinished {
        /// The new process.
        pid: i32,
        /// What is left to do.
        left: String,
        /// Why it was not done.
        source: io::Error,
    },
    /// The guest has moved, and what came afterwards failed.
    #[error("{source}")]
    Moved {
        /// What failed.
        source: Box<UpgradeError>,
    },
    /// Neither process can be made to run the guest.
    #[error("the guest is paused in the old process (pid {old}), and has never run in the new one (pid {new})")]
    Stranded {
        /// The old process.
        old: i32,
        /// The new one.
        new: i32,
        /// Why.
        source: MigrateError,
    },
    /// The new process ran the guest, and ended.
    #[error(
        "the new process (pid {new}) ended after the guest had begun to run there; in the old one (pid {old}) it is paused as \
         before, and must not go on, as its disks have changed since"
    )]
    Lost {
        /// The old process.
        old: i32,
        /// The new one.
        new: i32,
        /// What was seen.
        source: Box<UpgradeError>,
    },
    /// That process is not a domain yet.
    #[error("process {new} is just taking over the guest of process {old}")]
    UnderWay {
        /// The old process.
        old: i32,
        /// The new one.
        new: i32,
    },
    /// Somebody else was faster.
    #[error("the guest has just left process {old}: another vmpatch has moved it; `status` says where it is now")]
    Overtaken {
        /// The old process.
        old: i32,
    },
    /// The socket at which the new process answers is not known.
    #[error("process {pid} has no QMP socket at {path}")]
    NoSocket {
        /// The new process.
        pid: i32,
        /// Where it should be.
        path: PathBuf,
    },
}

impl UpgradeError {
    /// An [`UpgradeError::Host`], for `map_err`.
    pub(super) fn host(doing: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let doing = doing.into();
        move |source| Self::Host { doing, source }
    }

    pub(super) fn unfit(what: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Unfit {
            what: what.into(),
            reason: reason.into(),
        }
    }

    /// What the guest is like.
    pub fn guest_state(&self) -> GuestState {
        match self {
            Self::Moved { source } => source.guest_state().or(GuestState::InForce),
            Self::Unfinished { .. } => GuestState::InForce,
            Self::Stranded { .. } => GuestState::Paused {
                change: Effect::AsBefore,
            },
            Self::Lost { .. } => GuestState::Lost,
            _ => GuestState::AsBefore,
        }
    }

    /// Why it was not moved.
    pub fn reason(&self) -> Reason {
        match self {
            Self::Moved { source } => source.reason(),
            Self::Open(error) => error.reason(),
            Self::Busy(error) => error.reason(),
            // Found before anything was begun.
            Self::Libvirt { .. }
            | Self::Binary(_)
            | Self::Line(_)
            | Self::ProcessContext(_)
            | Self::Unfit { .. }
            | Self::Differs { .. } => Reason::Refused,
            Self::Domain(_) | Self::Lock(_) | Self::Overtaken { .. } | Self::UnderWay { .. } => Reason::Unreachable,
            Self::Ended { .. }
            | Self::Unresponsive { .. }
            | Self::Migrate(_)
            | Self::Memory(_)
            | Self::Ram(_)
            | Self::Identity(_)
            | Self::Host { .. }
            | Self::Unfinished { .. }
            | Self::Stranded { .. }
            | Self::Lost { .. }
            | Self::NoSocket { .. } => Reason::Failed,
        }
    }
}
