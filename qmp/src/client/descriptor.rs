//! Sends a line on a Unix socket, with an attached descriptor.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use tokio::io::Interest;
use tokio::net::UnixStream;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

/// A non-blocking socket of tokio.
struct Socket<'a>(&'a UnixStream);

impl ScmSocket for Socket<'_> {
    fn socket_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

/// Writes all of `line`. `fd` is attached to its first byte, as QEMU's chardev expects: it keeps the last received descriptors for the command that uses
/// them.
pub async fn send_line(stream: &UnixStream, line: &[u8], fd: Option<OwnedFd>) -> io::Result<()> {
    let mut rest = line;
    let mut fd = fd;
    while !rest.is_empty() {
        let attached = fd.as_ref().map(AsRawFd::as_raw_fd);
        let sent = stream
            .async_io(Interest::WRITABLE, || {
                Ok(Socket(stream).send_with_fds(&[rest], attached.as_slice())?)
            })
            .await?;
        if sent == 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
        fd = None;
        rest = rest.get(sent..).unwrap_or_default();
    }
    Ok(())
}
