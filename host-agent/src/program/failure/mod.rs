//! Why a command of the program failed. What it means for the operator: [`exit_code`] and [`hint`]; [`guest`] has the
//! words for what the guest is like.

pub mod exit_code;
pub mod guest;
pub mod hint;
pub mod json;

use host_agent::chain::chain;
use host_agent::domains::DomainError;
use host_agent::find::FindError;
use host_agent::module_file::FileError;
use host_agent::outcome::GuestState;
use host_agent::session::{OpenError, PatchError};
use host_agent::supervisor::SuperviseError;
use host_agent::upgrade::UpgradeError;
use host_agent::upgrade::launch::LaunchError;
use std::io;
use std::path::PathBuf;

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// Neither `--domain` nor `--qmp` nor `--pid`.
    #[error("which guest? give --domain NAME, --qmp SOCKET or --pid PID")]
    NoTarget,
    /// The domains of this host can't be listed.
    #[error(transparent)]
    Domain(#[from] DomainError),
    /// No such guest.
    #[error(transparent)]
    Find(#[from] FindError),
    /// The guest was not opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// A patch was not applied, reverted or recovered.
    #[error(transparent)]
    Patch(#[from] PatchError),
    /// A module can't be read.
    #[error(transparent)]
    Module(#[from] FileError),
    /// A file or directory can't be read.
    #[error("reading {path}")]
    File {
        /// The file or directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Not every module of the patch directory could be applied.
    #[error("{failed} of {all} modules were not applied")]
    Incomplete {
        /// How many were not.
        failed: usize,
        /// Of how many.
        all: usize,
        /// The exit code of the first.
        code: u8,
    },
    /// No module was built.
    #[cfg(feature = "build")]
    #[error(transparent)]
    Build(#[from] crate::program::build::BuildError),
    /// The guest was not moved.
    #[error(transparent)]
    Upgrade(#[from] UpgradeError),
    /// A process did not become QEMU.
    #[error(transparent)]
    Launch(#[from] LaunchError),
    /// A supervisor did not do its work.
    #[error(transparent)]
    Supervise(#[from] SuperviseError),
    /// The output can't be written.
    #[error("writing the report")]
    Output(#[source] io::Error),
    /// Something failed after the guest had been changed.
    #[error("{source}")]
    After {
        /// What the guest is like, unless the failure itself made it worse.
        state: GuestState,
        /// What failed.
        source: Box<Failure>,
    },
}

impl Failure {
    /// This failure, where the guest had been changed before: what it was like then.
    #[must_use]
    pub fn after(self, state: GuestState) -> Self {
        match state {
            GuestState::AsBefore => self,
            state => Self::After {
                state,
                source: Box::new(self),
            },
        }
    }

    /// What the guest is like.
    pub fn guest_state(&self) -> GuestState {
        match self {
            Self::After { state, source } => source.guest_state().or(*state),
            Self::Find(error) => error.guest_state(),
            Self::Patch(error) => error.guest_state(),
            Self::Upgrade(error) => error.guest_state(),
            _ => GuestState::AsBefore,
        }
    }

    /// The error and its causes, none of them twice.
    pub fn chain(&self) -> Vec<String> {
        chain(self)
    }
}
