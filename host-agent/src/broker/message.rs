//! What the worker asks of the broker, and how errors get from one to the other.

use crate::hypervisor::{Meaning, ReachError};
use guest_core::Gpa;
use guest_core::machine::{Journal, MachineError};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::error::Error;
use std::fmt;
use std::sync::{Mutex, PoisonError};

/// A request. Each is answered once.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Request {
    /// Registers of the vCPUs while they run.
    Registers,
    /// What the hypervisor does.
    Activity,
    /// Remove what a killed vmpatch has left.
    RemoveLeftovers,
    /// Make writes to guest memory that the worker has not mapped, in this order. In a commit, the journal must name each of them.
    Write(Vec<Write>),
    /// Outside of a commit: write where the guest's memory holds these old bytes.
    WriteOver {
        /// What is there.
        old: Vec<u8>,
        /// What is to be there.
        write: Write,
    },
    /// A commit begins: start a supervisor. All below are for a commit.
    Begin,
    /// It ends.
    End,
    /// Give the supervisor this journal; without one, nothing is to be rolled back any more.
    Guard(Option<Journal>),
    /// Have the supervisor do what it would do had this vmpatch died. It ends the commit.
    TakeOver,
    /// Pause the vCPUs. All below are for a pause.
    Pause,
    /// Write as code.
    WriteCode(Vec<Write>),
    /// Wait until no failed write can be made later.
    Drain,
    /// Resume the vCPUs.
    Resume,
    /// Resume them, whatever has failed.
    Abandon,
}

/// A write to guest memory.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Write {
    /// The first byte, guest-physical.
    pub at: u64,
    /// The bytes.
    pub bytes: Vec<u8>,
}

impl Write {
    pub(super) fn new(at: Gpa, bytes: &[u8]) -> Self {
        let bytes = bytes.to_vec();
        Self { at: at.0, bytes }
    }
}

/// The text of an error and of its causes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Told {
    text: String,
    cause: Option<Box<Told>>,
}

impl Told {
    /// Of an error.
    pub(crate) fn of(error: &(dyn Error + 'static)) -> Self {
        let chain = std::iter::successors(Some(error), |error| (*error).source());
        let texts: Vec<String> = chain.map(ToString::to_string).collect();
        let told = texts.into_iter().rev().fold(None, |cause: Option<Box<Self>>, text| {
            Some(Box::new(Self { text, cause }))
        });
        told.map_or_else(|| Self::text(""), |told| *told)
    }

    pub(super) fn text(text: &str) -> Self {
        Self {
            text: text.to_owned(),
            cause: None,
        }
    }
}

impl fmt::Display for Told {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl Error for Told {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.cause.as_deref().map(|cause| cause as &(dyn Error + 'static))
    }
}

/// A [`ReachError`].
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct ReachTold {
    meaning: Meaning,
    told: Told,
}

impl From<ReachError> for ReachTold {
    fn from(error: ReachError) -> Self {
        Self {
            meaning: error.meaning(),
            told: Told::of(&error),
        }
    }
}

impl From<ReachTold> for ReachError {
    fn from(ReachTold { meaning, told }: ReachTold) -> Self {
        Self::new(meaning, told)
    }
}

/// A [`MachineError`].
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct MachineTold {
    doing: String,
    left_paused: bool,
    transient: Option<String>,
    /// Where the hypervisor failed.
    meaning: Option<Meaning>,
    told: Told,
}

impl From<MachineError> for MachineTold {
    fn from(error: MachineError) -> Self {
        Self {
            doing: error.doing.to_owned(),
            left_paused: error.left_paused,
            transient: error.transient.map(str::to_owned),
            meaning: ReachError::meaning_in(&error),
            told: Told::of(&*error.source),
        }
    }
}

impl From<MachineTold> for MachineError {
    fn from(error: MachineTold) -> Self {
        let source: Box<dyn Error + Send + Sync> = match error.meaning {
            Some(meaning) => Box::new(ReachError::new(meaning, error.told)),
            None => Box::new(error.told),
        };
        MachineError::new(kept(error.doing), source)
            .left_paused(error.left_paused)
            .transient(error.transient.map(kept))
    }
}

/// A text of the program's own, which there are few of, for as long as the process lives.
fn kept(text: String) -> &'static str {
    static KEPT: Mutex<BTreeSet<&'static str>> = Mutex::new(BTreeSet::new());
    let mut all = KEPT.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(known) = all.get(text.as_str()) {
        return known;
    }
    let text: &'static str = Box::leak(text.into_boxed_str());
    all.insert(text);
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chain::chain;

    fn through<T: Serialize + serde::de::DeserializeOwned>(value: &T) -> T {
        serde_json::from_str(&serde_json::to_string(value).unwrap()).unwrap()
    }

    #[test]
    fn an_error_means_and_says_the_same_in_the_other_process() {
        let busy = ReachError::new(Meaning::Busy, MachineError::new("pausing", "a migration"));
        let error = MachineError::new("writing", busy)
            .left_paused(true)
            .transient(Some("moving"));
        let (said, doing) = (chain(&error), error.doing);
        let there = MachineError::from(through(&MachineTold::from(error)));
        assert_eq!((chain(&there), there.doing), (said, doing));
        assert_eq!((there.left_paused, there.transient), (true, Some("moving")));
        assert_eq!(ReachError::meaning_in(&there), Some(Meaning::Busy));

        let forbidden = ReachError::new(Meaning::Forbidden { memory_of: Some(7) }, "no");
        let there = ReachError::from(through(&ReachTold::from(forbidden)));
        assert_eq!(there.meaning(), Meaning::Forbidden { memory_of: Some(7) });
        assert_eq!(there.to_string(), "no");
    }

    #[test]
    fn a_text_is_kept_once() {
        let (one, two) = (kept("pausing".to_owned()), kept("pausing".to_owned()));
        assert!(std::ptr::eq(one, two));
    }
}
