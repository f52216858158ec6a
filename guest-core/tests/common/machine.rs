//! A machine of which only memory and registers are there: stopping it takes no time, and a journal is only kept.

use super::guest::Guest;
use super::ram::Ram;
use guest_core::machine::{Journal, Machine, MachineError, PauseTimes, Paused, WriteCode};
use guest_core::{Gpa, PhysMemory, Registers};
use std::time::Duration;

/// What is in memory, by page.
type Pages = Vec<(u64, Vec<u8>)>;

/// The machine of a guest.
pub struct Vm<'a> {
    pub ram: &'a Ram,
    pub vcpus: Vec<Registers>,
    /// What a supervisor would have to roll back.
    pub journal: Option<Journal>,
    /// How often it was stopped.
    pub pauses: u32,
    /// The supervisor dies with the commit: it can't be told that nothing is left to roll back.
    pub supervisor_dies: bool,
    /// The first write fails, and what it was to write comes later: when the writes are drained, or the guest runs.
    pub is_late: bool,
    /// It does not run again after a pause.
    pub stays_paused: bool,
    /// How long each pause is said to have taken up to the writes.
    pub elapsed: Duration,
    /// What memory held when the first code was written.
    pub before_code: Option<Pages>,
    /// A word that the guest writes right before it is stopped.
    pub last_write: Option<(Gpa, u64)>,
}

impl<'a> Vm<'a> {
    /// The machine that runs `guest`.
    pub fn new(guest: &'a Guest) -> Self {
        let vcpus = guest.vcpus.clone();
        Self {
            ram: &guest.ram,
            vcpus,
            journal: None,
            pauses: 0,
            supervisor_dies: false,
            is_late: false,
            stays_paused: false,
            elapsed: Duration::ZERO,
            before_code: None,
            last_write: None,
        }
    }
}

impl Machine for Vm<'_> {
    fn guard(&mut self, journal: Option<&Journal>) -> Result<(), MachineError> {
        if self.supervisor_dies && journal.is_none() {
            return Err(MachineError::new("telling the supervisor", "it is gone"));
        }
        self.journal = journal.cloned();
        Ok(())
    }

    fn pause(&mut self) -> Result<Box<dyn Paused + '_>, MachineError> {
        self.pauses += 1;
        if let Some((at, word)) = self.last_write {
            self.ram.write(at, &word.to_le_bytes()).unwrap();
        }
        Ok(Box::new(Stopped {
            ram: self.ram,
            vcpus: &self.vcpus,
            elapsed: self.elapsed,
            stays_paused: self.stays_paused,
            late: self.is_late.then(Vec::new),
            before_code: Some(&mut self.before_code),
        }))
    }
}

/// The same while its vCPUs stand.
pub struct Stopped<'a> {
    pub ram: &'a Ram,
    pub vcpus: &'a [Registers],
    pub elapsed: Duration,
    /// It does not run again.
    pub stays_paused: bool,
    /// Where the first write is late: what it was to write.
    pub late: Option<Vec<(Gpa, Vec<u8>)>>,
    /// Where to keep what memory holds at the first write.
    pub before_code: Option<&'a mut Option<Pages>>,
}

impl<'a> Stopped<'a> {
    /// A guest that is paused already.
    pub fn new(guest: &'a Guest) -> Self {
        Self {
            ram: &guest.ram,
            vcpus: &guest.vcpus,
            elapsed: Duration::ZERO,
            stays_paused: false,
            late: None,
            before_code: None,
        }
    }

    fn write_late(&mut self) {
        for (at, bytes) in self.late.take().into_iter().flatten() {
            self.ram.write(at, &bytes).unwrap();
        }
    }
}

impl Drop for Stopped<'_> {
    fn drop(&mut self) {
        self.write_late();
    }
}

impl WriteCode for Stopped<'_> {
    fn write(&mut self, writes: &[(Gpa, Vec<u8>)]) -> Result<(), MachineError> {
        if let Some(kept) = self.before_code.take() {
            kept.get_or_insert_with(|| self.ram.differences());
        }
        if let Some(late) = self.late.as_mut().filter(|_| !writes.is_empty()) {
            late.extend_from_slice(writes);
            return Err(MachineError::new("writing to the guest", "no answer"));
        }
        for (at, bytes) in writes {
            self.ram
                .write(*at, bytes)
                .map_err(|error| MachineError::new("writing to the guest", error))?;
        }
        Ok(())
    }

    fn drain(&mut self) -> Result<(), MachineError> {
        self.write_late();
        Ok(())
    }
}

impl Paused for Stopped<'_> {
    fn registers(&mut self) -> Result<Vec<Registers>, MachineError> {
        Ok(self.vcpus.to_vec())
    }

    fn elapsed(&self) -> Duration {
        self.elapsed
    }

    fn resume(self: Box<Self>) -> Result<PauseTimes, MachineError> {
        if self.stays_paused {
            return Err(MachineError::new("resuming the guest", "no answer").left_paused(true));
        }
        Ok(PauseTimes::default())
    }
}
