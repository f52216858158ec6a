//! Live migration between two QEMUs of one host.
//!
//! The new QEMU was started with `-incoming defer` and `-S`: it waits for a stream, and afterwards for `cont`. So whoever
//! moves a guest can look at it between its arrival and its first instruction there, and go back until then: the old QEMU
//! still has all of it, stopped.
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

/// How guest RAM gets into the new process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// As descriptors, over a channel of its own: nothing is copied (QEMU 10.0 and later).
    CprTransfer,
    /// Both map the same file; only the rest is sent (`x-ignore-shared`).
    IgnoreShared,
    /// Copied while the guest runs, and what it has written meanwhile again.
    Precopy,
}

impl Way {
    /// As QEMU's documentation calls it.
    pub fn name(self) -> &'static str {
        match self {
            Self::CprTransfer => "cpr-transfer",
            Self::IgnoreShared => "x-ignore-shared",
            Self::Precopy => "precopy",
        }
    }
}

/// What bounds a migration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// The longest that the guest may stand, in milliseconds, as QEMU reckons it beforehand.
    pub downtime_ms: u64,
    /// The most bytes a second; `None`: no limit.
    pub bandwidth: Option<u64>,
    /// The guest stands for all of the copy. QEMU 7.2 as an emulator (TCG) loses what a guest writes while it is copied (seen: a
    /// guest that works crashes in the new process, 7.2.22 to itself, too; 10.0.2 loses nothing).
    pub standing: bool,
    /// The longest time from the first byte to the last.
    pub time_max: Duration,
}
