//! QEMU's vCPUs as the patch core drives them.

use super::registers;
use crate::supervisor::Supervisor;
use guest_core::machine::{Journal, Machine, MachineError, PauseTimes, Paused};
use guest_core::{Gpa, Registers};
use qmp::machine::{PauseError, RunState};
use std::cell::{RefCell, RefMut};
use std::time::Duration;

/// A guest whose changes a supervisor knows of.
pub struct GuardedMachine<'a> {
    qmp: RefMut<'a, qmp::Machine>,
    supervisor: Supervisor,
}

impl<'a> GuardedMachine<'a> {
    /// Both must be of one guest.
    pub(super) fn new(qmp: RefMut<'a, qmp::Machine>, supervisor: Supervisor) -> Self {
        Self { qmp, supervisor }
    }

    /// Lets go of QEMU, and gives the supervisor: it may have a journal outstanding.
    pub fn into_supervisor(self) -> Supervisor {
        self.supervisor
    }
}

impl Machine for GuardedMachine<'_> {
    fn guard(&mut self, journal: Option<&Journal>) -> Result<(), MachineError> {
        let telling = |error| MachineError::new("telling the supervisor", error);
        let Some(journal) = journal else {
            return self.supervisor.release().map_err(telling);
        };
        self.qmp
            .prepare_pause()
            .map_err(|error| MachineError::new("preparing the pause", error))?;
        let state = self
            .qmp
            .run_state()
            .map_err(|error| MachineError::new("asking whether the guest runs", error))?;
        self.supervisor
            .watch(journal, state == RunState::Running)
            .map_err(telling)
    }

    fn pause(&mut self) -> Result<Box<dyn Paused + '_>, MachineError> {
        let paused = self.qmp.pause().map_err(|error| ending("pausing the guest", error))?;
        Ok(Box::new(PausedGuest(paused)))
    }
}

/// An error with which a pause ended.
fn ending(doing: &'static str, error: PauseError) -> MachineError {
    let left_paused = error.left_paused();
    MachineError::new(doing, error).left_paused(left_paused)
}

/// A guest that stands.
struct PausedGuest<'a>(qmp::machine::Paused<'a>);

impl Paused for PausedGuest<'_> {
    fn registers(&mut self) -> Result<Vec<Registers>, MachineError> {
        Ok(self.0.registers().iter().map(registers).collect())
    }

    fn elapsed(&self) -> Duration {
        self.0.elapsed()
    }

    fn write(&mut self, writes: &[(Gpa, Vec<u8>)]) -> Result<(), MachineError> {
        write(&mut self.0, writes).map_err(|error| MachineError::new("writing through QEMU", error))
    }

    fn settle(&mut self) -> Result<(), MachineError> {
        let settled = self.0.settle();
        settled.map_err(|error| MachineError::new("connecting to QEMU anew", error))
    }

    fn resume(self: Box<Self>) -> Result<PauseTimes, MachineError> {
        let times = self.0.resume().map_err(|error| ending("resuming the guest", error))?;
        Ok(PauseTimes {
            stop_us: times.stop_us,
            registers_us: times.registers_us,
            resume_us: times.resume_us,
            total_us: times.total_us,
            ..PauseTimes::default()
        })
    }
}

/// A guest that a vmpatch which died may have left standing.
pub(super) struct TakenOver<'a> {
    qmp: &'a RefCell<qmp::Machine>,
    running: bool,
}

impl<'a> TakenOver<'a> {
    /// Whether it stands already or not: each write stops it, and `resume` brings it to what it was.
    pub(super) fn new(qmp: &'a RefCell<qmp::Machine>, running: bool) -> Result<Self, MachineError> {
        // Opening a stub closes the one that was left, with whatever was still on its way into the guest.
        qmp.borrow_mut()
            .prepare_pause()
            .map_err(|error| MachineError::new("preparing the pause", error))?;
        Ok(Self { qmp, running })
    }
}

impl Paused for TakenOver<'_> {
    fn registers(&mut self) -> Result<Vec<Registers>, MachineError> {
        let mut qmp = self.qmp.borrow_mut();
        let paused = qmp
            .pause()
            .map_err(|error| MachineError::new("pausing the guest", error))?;
        Ok(paused.registers().iter().map(registers).collect())
    }

    fn elapsed(&self) -> Duration {
        Duration::ZERO
    }

    fn write(&mut self, writes: &[(Gpa, Vec<u8>)]) -> Result<(), MachineError> {
        if writes.is_empty() {
            return Ok(());
        }
        let mut qmp = self.qmp.borrow_mut();
        let mut paused = qmp
            .pause()
            .map_err(|error| MachineError::new("pausing the guest", error))?;
        write(&mut paused, writes)
            .and_then(|()| paused.resume().map(drop))
            .map_err(|error| MachineError::new("writing through QEMU", error))
    }

    /// What was on its way ended with the stub that was left.
    fn settle(&mut self) -> Result<(), MachineError> {
        Ok(())
    }

    fn resume(self: Box<Self>) -> Result<PauseTimes, MachineError> {
        let qmp = self.qmp.borrow();
        let resuming = |error| MachineError::new("resuming the guest", error);
        if self.running && qmp.run_state().map_err(resuming)? == RunState::Paused {
            qmp.block_on(qmp.client().execute(qapi::qmp::cont {}))
                .map_err(resuming)?;
        }
        Ok(PauseTimes::default())
    }
}

fn write(paused: &mut qmp::machine::Paused<'_>, writes: &[(Gpa, Vec<u8>)]) -> Result<(), PauseError> {
    let writes: Vec<_> = writes
        .iter()
        .map(|(gpa, bytes)| (qmp::Gpa(gpa.0), bytes.as_slice()))
        .collect();
    paused.write(&writes)
}
