//! What is going to be done to the guest, as pure data: every byte to write, with the byte it expects to replace.
//! Everything that can fail for a reason known beforehand fails here, when the guest has not been touched.

mod apply;
mod areas;
mod cleanup;
mod fit;
mod from_reads;
mod guard;
mod known;
mod old;
mod old_code;
mod parts;
mod reapply;
mod redirects;
mod refusal;
mod revert;
mod this_module;

pub use apply::{ApplyOptions, apply};
pub use cleanup::{cleanup, recovery};
pub use fit::{Checksums, checksums};
pub use refusal::Refusal;
pub use revert::{RevertError, revert};

use crate::addr::Gva;
use crate::change::Change;
use crate::place::Record;
use crate::reads::Preconditions;
use crate::unwind::{OldFunction, PatchCode};
use std::ops::Range;

/// What is going to be done.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Made one by one while the guest runs: none of it is reachable for the guest yet.
    pub before: Vec<Change>,
    /// Made together, with all vCPUs stopped.
    pub paused: Vec<Change>,
    /// What the plan was made from: it must be so when `paused` is made.
    pub requires: Preconditions,
    /// What must be on no stack when `paused` is made.
    pub occupied: Vec<OldFunction>,
    /// What nobody may be reading then: memory that the guest knows, and that is going to be wiped.
    pub unread: Range<Gva>,
    /// Code of all patches that the guest holds: what stacks may lead through.
    pub laid: Vec<PatchCode>,
    /// The patch it is about.
    pub record: Record,
}
