//! What a guest is like after a command that failed.

use guest_core::commit::Effect;

/// What a guest is like after a command that failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GuestState {
    /// As it was when the command began.
    AsBefore,
    /// All that the command was to change is changed.
    InForce,
    /// Of several changes those that the report lists as done are in force, and no other.
    PartlyDone,
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
    /// For JSON, see `docs/json.md`.
    pub fn name(self) -> &'static str {
        match self {
            Self::AsBefore => Effect::AsBefore.name(),
            Self::InForce => Effect::InForce.name(),
            Self::PartlyDone => "partly done",
            Self::HalfPatched => Effect::HalfPatched.name(),
            Self::Paused { .. } => "paused",
            Self::Lost => "lost",
        }
    }

    /// How much of the change is in a guest that is paused: the name alone does not tell.
    pub fn change(self) -> Option<&'static str> {
        match self {
            Self::Paused { change } => Some(change.name()),
            _ => None,
        }
    }

    /// For a person; none where nothing has changed.
    pub fn sentence(self) -> Option<String> {
        Some(match self {
            Self::AsBefore => return None,
            Self::InForce => "the change is in force".to_owned(),
            Self::PartlyDone => "what is reported as done is in force, and nothing else".to_owned(),
            Self::HalfPatched => "it may be half patched".to_owned(),
            Self::Paused { change } => format!("paused, and not known to run again; the change is {change}"),
            Self::Lost => "it can go on in neither process".to_owned(),
        })
    }
}

impl From<Effect> for GuestState {
    fn from(effect: Effect) -> Self {
        match effect {
            Effect::AsBefore => Self::AsBefore,
            Effect::InForce => Self::InForce,
            Effect::HalfPatched => Self::HalfPatched,
        }
    }
}
