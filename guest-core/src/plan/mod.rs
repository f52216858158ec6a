//! Plans the changes of an apply, a revert or a recovery, as pure data: every byte to write, with the byte that it replaces. All checks that
//! need no pause are made here, before the guest is changed.

mod apply;
mod cleanup;
mod compatibility;
mod from_reads;
mod guard;
mod partial;
mod placement;
mod reapply;
mod redirects;
mod refusal;
mod registration;
mod removal;
mod replace;
mod revert;
mod stack;
mod targets;
mod this_module;
mod transition;
mod unpatch;
mod verify_code;

pub(crate) use apply::digest;
pub use apply::{ApplyOptions, apply};
pub use cleanup::{RecoveryError, cleanup, discard, recovery, rest};
pub use compatibility::{Checksums, checksums};
pub use refusal::Refusal;
pub use revert::{RevertError, revert};
pub(crate) use transition::FORK;
pub use transition::{NoTransition, TransitionError, finish, in_transition, unmark};
pub use unpatch::begin_revert;

use crate::addr::Gva;
use crate::change::Change;
use crate::kernel::patch_state::{Mark, PatchState};
use crate::reads::Preconditions;
use crate::registry::Record;
use crate::unwind::{OldFunction, PatchCode};
use std::ops::Range;

/// The changes of an apply, a revert or a recovery, and what must hold when they are committed.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Changes made one by one while the guest runs. The guest cannot reach them yet.
    pub staged: Vec<Change>,
    /// Changes made in one pause: all of them or none. The last one is the patch's state in the registry.
    pub atomic: Vec<Change>,
    /// The changes of `atomic` that lead functions to the patch's code, or those that a revert undoes: what a supervisor restores where nobody has
    /// checked the stacks.
    pub sites: Vec<Change>,
    /// The bytes that the plan was made from. They must be unchanged when `atomic` is made.
    pub requires: Preconditions,
    /// Functions that must be quiescent when `atomic` is made: in use on no stack.
    pub must_be_quiescent: Vec<OldFunction>,
    /// Guest-virtual memory that must be unreferenced then: the guest can reach it, and the plan wipes it.
    pub unreferenced: Range<Gva>,
    /// The code of all patches in the guest, which stacks may lead through.
    pub patch_code: Vec<PatchCode>,
    /// What becomes of the marks of tasks in the same pause.
    pub marks: Marks,
    /// The record of the patch.
    pub record: Record,
}

/// What becomes of the [marks](crate::kernel::patch_state) of tasks, by which they run the one or the other code while a patch is in transition.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Marks {
    /// Nothing. The plan's functions must be quiescent.
    Leave,
    /// Each task inside one of the plan's functions is marked.
    Set {
        /// Where the marks are.
        fields: PatchState,
        /// What `klp_transition_patch` gets.
        owner: Gva,
        /// The mark.
        mark: Mark,
    },
    /// The mark of each task that is clear of the plan's functions is taken away. Where all are clear, the plan is committed.
    Clear {
        /// Where the marks are.
        fields: PatchState,
    },
}
