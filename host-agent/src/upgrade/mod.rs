//! Moving a running guest into another QEMU of the same host, patches intact.
//!
//! The way of a move: [`prepare`] finds out whether it can be done and how, and changes nothing ([`files`] and [`named`] see that
//! names still lead to what the old process has); [`line`] makes the new process's command line; [`successor`] starts it, [`launch`] being what it is until it becomes QEMU; [`compare`] demands that both make
//! the same machine; QEMU moves the guest, which then stands in both; [`identity`] demands that what arrived is what was sent.
//! Only then is it let run in the new process, which takes over the old one's [`names`](crate::domains::names), and the old one is
//! ended. Until then every failure leaves the guest in the old process; [`watch`] and [`settle`] see to it where vmpatch itself
//! is killed.

mod arrived;
pub mod binary;
mod compare;
mod descriptor;
pub mod due;
mod error;
mod files;
mod fit;
mod folder;
mod identity;
pub mod launch;
mod line;
mod method;
mod named;
mod origin;
mod owner;
mod prepare;
mod rights;
mod run;
mod settle;
mod signals;
mod successor;
mod tap;
pub mod watch;

pub use arrived::{Arrived, Qemu, Upgraded};
pub use binary::BinaryError;
pub use error::UpgradeError;
pub use identity::IdentityError;
pub use line::Refused;
pub use origin::OriginError;
pub use prepare::refuse_libvirts;
pub use run::run;
pub use settle::{Settled, resume_cut_off, settle};

use qmp::migrate::Method;
use std::path::PathBuf;
use std::time::Duration;

/// How a guest is moved.
#[derive(Debug, Clone)]
pub struct UpgradeOptions {
    /// The QEMU program to move it into.
    pub qemu: PathBuf,
    /// Starts the new process and compares it, and leaves the guest where it is.
    pub check: bool,
    /// How the memory is migrated; none: the best method that fits.
    pub method: Option<Method>,
    /// Maximum downtime if precopy does not converge, in milliseconds.
    pub downtime_ms: u64,
    /// The most bytes to copy in a second; none: as much as there is.
    pub bandwidth: Option<u64>,
    /// How long the new process may take to begin, and then the guest to get there.
    pub time_max: Duration,
    /// Folders with the new QEMU's firmware, in place of those on the guest's command line.
    pub data_dirs: Vec<PathBuf>,
}
