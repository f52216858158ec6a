//! What a failed operation means: why it failed, as far as callers act on it, and what the guest is like.

use guest_core::commit::Effect;
use guest_core::guest;

/// What a guest is like after an operation that failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GuestState {
    /// As it was when the operation began.
    AsBefore,
    /// All that the operation was to change is changed.
    InForce,
    /// Of several changes those that were done before the failure are in force, and no other.
    PartlyDone,
    /// A patch is in transition: some tasks run the old code, all others the new, and none a part of each.
    InTransition,
    /// Some of a change may be in force.
    HalfPatched,
    /// vmpatch paused it, and it is not known to run again.
    Paused {
        /// How much of the change is in it.
        change: Effect,
    },
    /// It ran in its new QEMU, which has ended, and can't go on in the old one.
    Lost,
}

impl GuestState {
    /// The graver of two states, of which `self` is that of the failure itself, and `before` that which it came upon.
    #[must_use]
    pub fn or(self, before: Self) -> Self {
        match self {
            Self::AsBefore => before,
            graver => graver,
        }
    }
}

impl From<guest::GuestState> for GuestState {
    fn from(state: guest::GuestState) -> Self {
        match state {
            guest::GuestState::AsBefore => Self::AsBefore,
            guest::GuestState::InForce => Self::InForce,
            guest::GuestState::InTransition => Self::InTransition,
            guest::GuestState::HalfPatched => Self::HalfPatched,
            guest::GuestState::Paused { change } => Self::Paused { change },
        }
    }
}

/// Why an operation failed, as far as its caller acts on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// Something did not work.
    Failed,
    /// The patch or the guest does not fit: trying the same again is refused again.
    Refused,
    /// There was no safe moment within the time given.
    NotSafe,
    /// There is no such guest, or it can't be reached.
    Unreachable,
}
