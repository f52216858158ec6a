//! Everything that can go wrong, with the exit code that it means and what the operator can do.

use crate::attach::{AttachError, is_permanent};
use crate::cli::PATCHES_DEFAULT;
use crate::domains::{DomainError, process};
use crate::lock::LockError;
use crate::state::GuestState;
use crate::upgrade::UpgradeError;
use crate::upgrade::launch::LaunchError;
use guest_core::commit::{CommitError, Effect, NotSafe};
use guest_core::kernel::KernelError;
use guest_core::kernel::guard::Armed;
use guest_core::place::RegistryError;
use guest_core::plan::{Refusal, RevertError};
use qmp::ConnectError;
use qmp::memory::RamMapError;
use std::error::Error;
use std::io;
use std::path::{Path, PathBuf};

/// What [`Failure::Commit`] says where a patch was to be applied.
pub const APPLYING: &str = "applying";
/// And where one was to be taken out.
pub const REVERTING: &str = "reverting";

/// And where a change that was cut off was to be taken back.
pub const TAKING_BACK: &str = "taking back";

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
    /// The guest did not run again after the pause of a change; the supervisor was to resume it.
    #[error("{doing} {id}: {}", by_supervisor(*runs, *change))]
    NotResumed {
        /// As in [`Failure::Commit`].
        doing: &'static str,
        /// The patch.
        id: String,
        /// Whether the supervisor has resumed it.
        runs: bool,
        /// How much of the patch's change is in the guest.
        change: Effect,
        /// Why.
        source: Box<CommitError>,
    },
    /// Something failed after the guest had been changed.
    #[error("{source}")]
    After {
        /// What the guest is like, unless the failure itself made it worse.
        state: GuestState,
        /// What failed.
        source: Box<Failure>,
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

/// The process whose memory was to be looked at, somewhere down the chain.
fn process_in(error: &AttachError) -> Option<i32> {
    match error {
        AttachError::RamMap(RamMapError::Process { pid, .. } | RamMapError::Backing { pid, .. }) => Some(*pid),
        _ => None,
    }
}

fn by_supervisor(runs: bool, change: Effect) -> String {
    match runs {
        true => format!("the supervisor had to resume the guest, which runs; the change is {change}"),
        false => "the guest was not seen to run again".to_owned(),
    }
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
            Self::After { state, source } => match source.guest_state() {
                GuestState::AsBefore => *state,
                worse => worse,
            },
            Self::Commit { source, .. } => source.effect().into(),
            Self::NotResumed { runs: true, change, .. } => (*change).into(),
            Self::NotResumed { change, .. } => GuestState::Paused { change: *change },
            Self::Upgrade(error) => error.guest_state(),
            _ => GuestState::AsBefore,
        }
    }

    /// The exit code, as `--help` lists them: 6 for a guest that is not as before. A refusal of one of several patches, and a moment
    /// that was not safe for it, keep their codes; the report says what was done before.
    pub fn exit_code(&self) -> u8 {
        match (self.guest_state(), self.cause_code()) {
            (GuestState::AsBefore, code) => code,
            (GuestState::PartlyDone, code @ (3 | 4)) => code,
            _ => 6,
        }
    }

    /// The exit code, were the guest as before.
    fn cause_code(&self) -> u8 {
        match self {
            Self::After { source, .. } => source.cause_code(),
            Self::NoTarget => 2,
            // Not "unreachable", which scripts try again.
            Self::Attach(error) if is_permanent(error) => 3,
            Self::Domain(_) | Self::Lock(_) | Self::OtherProcess { .. } | Self::Attach(_) => 5,
            Self::Busy(_)
            | Self::Kernel(_)
            | Self::Registry(_)
            | Self::Packed { .. }
            | Self::Refused { .. }
            | Self::Revert(_)
            | Self::Guard(_) => 3,
            Self::Commit { source, .. } if matches!(**source, CommitError::NotSafe { .. }) => 4,
            Self::Commit { source, .. } if is_permanent(&**source) => 3,
            Self::Incomplete { code, .. } => *code,
            Self::Build { source, .. } if source.is_refusal() => 3,
            Self::NothingToBuild | Self::NotAllowed { .. } => 3,
            Self::Build { .. } | Self::Cache(_) => 1,
            Self::Upgrade(error) if error.is_refusal() => 3,
            Self::Upgrade(UpgradeError::Overtaken { .. } | UpgradeError::UnderWay { .. }) => 5,
            Self::Upgrade(_) | Self::Launch(_) => 1,
            Self::File { .. }
            | Self::Commit { .. }
            | Self::TakenBack { .. }
            | Self::NotResumed { .. }
            | Self::Supervisor(_)
            | Self::Output(_) => 1,
        }
    }

    /// What the operator can do about it.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Self::After { source, .. } => source.hint(),
            Self::NotResumed { runs: false, .. } => Some(
                "QMP `cont` lets the guest run; `vmpatch status` then says what is in force, and the next `apply` or `revert` takes \
                 back what is half done",
            ),
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
            Self::Attach(error) if lacks_permission(error) => Some(match process_in(error) {
                Some(pid) if process::is_undumpable_own(pid) => {
                    "vmpatch runs as the user that QEMU runs as, but that process is not dumpable (it has changed its user or its \
                     capabilities, or said so by prctl), and the host shows its memory to root alone: run vmpatch as root"
                }
                _ => "run vmpatch as root, or as the user that QEMU runs as",
            }),
            Self::File { path, .. } if path.as_path() == Path::new(PATCHES_DEFAULT) => {
                Some("that is where the bare command looks for modules: put them there, or say --patches DIR")
            }
            Self::Registry(RegistryError::NoCave) => {
                Some("this kernel was built without page-table isolation, which is where the room comes from")
            }
            _ => None,
        }
    }

    /// What a report says of the failure, see `docs/json.md`.
    pub fn members(&self) -> serde_json::Map<String, serde_json::Value> {
        let (chain, state) = (self.chain(), self.guest_state());
        let mut members = serde_json::Map::new();
        let mut add = |name: &str, value: serde_json::Value| members.insert(name.to_owned(), value);
        add("error", chain.join(": ").into());
        add("causes", chain.into());
        add("exit_code", self.exit_code().into());
        add("guest_state", state.name().into());
        if let Some(change) = state.change() {
            add("change", change.into());
        }
        members
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

#[cfg(test)]
mod tests {
    use super::*;
    use guest_core::machine::MachineError;

    fn committing(source: CommitError) -> Failure {
        Failure::Commit {
            doing: APPLYING,
            id: "fix".to_owned(),
            source: Box::new(source),
        }
    }

    fn not_resumed(runs: bool, change: Effect) -> Failure {
        let source = MachineError::new("resuming the guest", "no answer").left_paused(true);
        Failure::NotResumed {
            doing: APPLYING,
            id: "fix".to_owned(),
            runs,
            change,
            source: Box::new(CommitError::NotResumed {
                effect: change,
                first: None,
                source,
            }),
        }
    }

    fn half_done() -> CommitError {
        CommitError::HalfDone {
            first: String::new(),
            undo: String::new(),
        }
    }

    #[test]
    fn exit_1_says_that_the_guest_is_as_before_and_exit_6_that_it_is_not() {
        let stopped = || MachineError::new("pausing the guest", "no answer").into();
        let written = || Failure::Output(io::ErrorKind::StorageFull.into());
        let refused = || Failure::Busy("a snapshot".to_owned());
        let stranded = UpgradeError::Unfinished {
            pid: 1,
            left: String::new(),
            source: io::ErrorKind::Other.into(),
        };
        for (failure, code, state) in [
            (committing(stopped()), 1, "as before"),
            (committing(half_done()), 6, "half patched"),
            (not_resumed(true, Effect::AsBefore), 1, "as before"),
            (not_resumed(true, Effect::InForce), 6, "in force"),
            (not_resumed(false, Effect::AsBefore), 6, "paused"),
            (not_resumed(false, Effect::InForce), 6, "paused"),
            (written(), 1, "as before"),
            (written().after(GuestState::AsBefore), 1, "as before"),
            (written().after(GuestState::InForce), 6, "in force"),
            (refused(), 3, "as before"),
            // One of several: the report says what was done before.
            (refused().after(GuestState::PartlyDone), 3, "partly done"),
            (committing(stopped()).after(GuestState::PartlyDone), 6, "partly done"),
            // The worse of the two.
            (committing(half_done()).after(GuestState::PartlyDone), 6, "half patched"),
            // Reading a guest that was just patched.
            (refused().after(GuestState::InForce), 6, "in force"),
            (Failure::Upgrade(stranded), 6, "in force"),
        ] {
            assert_eq!(
                (failure.exit_code(), failure.guest_state().name()),
                (code, state),
                "{failure}"
            );
        }
    }

    #[test]
    fn a_paused_guest_is_told_with_how_much_of_the_change_is_in_it() {
        let members = not_resumed(false, Effect::InForce).members();
        assert_eq!(members["guest_state"], "paused");
        assert_eq!(members["change"], "in force");
        assert_eq!(members["exit_code"], 6);
        assert!(!committing(half_done()).members().contains_key("change"));
    }
}
