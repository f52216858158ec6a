//! QEMU's vCPUs: paused through the GDB stub, and taken over from a killed vmpatch.

use super::error::reach;
use crate::hypervisor::{Prepared, TakenOver, Vcpus};
use guest_core::machine::{MachineError, PauseTimes, Paused, WriteCode};
use guest_core::{Gpa, Registers};
use qmp::machine::{PauseError, RunState};
use std::cell::{RefCell, RefMut};
use std::error::Error;
use std::time::Duration;

/// The vCPUs of a QEMU.
pub(super) struct QemuVcpus<'a>(RefMut<'a, qmp::Machine>);

impl<'a> QemuVcpus<'a> {
    pub(super) fn new(mut machine: RefMut<'a, qmp::Machine>) -> Self {
        machine.on_silence(tell_silence);
        Self(machine)
    }
}

/// Warns that the guest is still paused. In a thread of its own: a subscriber may be slow, and the guest must not wait.
fn tell_silence(paused: Duration) {
    std::thread::spawn(move || {
        tracing::warn!(
            "QEMU does not answer; the guest has been paused for {} s, and is still to be let go on",
            paused.as_secs()
        );
    });
}

impl Vcpus for QemuVcpus<'_> {
    fn prepare(&mut self) -> Result<Prepared, MachineError> {
        self.0.prepare_pause().map_err(at("preparing the pause"))?;
        let state = self.0.run_state().map_err(at("asking whether the guest runs"))?;
        Ok(Prepared {
            running: state == RunState::Running,
            threads: None,
        })
    }

    fn pause(&mut self) -> Result<Box<dyn Paused + '_>, MachineError> {
        let paused = self.0.pause().map_err(|error| ending("pausing the guest", error))?;
        Ok(Box::new(PausedGuest(paused)))
    }
}

/// An error of QEMU's, with what was being done.
fn at<E: Error + Send + Sync + 'static>(doing: &'static str) -> impl FnOnce(E) -> MachineError {
    move |error| MachineError::new(doing, reach(error))
}

/// What QEMU is doing when a pause fails because a vCPU comes or goes.
const PLUGGING: &str = "plugging vCPUs in or out";

/// The error that ended a pause.
fn ending(doing: &'static str, error: PauseError) -> MachineError {
    let (left_paused, passing) = (error.left_paused(), error.is_passing().then_some(PLUGGING));
    MachineError::new(doing, reach(error))
        .left_paused(left_paused)
        .transient(passing)
}

/// A paused guest.
struct PausedGuest<'a>(qmp::machine::Paused<'a>);

impl WriteCode for PausedGuest<'_> {
    fn write(&mut self, writes: &[(Gpa, Vec<u8>)]) -> Result<(), MachineError> {
        write(&mut self.0, writes).map_err(at("writing through QEMU"))
    }

    fn drain(&mut self) -> Result<(), MachineError> {
        let drained = self.0.drain();
        drained.map_err(at("connecting to QEMU anew"))
    }
}

impl Paused for PausedGuest<'_> {
    fn registers(&mut self) -> Result<Vec<Registers>, MachineError> {
        Ok(self.0.registers().to_vec())
    }

    fn elapsed(&self) -> Duration {
        self.0.elapsed()
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

/// A guest that a killed vmpatch may have left paused. Each write pauses it where it runs.
pub(super) struct QemuTakenOver<'a> {
    machine: &'a RefCell<qmp::Machine>,
    has_run: bool,
}

impl<'a> QemuTakenOver<'a> {
    pub(super) fn new(machine: &'a RefCell<qmp::Machine>) -> Result<Self, MachineError> {
        // Opening a stub closes the one that the killed process left, and drops the packets in it.
        machine
            .borrow_mut()
            .prepare_pause()
            .map_err(at("preparing the pause"))?;
        let state = machine.borrow().run_state();
        let has_run = state.map_err(at("asking whether the guest runs"))? == RunState::Running;
        Ok(Self { machine, has_run })
    }
}

impl TakenOver for QemuTakenOver<'_> {
    fn has_run(&self) -> bool {
        self.has_run
    }

    fn resume(self: Box<Self>) -> Result<(), MachineError> {
        let machine = self.machine.borrow();
        let resuming = || at("resuming the guest");
        if machine.run_state().map_err(resuming())? == RunState::Paused {
            machine
                .block_on(machine.client().execute(qapi::qmp::cont {}))
                .map_err(resuming())?;
        }
        Ok(())
    }
}

impl WriteCode for QemuTakenOver<'_> {
    fn write(&mut self, writes: &[(Gpa, Vec<u8>)]) -> Result<(), MachineError> {
        if writes.is_empty() {
            return Ok(());
        }
        let mut machine = self.machine.borrow_mut();
        let mut paused = machine.pause_to_recover().map_err(at("pausing the guest"))?;
        write(&mut paused, writes)
            .and_then(|()| paused.resume().map(drop))
            .map_err(at("writing through QEMU"))
    }

    /// Nothing to do: `new` closed the stub that the killed process left, and its packets.
    fn drain(&mut self) -> Result<(), MachineError> {
        Ok(())
    }
}

fn write(paused: &mut qmp::machine::Paused<'_>, writes: &[(Gpa, Vec<u8>)]) -> Result<(), PauseError> {
    let writes: Vec<_> = writes.iter().map(|(gpa, bytes)| (*gpa, bytes.as_slice())).collect();
    paused.write(&writes)
}
