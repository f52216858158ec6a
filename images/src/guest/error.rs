//! What can go wrong with a guest.

use std::io;
use std::path::PathBuf;
use std::process::ExitStatus;
use std::time::Duration;

use crate::{cache, channel, initramfs, kernel, modules};

/// Why a guest did not boot, or could not be ended.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Its kernel could not be had.
    #[error(transparent)]
    Kernel(#[from] kernel::Error),
    /// Its kernel's modules could not be had.
    #[error(transparent)]
    Modules(#[from] modules::Error),
    /// Its root file system could not be made.
    #[error(transparent)]
    Initramfs(#[from] initramfs::Error),
    /// A file on the host could not be made or read.
    #[error(transparent)]
    Files(#[from] cache::Error),
    /// QEMU could not be started or watched.
    #[error("can't {action} {}", qemu.display())]
    Qemu {
        /// What was being done.
        action: &'static str,
        /// QEMU.
        qemu: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// QEMU ended before the guest had booted.
    #[error("QEMU ended before the guest had booted: {status}: {log}")]
    QemuEnded {
        /// How.
        status: ExitStatus,
        /// What it wrote.
        log: String,
    },
    /// The guest did not answer.
    #[error("the guest did not boot ({reason}); the end of its console:\n{console}")]
    NoBoot {
        /// Why not.
        reason: String,
        /// Its console's last lines.
        console: String,
    },
    /// The guest did not power off.
    #[error("the guest did not power off within {} s", limit.as_secs())]
    NoPowerOff {
        /// How long it was waited for.
        limit: Duration,
    },
    /// The channel failed.
    #[error(transparent)]
    Channel(#[from] channel::Error),
}
