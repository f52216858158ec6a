//! Errors of the GDB stub.

use super::layout::LayoutError;
use std::io;

/// Why an exchange with the GDB stub failed.
#[derive(Debug, thiserror::Error)]
pub enum StubError {
    /// The socket failed, or the stub did not reply in time.
    #[error("the connection to QEMU's GDB stub failed")]
    Io(#[from] io::Error),
    /// The stub closed the connection.
    #[error("QEMU closed the connection to its GDB stub")]
    Closed,
    /// An earlier exchange failed, so that replies cannot be assigned to packets any more.
    #[error("the connection to QEMU's GDB stub is of no use any more")]
    OutOfStep,
    /// The reply has another form than expected. A refusal is `E` with two digits.
    #[error("QEMU's GDB stub was to send {expected}, and sent {found:?}")]
    Reply {
        /// The expected form.
        expected: &'static str,
        /// The reply.
        found: String,
    },
    /// The stub lists other vCPUs than QMP: a vCPU was plugged or unplugged meanwhile.
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
