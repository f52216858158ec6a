//! What can go wrong between vmpatch and a QMP socket.

use super::wire::LineError;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

/// Why no QMP connection could be made.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// Nothing has that name.
    #[error("there is no QMP socket at {path}")]
    NoSocket {
        /// The path tried.
        path: PathBuf,
    },
    /// The caller may not open it.
    #[error("no permission to open the QMP socket {path}")]
    Permission {
        /// The path tried.
        path: PathBuf,
    },
    /// The file is there and nobody listens: its QEMU is gone, or it is not a listening socket.
    #[error("nobody listens on {path}: its QEMU is gone, or it is not a socket that QEMU serves")]
    Refused {
        /// The path tried.
        path: PathBuf,
    },
    /// No greeting in time. QEMU serves one client per QMP socket, so another client holds it (libvirt does), or QEMU
    /// hangs.
    #[error(
        "the QMP socket {path} gave no greeting within {within_ms} ms: another client holds it \
         (QEMU serves one at a time; libvirt keeps its own open), or QEMU hangs"
    )]
    Held {
        /// The path tried.
        path: PathBuf,
        /// The time allowed, in milliseconds.
        within_ms: u128,
    },
    /// Whoever answers does not speak QMP.
    #[error("{path} does not speak QMP: it said {found}")]
    NotQmp {
        /// The path tried.
        path: PathBuf,
        /// The beginning of what it said.
        found: String,
    },
    /// The connection broke before the greeting was whole.
    #[error("the QMP socket {path} broke off before its greeting")]
    Lost {
        /// The path tried.
        path: PathBuf,
        /// How it broke.
        #[source]
        cause: LineError,
    },
    /// Greeted, but the negotiation failed.
    #[error("the QMP socket {path} did not finish the negotiation")]
    Capabilities {
        /// The path tried.
        path: PathBuf,
        /// What QEMU answered.
        #[source]
        cause: CommandError,
    },
    /// Any other failure of `connect`.
    #[error("cannot connect to the QMP socket {path}")]
    Io {
        /// The path tried.
        path: PathBuf,
        /// What the host said.
        #[source]
        cause: io::Error,
    },
}

impl ConnectError {
    pub(super) fn from_connect(path: &Path, cause: io::Error) -> Self {
        let path = path.to_owned();
        match cause.kind() {
            ErrorKind::NotFound => Self::NoSocket { path },
            ErrorKind::PermissionDenied => Self::Permission { path },
            ErrorKind::ConnectionRefused => Self::Refused { path },
            _ => Self::Io { path, cause },
        }
    }
}

/// Why a command gave no result. But for [`CommandError::Disconnected`], the connection stays usable.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CommandError {
    /// No reply in time. Should it still come, it is dropped without harm; whether the command took effect is unknown.
    #[error("QEMU did not answer `{command}` within {within_ms} ms")]
    Timeout {
        /// The command.
        command: String,
        /// The time allowed, in milliseconds.
        within_ms: u128,
    },
    /// QEMU refused.
    #[error("QEMU refused `{command}`: {description} ({class})")]
    Refused {
        /// The command.
        command: String,
        /// QEMU's error class, such as `GenericError` or `CommandNotFound`.
        class: String,
        /// QEMU's own words.
        description: String,
    },
    /// The connection ended before the reply: QEMU exited, or sent what is not QMP.
    #[error("the QMP connection ended before `{command}` was answered: {cause}")]
    Disconnected {
        /// The command.
        command: String,
        /// Why it ended.
        cause: String,
    },
    /// The arguments could not be put into JSON.
    #[error("the arguments of `{command}` do not fit into JSON: {cause}")]
    Arguments {
        /// The command.
        command: String,
        /// What the encoder said.
        cause: String,
    },
    /// The reply is not of the form that the command promises.
    #[error("QEMU's answer to `{command}` has another form than expected ({cause}): {found}")]
    Reply {
        /// The command.
        command: String,
        /// What the decoder said.
        cause: String,
        /// The beginning of the reply.
        found: String,
    },
}

impl CommandError {
    /// True where QEMU does not know the command at all.
    pub fn is_unknown_command(&self) -> bool {
        matches!(self, Self::Refused { class, .. } if class == "CommandNotFound")
    }
}
