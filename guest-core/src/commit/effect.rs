//! What a failed commit has left in the guest.

use super::CommitError;
use serde::{Deserialize, Serialize};
use std::fmt;

/// How much of a change is in the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Effect {
    /// Nothing of it that the guest can reach.
    AsBefore,
    /// All of it, read back.
    InForce,
    /// Unknown: perhaps a part of it.
    HalfPatched,
}

impl Effect {
    /// The name in reports and JSON.
    pub fn name(self) -> &'static str {
        match self {
            Self::AsBefore => "as before",
            Self::InForce => "in force",
            Self::HalfPatched => "half patched",
        }
    }
}

impl fmt::Display for Effect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl CommitError {
    /// How much of the change is in the guest.
    pub fn effect(&self) -> Effect {
        match self {
            Self::HalfDone { .. } => Effect::HalfPatched,
            Self::NotResumed { effect, .. } => *effect,
            Self::NotSafe { .. } | Self::Changed(_) | Self::Machine(_) | Self::Kernel(_) | Self::Tasks(_) => {
                Effect::AsBefore
            }
        }
    }

    /// True where the commit has paused the guest, and does not know that it runs again.
    pub fn left_paused(&self) -> bool {
        matches!(self, Self::NotResumed { source, .. } if source.left_paused)
    }
}
