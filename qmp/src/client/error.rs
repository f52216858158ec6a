//! Errors of QMP connections and commands.

use super::wire::LineError;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

/// Why there is no QMP connection.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// There is no such file.
    #[error("there is no QMP socket at {path}")]
    NoSocket {
        /// Path of the socket.
        path: PathBuf,
    },
    /// The caller has no permission to open the socket.
    #[error("no permission to open the QMP socket {path}")]
    Permission {
        /// Path of the socket.
        path: PathBuf,
    },
    /// No process listens on the socket: its QEMU is gone, or the file is no listening socket.
    #[error("nobody listens on {path}: its QEMU is gone, or it is not a socket that QEMU serves")]
    Refused {
        /// Path of the socket.
        path: PathBuf,
    },
    /// There was no greeting in time. QEMU serves one client for each QMP socket, so that another client holds it (as libvirt does), or QEMU hangs.
    #[error(
        "the QMP socket {path} gave no greeting within {within_ms} ms: another client holds it \
         (QEMU serves one at a time; libvirt keeps its own open), or QEMU hangs"
    )]
    Held {
        /// Path of the socket.
        path: PathBuf,
        /// The time allowed, in milliseconds.
        within_ms: u128,
    },
    /// The process at the other end does not speak QMP.
    #[error("{path} does not speak QMP: it said {found}")]
    NotQmp {
        /// Path of the socket.
        path: PathBuf,
        /// The beginning of its message.
        found: String,
    },
    /// The connection ended before the greeting was complete.
    #[error("the QMP socket {path} broke off before its greeting")]
    Lost {
        /// Path of the socket.
        path: PathBuf,
        /// How it ended.
        #[source]
        cause: LineError,
    },
    /// The negotiation after the greeting failed.
    #[error("the QMP socket {path} did not finish the negotiation")]
    Capabilities {
        /// Path of the socket.
        path: PathBuf,
        /// The error of the command.
        #[source]
        cause: CommandError,
    },
    /// libvirt, which holds the monitor, did not lead to it.
    #[error(transparent)]
    Libvirt(#[from] super::LibvirtError),
    /// libvirt, or QEMU behind it, did not answer in time.
    #[error(
        "libvirt at {path} gave no access to the guest's monitor within {within_ms} ms: \
         QEMU hangs, or a job of libvirt's holds the guest (`virsh domjobinfo`)"
    )]
    LibvirtLate {
        /// libvirt's socket.
        path: PathBuf,
        /// The time allowed, in milliseconds.
        within_ms: u128,
    },
    /// QEMU, reached through libvirt, did not tell its version.
    #[error("asking QEMU through libvirt for its version")]
    Version {
        /// The error of the command.
        #[source]
        cause: CommandError,
    },
    /// Any other failure of `connect`.
    #[error("cannot connect to the QMP socket {path}")]
    Io {
        /// Path of the socket.
        path: PathBuf,
        /// The host's error.
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

/// Why a command gave no result. The connection stays usable, except after [`CommandError::Disconnected`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CommandError {
    /// There was no reply in time. It is unknown whether the command took effect. A late reply is dropped without harm.
    #[error("QEMU did not answer `{command}` within {within_ms} ms")]
    Timeout {
        /// The command.
        command: String,
        /// The time allowed, in milliseconds.
        within_ms: u128,
    },
    /// QEMU refused the command.
    #[error("QEMU refused `{command}`: {description} ({class})")]
    Refused {
        /// The command.
        command: String,
        /// QEMU's error class, such as `GenericError` or `CommandNotFound`.
        class: String,
        /// QEMU's description of the error.
        description: String,
    },
    /// libvirt, which holds the monitor, did not pass the command on.
    #[error("libvirt did not pass `{command}` on to QEMU: {cause}")]
    Manager {
        /// The command.
        command: String,
        /// What libvirt says.
        cause: String,
    },
    /// The connection ended before the reply: QEMU exited, or sent a message that is not QMP.
    #[error("the QMP connection ended before `{command}` was answered: {cause}")]
    Disconnected {
        /// The command.
        command: String,
        /// Why it ended.
        cause: String,
    },
    /// The arguments cannot be encoded as JSON.
    #[error("the arguments of `{command}` do not fit into JSON: {cause}")]
    Arguments {
        /// The command.
        command: String,
        /// The encoder's error.
        cause: String,
    },
    /// The reply has another form than the command defines.
    #[error("QEMU's answer to `{command}` has another form than expected ({cause}): {found}")]
    Reply {
        /// The command.
        command: String,
        /// The decoder's error.
        cause: String,
        /// The beginning of the reply.
        found: String,
    },
}
