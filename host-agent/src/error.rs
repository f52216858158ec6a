//! Everything that can go wrong, with the exit code that it means and what the operator can do.

use crate::attach::AttachError;
use crate::cli::PATCHES_DEFAULT;
use crate::domains::DomainError;
use crate::lock::LockError;
use crate::upgrade::UpgradeError;
use crate::upgrade::launch::LaunchError;
use guest_core::commit::{CommitError, NotSafe};
use guest_core::kernel::KernelError;
use guest_core::kernel::guard::Armed;
use guest_core::place::RegistryError;
use guest_core::plan::{Refusal, RevertError};
use qmp::ConnectError;
use std::error::Error;
use std::io;
use std::path::{Path, PathBuf};

/// What [`Failure::Commit`] says where a patch was to be applied.
pub const APPLYING: &str = "applying";
/// And where one was to be taken out.
pub const REVERTING: &str = "reverting";

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// Neither `--domain` nor `--qmp`.
    #[error("which guest? give --domain NAME or --qmp SOCKET")]
    NoTarget,
    /// No such domain, or not one.
    #[error(transparent)]
    Domain(#[from] DomainError),
    /// Another vmpatch is at work there.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// Another process answers than the one that was found.
    #[error("{socket} is answered by process {found}, not by the domain's process {expected}")]
    OtherProcess {
        /// The QMP socket.
        socket: PathBuf,
        /// The process that has that socket on its command line.
        expected: i32,
        /// The process at its other end.
        found: i32,
    },
    /// QEMU can't be reached, or its guest's memory.
    #[error("reaching the guest")]
    Attach(#[from] AttachError),
    /// QEMU is doing something that a patch would not survive.
    #[error("QEMU is busy with {0}: changes from outside would be lost")]
    Busy(String),
    /// The kernel is not understood.
    #[error("understanding the guest's kernel")]
    Kernel(#[from] KernelError),
    /// The registry is not understood.
    #[error("understanding the guest's patches")]
    Registry(#[from] RegistryError),
    /// A file can't be read.
    #[error("reading {path}")]
    File {
        /// The file or directory.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A compressed module can't be decompressed.
    #[error("decompressing {path} ({compression})")]
    Packed {
        /// The file.
        path: PathBuf,
        /// What it is compressed with.
        compression: &'static str,
        /// Why.
        source: std::io::Error,
    },
    /// A module does not fit.
    #[error("{path} does not fit the guest")]
    Refused {
        /// The module.
        path: PathBuf,
        /// Why.
        source: Box<Refusal>,
    },
    /// A patch can't be taken out.
    #[error("can't revert")]
    Revert(#[from] RevertError),
    /// What is left of a patch can't be wiped: the guest's integrity guard would stop the guest, or may.
    #[error("wiping what is left of reverted patches")]
    Guard(#[from] Armed),
    /// A change was not made.
    #[error("{doing} {id}")]
    Commit {
        /// `applying`, `reverting`, …
        doing: &'static str,
        /// The patch.
        id: String,
        /// Why.
        source: Box<CommitError>,
    },
    /// A change was not made; taking it back failed in its pause, and was done by a commit of its own.
    #[error("{doing} {id}: {first}; what had been written was taken back")]
    TakenBack {
        /// As in [`Failure::Commit`].
        doing: &'static str,
        /// The patch.
        id: String,
        /// What failed.
        first: String,
    },
    /// The worker that watches over a change can't be started.
    #[error("starting the supervisor")]
    Supervisor(#[source] std::io::Error),
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
    /// No place for what `build` fetches and makes.
    #[error("looking for the cache")]
    Cache(#[source] patch_build::cache::Error),
    /// No module could be built.
    #[error("building {name}")]
    Build {
        /// The module.
        name: String,
        /// Why.
        source: Box<patch_build::request::Error>,
    },
    /// The change is one of comments, or of what is not compiled.
    #[error("the change changes no code and no data of this kernel: there is nothing to build")]
    NothingToBuild,
    /// Risks that nobody has taken.
    #[error("{name} is not built: {}", findings.join("; "))]
    NotAllowed {
        /// The module.
        name: String,
        /// What speaks against it.
        findings: Vec<String>,
    },
    /// The guest was not moved.
    #[error(transparent)]
    Upgrade(#[from] UpgradeError),
    /// A process did not become QEMU.
    #[error(transparent)]
    Launch(#[from] LaunchError),
    /// The output can't be written.
    #[error("writing the report")]
    Output(#[source] std::io::Error),
}

/// True where the host refused somewhere down the chain.
fn lacks_permission(error: &(dyn Error + 'static)) -> bool {
    let mut cause = Some(error);
    while let Some(error) = cause {
        let refused = matches!(error.downcast_ref(), Some(ConnectError::Permission { .. }))
            || error
                .downcast_ref()
                .is_some_and(|error: &io::Error| error.kind() == io::ErrorKind::PermissionDenied);
        if refused {
            return true;
        }
        cause = error.source();
    }
    false
}

impl Failure {
    /// The exit code, as `--help` lists them.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::NoTarget => 2,
            Self::Domain(_) | Self::Lock(_) | Self::OtherProcess { .. } | Self::Attach(_) => 5,
            Self::Busy(_)
            | Self::Kernel(_)
            | Self::Registry(_)
            | Self::Packed { .. }
            | Self::Refused { .. }
            | Self::Revert(_)
            | Self::Guard(_) => 3,
            Self::Commit { source, .. } if matches!(**source, CommitError::NotSafe { .. }) => 4,
            Self::Incomplete { code, .. } => *code,
            Self::Build { source, .. } if source.is_refusal() => 3,
            Self::NothingToBuild | Self::NotAllowed { .. } => 3,
            Self::Build { .. } | Self::Cache(_) => 1,
            Self::Upgrade(error) if error.is_refusal() => 3,
            Self::Upgrade(_) | Self::Launch(_) => 1,
            Self::File { .. }
            | Self::Commit { .. }
            | Self::TakenBack { .. }
            | Self::Supervisor(_)
            | Self::Output(_) => 1,
        }
    }

    /// What the operator can do about it.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Self::Commit { doing, source, .. } => match **source {
                CommitError::NotSafe {
                    why: NotSafe::Stacks(_),
                    ..
                } if *doing == APPLYING => Some(
                    "try again later or with a longer --timeout; --model none does not wait, for changes that may be mixed with the old code",
                ),
                // What else is in the way is so under every model.
                CommitError::NotSafe { .. } => Some("try again later or with a longer --timeout"),
                CommitError::HalfDone { .. } => Some(
                    "the guest may be half patched: run the command again, which takes back what is left, or of a revert does the rest; where it says this again, plan a reboot of the guest",
                ),
                _ => None,
            },
            Self::NotAllowed { .. } => {
                Some("if that has been thought about: --allow RISK, with the name in brackets; --explain shows more")
            }
            Self::Busy(_) => Some("try again when that is over"),
            Self::Upgrade(UpgradeError::Libvirt { .. }) => Some(
                "`virsh managedsave` and `virsh start` bring it up in the installed QEMU, with a pause; `virsh migrate --live` moves it \
                 to a host that has it",
            ),
            Self::Upgrade(UpgradeError::Ended { .. } | UpgradeError::Mute { .. }) => Some(
                "`upgrade --check` starts the new process without touching the guest; --data-dir names its firmware's folder",
            ),
            Self::Upgrade(UpgradeError::Stranded { .. }) => Some(
                "it has run in the old process alone: QMP `cont` lets it go on there, as soon as what is in the way is gone",
            ),
            Self::Attach(error) if lacks_permission(error) => {
                Some("run vmpatch as root, or as the user that QEMU runs as")
            }
            Self::File { path, .. } if path.as_path() == Path::new(PATCHES_DEFAULT) => {
                Some("that is where the bare command looks for modules: put them there, or say --patches DIR")
            }
            Self::Registry(RegistryError::NoCave) => {
                Some("this kernel was built without page-table isolation, which is where the room comes from")
            }
            _ => None,
        }
    }

    /// The error and its causes, none of them twice.
    pub fn chain(&self) -> Vec<String> {
        let mut lines = vec![self.to_string()];
        let mut cause = self.source();
        while let Some(error) = cause {
            let line = error.to_string();
            if lines.last() != Some(&line) {
                lines.push(line);
            }
            cause = error.source();
        }
        lines
    }
}
