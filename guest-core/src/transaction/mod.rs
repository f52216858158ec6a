//! Retries and recovery: decides after a failure whether to plan again, to recover a half-done change, or to end.
//!
//! [`Engine`] decides. It has no clock and no guest, so that tests of a failure at every step take microseconds. [`drive`] asks the engine,
//! and lets a [`Driver`] act:
//!
//! ```text
//! plan, commit ── done
//!   ^       └── failed ──> transient ── time is left ──> wait, and plan again
//!   │                      │            └── or not ────> end: gave up
//!   │                      ├ half done ──> recover ── nothing left ──> end: recovered
//!   └── of a revert, the patch is still there ┘ └────── not known ────> end: half patched
//!                          └ final ──> end: failed
//! ```

mod engine;
pub mod recovery;
mod transient;

pub use engine::{Action, Classify, Clock, Driver, End, Ended, Engine, Event, FailureKind, LeftInGuest, drive};
pub use transient::Transient;

use std::fmt;

/// What vmpatch does to a patch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// Apply it.
    Apply,
    /// Revert it.
    Revert,
    /// Recover it: undo an apply that was cut off, or finish a revert that was cut off.
    Recover,
    /// End its transition.
    Finish,
    /// Remove it, as another patch has replaced it.
    Discard,
    /// Wipe what a revert has left of it.
    Wipe,
}

impl fmt::Display for Operation {
    /// The operation as it is written before a patch's name, as in "applying fix".
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Apply => "applying",
            Self::Revert => "reverting",
            Self::Recover => "recovering",
            Self::Finish => "ending the transition of",
            Self::Discard => "removing",
            Self::Wipe => "wiping what is left of",
        })
    }
}
