//! Live migration between two QEMUs of one host.
//!
//! The new QEMU was started with `-incoming defer` and `-S`: it waits for a stream, and afterwards for `cont`. So the guest can be checked between its
//! arrival and its first instruction in the new QEMU. Until then the migration can be undone: the old QEMU still has the whole guest, paused.
//!
//! Commands and states: QEMU's `qapi/migration.json` (7.2 and 10.0), `docs/devel/migration/CPR.rst` (10.0).

mod arrival;
mod bound;
mod error;
mod facts;
mod pair;
mod progress;
mod settings;
mod stream;

pub use arrival::Arrival;
pub use bound::Bond;
pub use error::MigrateError;
pub use facts::{BlockDevice, Facts};
pub use pair::Pair;
pub use progress::{Progress, Status};
pub use settings::{Setting, Settings, lost};

use std::time::Duration;

/// The method that brings guest RAM into the new process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Method {
    /// Passes descriptors over a separate channel: nothing is copied (QEMU 10.0 and later).
    CprTransfer,
    /// Both processes map the same file, and only the rest is sent (`x-ignore-shared`).
    IgnoreShared,
    /// Copies RAM while the guest runs, and copies again what the guest has written meanwhile.
    Precopy,
}

impl Method {
    /// The name in QEMU's documentation.
    pub fn name(self) -> &'static str {
        match self {
            Self::CprTransfer => "cpr-transfer",
            Self::IgnoreShared => "x-ignore-shared",
            Self::Precopy => "precopy",
        }
    }
}

/// The limits of a migration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Longest downtime of the guest in milliseconds, as QEMU estimates it beforehand.
    pub downtime_ms: u64,
    /// Largest bandwidth in bytes a second; `None` for no limit.
    pub bandwidth: Option<u64>,
    /// True if the guest is paused during the whole copy. With TCG, QEMU 7.2 loses what a guest writes while it is copied (seen: a busy guest crashes in
    /// the new process, also from 7.2.22 to itself; 10.0.2 loses nothing).
    pub paused_throughout: bool,
    /// Longest time from the first byte to the last.
    pub time_max: Duration,
}
