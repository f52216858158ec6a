//! What the core needs of a VMM: to pause the vCPUs, read their registers, write code, and resume.

use crate::addr::Gpa;
use crate::change::Change;
use crate::kernel::locks::LockWord;
use crate::memory::PhysMemory;
use crate::registry::State;
use crate::vcpu::Registers;
use serde::{Deserialize, Serialize};
use std::error::Error;
use std::time::Duration;

/// Why the VMM failed. The implementation's own error is inside.
#[derive(Debug, thiserror::Error)]
#[error("{doing}")]
pub struct MachineError {
    /// What the VMM was to do, as in "pausing the guest".
    pub doing: &'static str,
    /// True where the VMM has paused the guest, and does not know that it runs again.
    pub left_paused: bool,
    /// What the VMM was doing with the machine, where another attempt may succeed. A message says "the VMM keeps …".
    pub transient: Option<&'static str>,
    /// The implementation's error.
    pub source: Box<dyn Error + Send + Sync>,
}

impl MachineError {
    /// Wraps the error of a VMM that failed in `doing`.
    pub fn new(doing: &'static str, source: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self {
            doing,
            left_paused: false,
            transient: None,
            source: source.into(),
        }
    }

    /// The same error, with whether the guest was left paused.
    #[must_use]
    pub fn left_paused(self, left_paused: bool) -> Self {
        Self { left_paused, ..self }
    }

    /// The same error, with what the VMM was doing that will end.
    #[must_use]
    pub fn transient(self, transient: Option<&'static str>) -> Self {
        Self { transient, ..self }
    }
}

/// The times of one pause as the host measured them, in microseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct PauseTimes {
    /// From the request to stop to the answer that the vCPUs are paused.
    pub stop_us: u64,
    /// Reading the registers of all vCPUs.
    pub registers_us: u64,
    /// Checking locks, preconditions and stacks.
    pub check_us: u64,
    /// Writing and reading back.
    pub write_us: u64,
    /// From the request to resume to the answer that the vCPUs run.
    pub resume_us: u64,
    /// From the request to stop to the answer that the vCPUs run.
    pub total_us: u64,
}

/// The changes of a commit, by which a supervisor rolls it back if vmpatch dies.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Journal {
    /// Changes made one by one while the guest runs. The guest cannot reach them.
    pub staged: Vec<Change>,
    /// Changes made in one pause. The last one is the patch's state in the registry.
    pub atomic: Vec<Change>,
    /// The changes of functions and their ftrace records that lead to the patch's code, and of the states of patches that it replaces. Some
    /// commits make them, some undo them. Where nobody has checked the stacks, the supervisor restores what was there before them.
    #[serde(default)]
    pub sites: Vec<Change>,
    /// The guest's locks that must be free in the pause.
    #[serde(default)]
    pub locks: Vec<LockWord>,
    /// The marks of tasks that the pause may set or take away, by address. They are not rolled back: what is left of them is harmless, and the next
    /// process takes it away.
    #[serde(default)]
    pub marks: Vec<Change>,
}

impl Journal {
    /// True where a write is part of this commit or of its rollback: all bytes are within one change, and each is its old or its new one, or as
    /// it is in memory. For a process that makes the writes of another one that is not trusted.
    pub fn permits(&self, memory: &dyn PhysMemory, at: Gpa, bytes: &[u8]) -> bool {
        let behind = self.marks.partition_point(|mark| mark.gpa() <= at);
        let mark = behind.checked_sub(1).and_then(|index| self.marks.get(index));
        let mut changes = mark.into_iter().chain(&self.staged).chain(&self.atomic);
        changes.any(|change| change.permits(memory, at, bytes))
    }

    /// True where the commit leads the guest elsewhere than to the kernel's own code: it ends with a patch in force, or in transition.
    pub(crate) fn redirects(&self) -> bool {
        let is_begin = self.goes_to(State::Transition) || self.goes_to(State::Unpatching);
        is_begin || self.goes_to(State::Applied) && !self.ends_transition()
    }

    /// True where the commit ends a transition: it writes jumps over jumps to the same code.
    pub(crate) fn ends_transition(&self) -> bool {
        let from = |state: &Change| state.undone().sets_word(State::Transition as u64);
        self.goes_to(State::Applied) && self.atomic.last().is_some_and(from)
    }

    fn goes_to(&self, state: State) -> bool {
        self.atomic.last().is_some_and(|last| last.sets_word(state as u64))
    }

    /// True where the commit begins a transition that reverts a patch.
    pub(crate) fn begins_revert(&self) -> bool {
        self.goes_to(State::Unpatching)
    }

    /// For a first apply: the change of its state to [`State::Reverting`].
    pub(crate) fn applying_to_reverting(&self) -> Option<Change> {
        let state = self.atomic.last().filter(|_| self.redirects())?;
        let is_first = state.undone().sets_word(State::Applying as u64);
        is_first.then(|| state.to_word(State::Reverting as u64))
    }
}

/// A virtual machine whose vCPUs can be paused.
pub trait Machine {
    /// Gives a supervisor the journal of a commit, in place of an earlier one; `None` ends the commit. If this process dies or cannot resume
    /// the guest, the supervisor pauses the vCPUs, calls [`crate::commit::roll_back`] with the journal, and resumes the vCPUs if they ran
    /// before.
    ///
    /// # Errors
    ///
    /// The supervisor cannot be reached.
    fn guard(&mut self, journal: Option<&Journal>) -> Result<(), MachineError>;

    /// Pauses all vCPUs.
    ///
    /// # Errors
    ///
    /// The vCPUs run as before, unless [`MachineError::left_paused`].
    fn pause(&mut self) -> Result<Box<dyn Paused + '_>, MachineError>;
}

/// Writes to guest-physical memory that may hold code which the guest runs.
pub trait WriteCode {
    /// Makes all writes, in this order. A vCPU that runs afterwards executes the new bytes.
    ///
    /// # Errors
    ///
    /// Some writes may have been made, and some may be made later: see [`drain`](Self::drain).
    fn write(&mut self, writes: &[(Gpa, Vec<u8>)]) -> Result<(), MachineError>;

    /// Waits, after a failed [`write`](Self::write), until none of its writes can be made later: memory then stays as it is.
    ///
    /// # Errors
    ///
    /// Writes may still be made later.
    fn drain(&mut self) -> Result<(), MachineError>;
}

/// A machine whose vCPUs are paused. When it is dropped, it runs again, unless it was paused before.
pub trait Paused: WriteCode {
    /// Reads the registers of every vCPU.
    fn registers(&mut self) -> Result<Vec<Registers>, MachineError>;

    /// Time since the request to stop.
    fn elapsed(&self) -> Duration;

    /// Resumes the vCPUs. Gives the times of the stop, the registers and the resume, and the total. The caller measures the rest.
    ///
    /// # Errors
    ///
    /// [`MachineError::left_paused`] tells whether the vCPUs may still be paused.
    fn resume(self: Box<Self>) -> Result<PauseTimes, MachineError>;
}
