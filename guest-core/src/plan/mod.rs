//! What is going to be done to the guest, as pure data: every byte to write, with the byte it expects to replace.
//! Everything that can fail for a reason known beforehand fails here, when the guest has not been touched.

mod apply;
mod cleanup;
mod revert;

pub use apply::{ApplyOptions, Refusal, apply};
pub use cleanup::{cleanup, recovery};
pub use revert::{RevertError, revert};

use crate::addr::Gva;
use crate::change::Change;
use crate::place::Record;
use std::ops::Range;

/// A function, or a part of one, that no stack may hold at the commit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Occupied {
    /// Its name, for the message.
    pub name: String,
    /// Its addresses.
    pub range: Range<Gva>,
}

/// What is going to be done.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Made one by one while the guest runs: none of it is reachable for the guest yet.
    pub before: Vec<Change>,
    /// Made together, with all vCPUs stopped.
    pub paused: Vec<Change>,
    /// What must be on no stack when `paused` is made.
    pub occupied: Vec<Occupied>,
    /// The patch it is about.
    pub record: Record,
}
