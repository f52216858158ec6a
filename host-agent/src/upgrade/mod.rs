//! Moves a running guest into another QEMU process on the same host. Its patches stay in place.
//!
//! The steps of a move:
//! - [`prepare`] finds out whether the guest can be moved, and how. It changes nothing. [`files`] and [`named`] check that the names on the command line
//!   still lead to the files that the old process has.
//! - [`argv`] makes the new process's command line.
//! - [`successor`] starts the new process; [`launch`] is what runs in it until it becomes QEMU.
//! - [`compare`] requires that both QEMUs make the same machine.
//! - QEMU migrates the guest, which is then paused in both processes.
//! - [`identity`] requires that the guest that arrived is the one that was sent.
//! - The guest is resumed in the new process, which takes over the old one's [`names`](crate::domains::names); [`finish`] ends the old one.
//!
//! Until the guest is resumed in the new process, every failure leaves it in the old one. Where vmpatch is killed, [`watch`] and [`recovery`] bring the
//! move to one of its two ends.

mod argv;
pub mod binary;
mod channels;
mod compare;
mod descriptor;
mod error;
mod files;
mod finish;
mod fit;
mod identity;
pub mod launch;
mod method;
mod named;
mod owner;
mod prepare;
mod process_context;
mod recovery;
mod rights;
mod run;
mod signals;
mod successor;
mod tap;
pub mod update_check;
pub mod watch;

pub use argv::Refused;
pub use binary::BinaryError;
pub use error::UpgradeError;
pub use finish::{Arrived, Qemu, Upgraded};
pub use identity::IdentityError;
pub use prepare::refuse_libvirts;
pub use process_context::ProcessContextError;
pub use recovery::{Recovered, recover, resume_cut_off};
pub use run::run;

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
