//! Why a VM can't be reached, or does not do what it is asked.

use serde::{Deserialize, Serialize};
use std::error::Error;
use std::fmt;

/// Why a VM can't be reached, or does not do what it is asked: the implementation's own error, whose words and causes it has, and what
/// that means.
#[derive(Debug)]
pub struct ReachError {
    meaning: Meaning,
    error: Box<dyn Error + Send + Sync>,
}

/// What an error of a hypervisor means to its caller.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Meaning {
    /// It may pass: no answer, somebody else is there.
    MayPass,
    /// Nobody is there: the process has ended.
    Gone,
    /// Trying again would fail again: refused, not understood, or not supported.
    Permanent,
    /// The host forbids it to this user.
    Forbidden {
        /// The process whose memory was to be read, where it is that.
        memory_of: Option<i32>,
    },
    /// The hypervisor works on the guest's memory.
    Busy,
    /// The guest neither runs nor is paused by its operator: it has panicked.
    NotRunning,
}

impl ReachError {
    /// An implementation's error, and what it means.
    pub fn new(meaning: Meaning, error: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        let error = error.into();
        Self { meaning, error }
    }

    /// What it means.
    pub fn meaning(&self) -> Meaning {
        self.meaning
    }

    /// What the first error of a hypervisor means in a chain of causes; None where there is none.
    pub fn meaning_in(error: &(dyn Error + 'static)) -> Option<Meaning> {
        causes(error).find_map(|error| error.downcast_ref().map(Self::meaning))
    }
}

/// An error and its causes.
pub(super) fn causes<'a>(error: &'a (dyn Error + 'static)) -> impl Iterator<Item = &'a (dyn Error + 'static)> {
    std::iter::successors(Some(error), |error: &&'a (dyn Error + 'static)| (*error).source())
}

impl fmt::Display for ReachError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.error.fmt(f)
    }
}

impl Error for ReachError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.error.source()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use guest_core::commit::CommitError;
    use guest_core::machine::MachineError;
    use std::io;

    #[test]
    fn an_error_of_a_hypervisor_is_found_below_what_was_being_done() {
        let busy = ReachError::new(Meaning::Busy, "a migration is under way");
        let error = CommitError::Machine(MachineError::new("pausing the guest", busy));
        assert_eq!(ReachError::meaning_in(&error), Some(Meaning::Busy));
        assert_eq!(ReachError::meaning_in(&io::Error::from(io::ErrorKind::NotFound)), None);
        assert_eq!(error.source().unwrap().to_string(), "a migration is under way");
    }
}
