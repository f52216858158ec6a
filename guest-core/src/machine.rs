//! What the core asks of a VMM: to stop the vCPUs, tell their registers, write where code is, and go on.

use crate::addr::Gpa;
use crate::change::Change;
use crate::vcpu::Registers;
use serde::{Deserialize, Serialize};
use std::error::Error;
use std::time::Duration;

/// Why the VMM could not do it; the implementation's own error is inside.
#[derive(Debug, thiserror::Error)]
#[error("{doing}")]
pub struct MachineError {
    /// What was asked of the VMM.
    pub doing: &'static str,
    /// True where the guest was paused for it, and is not known to run again.
    pub left_paused: bool,
    /// Its error.
    pub source: Box<dyn Error + Send + Sync>,
}

impl MachineError {
    /// Wraps a VMM's error.
    pub fn new(doing: &'static str, source: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self {
            doing,
            left_paused: false,
            source: source.into(),
        }
    }

    /// The same error, with what became of the pause.
    #[must_use]
    pub fn left_paused(self, left_paused: bool) -> Self {
        Self { left_paused, ..self }
    }
}

/// How long one pause took as the host saw it, in microseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PauseTimes {
    /// From asking to stop to hearing that the vCPUs stand.
    pub stop_us: u64,
    /// Reading all registers.
    pub registers_us: u64,
    /// Checking locks, stacks and the bytes to be replaced.
    pub check_us: u64,
    /// Writing and reading back.
    pub write_us: u64,
    /// From asking to resume to hearing that the vCPUs run.
    pub resume_us: u64,
    /// From asking to stop to hearing that the vCPUs run.
    pub total_us: u64,
}

/// What a plan changes, for whoever has to take it back should vmpatch die.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Journal {
    /// Changes made one by one while the guest runs; nothing of them is reachable for the guest.
    pub before: Vec<Change>,
    /// Changes made in one pause; the last one is the state in the registry.
    pub paused: Vec<Change>,
}

/// A virtual machine whose vCPUs can be stopped.
pub trait Machine {
    /// Makes sure that, should this process die or not be able to resume the guest, somebody else stops the vCPUs, calls
    /// [`crate::commit::take_back`] with this journal, and lets them run again if they were running. Replaces what was said before;
    /// `None` ends it.
    fn guard(&mut self, journal: Option<&Journal>) -> Result<(), MachineError>;

    /// Stops all vCPUs. On an error they run as before, unless [`MachineError::left_paused`].
    fn pause(&mut self) -> Result<Box<dyn Paused + '_>, MachineError>;
}

/// A machine whose vCPUs stand. Dropped, it runs again, unless its operator had paused it before.
pub trait Paused {
    /// Registers of every vCPU.
    fn registers(&mut self) -> Result<Vec<Registers>, MachineError>;

    /// Time since it was asked to stop.
    fn elapsed(&self) -> Duration;

    /// Writes guest-physical memory such that running code changes too.
    fn write(&mut self, writes: &[(Gpa, Vec<u8>)]) -> Result<(), MachineError>;

    /// After a write that failed: makes sure that none of it is on its way any more, so that memory stays as it is read now.
    fn settle(&mut self) -> Result<(), MachineError>;

    /// Lets the vCPUs run, and tells how long that, the stop and the registers took, and all together; the times between
    /// are the caller's. Errors: [`MachineError::left_paused`] where they are not known to run.
    fn resume(self: Box<Self>) -> Result<PauseTimes, MachineError>;
}
