//! Sending a line on a Unix socket, with a descriptor attached.

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use std::io::{self, IoSlice};
use std::os::fd::{AsRawFd, OwnedFd};
use tokio::io::Interest;
use tokio::net::UnixStream;

/// Writes all of `line`; `fd` travels with its first byte, as QEMU's chardev expects (it keeps the last descriptor set
/// received and hands it to the command that asks).
pub async fn send_line(stream: &UnixStream, line: &[u8], fd: Option<OwnedFd>) -> io::Result<()> {
    let mut rest = line;
    let mut fd = fd;
    while !rest.is_empty() {
        let sent = stream
            .async_io(Interest::WRITABLE, || send_some(stream, rest, fd.as_ref()))
            .await?;
        if sent == 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
        fd = None;
        rest = rest.get(sent..).unwrap_or_default();
    }
    Ok(())
}

fn send_some(stream: &UnixStream, bytes: &[u8], fd: Option<&OwnedFd>) -> io::Result<usize> {
    let fds = fd.map(|fd| [fd.as_raw_fd()]);
    let rights = fds.as_ref().map(|fds| [ControlMessage::ScmRights(fds)]);
    let control: &[ControlMessage] = rights.as_ref().map_or(&[], |rights| rights);
    // MSG_NOSIGNAL: a QEMU that exited is an error to report, not a signal to die of.
    let flags = MsgFlags::MSG_NOSIGNAL;
    Ok(sendmsg::<()>(
        stream.as_raw_fd(),
        &[IoSlice::new(bytes)],
        control,
        flags,
        None,
    )?)
}
