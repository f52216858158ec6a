//! The channel between the two QEMUs: a pair of connected sockets without a name, one end passed to each. No other process can reach them, whatever users
//! the two run as.

use super::MigrateError;
use crate::client::{Client, CommandError};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU32, Ordering};

/// The two ends of a channel.
pub(super) fn channel() -> Result<(OwnedFd, OwnedFd), MigrateError> {
    let flags = SockFlag::SOCK_CLOEXEC;
    socketpair(AddressFamily::Unix, SockType::Stream, None, flags).map_err(|errno| MigrateError::Channel(errno.into()))
}

/// Passes one end to a QEMU, and gives the address of the end in QEMU.
pub(super) async fn pass(client: &Client, end: OwnedFd) -> Result<String, CommandError> {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    // The name is unique: if a name is used again, QEMU closes its former descriptor.
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    let fdname = format!("vmpatch-move-{}-{count}", std::process::id());
    client
        .execute_with_fd(qapi::qmp::getfd { fdname: fdname.clone() }, end)
        .await?;
    Ok(format!("fd:{fdname}"))
}
