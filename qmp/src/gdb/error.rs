//! What can go wrong with the stub.

use super::layout::LayoutError;
use std::io;

/// What can go wrong with the stub.
#[derive(Debug, thiserror::Error)]
pub enum StubError {
    /// The socket failed, or the stub was silent for too long.
    #[error("the connection to QEMU's GDB stub failed")]
    Io(#[from] io::Error),
    /// The stub closed the connection.
    #[error("QEMU closed the connection to its GDB stub")]
    Closed,
    /// An exchange before this one failed, so replies can no longer be told apart.
    #[error("the connection to QEMU's GDB stub is of no use any more")]
    OutOfStep,
    /// A reply of another form than asked for; a refusal is `E` with two digits.
    #[error("QEMU's GDB stub was to send {expected}, and sent {found:?}")]
    Reply {
        /// What was asked for.
        expected: &'static str,
        /// What came.
        found: String,
    },
    /// The stub lists other vCPUs than QMP does: one was plugged or unplugged.
    #[error("QEMU's GDB stub has the vCPUs {found:?}, QMP named {expected:?}")]
    Vcpus {
        /// Thread numbers by QMP.
        expected: Vec<u64>,
        /// Thread numbers by the stub.
        found: Vec<u64>,
    },
    /// The register description is not understood.
    #[error(transparent)]
    Layout(#[from] LayoutError),
}

impl StubError {
    pub(super) fn bad_reply(expected: &'static str, found: &[u8]) -> Self {
        let head = found.get(..80).unwrap_or(found);
        Self::Reply {
            expected,
            found: String::from_utf8_lossy(head).into_owned(),
        }
    }
}
