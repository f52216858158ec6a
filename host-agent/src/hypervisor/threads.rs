//! The vCPU threads of a guest under KVM, and its RAM in the process that runs it: all that it takes to end a commit whose vmpatch died in a
//! pause by ptrace. No monitor is asked, which may be held by another client, or hang.
//!
//! The kernel lets the threads go when the tracer dies, and the guest runs on with whatever was written. So this is made ready before the
//! pause, and another process takes it from there at once.

use super::ram::{self, GuestRam, RamError, RegionInProcess};
use guest_core::Gpa;
use guest_core::commit::{self, CommitError};
use guest_core::machine::{Journal, MachineError, WriteCode};
use kvm::{Armed, FindError, Vm};
use process::{StopError, Stopped};
use serde::{Deserialize, Serialize};
use std::time::{Duration, Instant};

/// How long all vCPUs may take to stop.
const STOP_TIME_MAX: Duration = Duration::from_millis(100);
/// How long it is tried to stop them: the kernel may still be at the end of the process that traced them.
const TRY_TIME_MAX: Duration = Duration::from_secs(10);
/// Pause between two tries: short, since the guest may run half patched.
const TRY_WAIT: Duration = Duration::from_micros(50);
/// How long vCPUs are looked for that have come or gone since.
const FIND_TIME_MAX: Duration = Duration::from_secs(1);

/// The threads that run a guest's vCPUs, and its RAM in their process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VcpuThreads {
    vm: Vm,
    ram: Vec<RegionInProcess>,
}

/// Why a commit was not ended by the vCPUs' threads.
#[derive(Debug, thiserror::Error)]
pub enum ThreadsError {
    /// There are other vCPUs now, and they are not understood.
    #[error("finding the vCPUs' threads")]
    Find(#[from] FindError),
    /// The guest's RAM can't be reached.
    #[error(transparent)]
    Ram(#[from] RamError),
    /// They could not be stopped, or the guest's RAM not be written.
    #[error("ending a commit that was cut off")]
    Commit(#[from] CommitError),
}

impl VcpuThreads {
    pub(super) fn new(vm: Vm, ram: &GuestRam) -> Self {
        let ram = ram.regions();
        Self { vm, ram }
    }

    /// Ends a commit whose vmpatch died while it had these threads stopped: see [`commit::roll_back`]. Gives true
    /// where it is complete.
    ///
    /// # Errors
    ///
    /// It is not ended.
    pub fn end(&self, journal: &Journal) -> Result<bool, ThreadsError> {
        let Some(pid) = self.vm.threads().first().map(|thread| thread.pid) else {
            return Err(FindError::NoVm { pid: 0 }.into());
        };
        let regions: Vec<_> = self.ram.iter().copied().map(Into::into).collect();
        let ram = ram::open(pid, &regions)?;
        let mut vm = self.vm.clone();
        // No register is read: nothing is judged by them, and a stopped thread runs no guest.
        let stopped = stop(&mut vm).map_err(CommitError::from)?;
        let ended = commit::roll_back(&ram, &mut Writer(&ram), journal, true);
        // A process that is being killed does not let its threads go on, and needs no patch.
        let _ = stopped.resume();
        let is_complete = ended?;
        // What is left armed costs the guest a little time and no more; the next vmpatch disarms it.
        let _ = Armed::disarm_left(&vm);
        Ok(is_complete)
    }
}

/// Stops the vCPUs of `vm`, and finds them again where some have come or gone.
fn stop(vm: &mut Vm) -> Result<Stopped, MachineError> {
    let end = Instant::now() + TRY_TIME_MAX;
    loop {
        if !vm.is_current() {
            let pid = vm.threads().first().map_or(0, |thread| thread.pid);
            *vm = Vm::find(pid, FIND_TIME_MAX).map_err(failed)?;
        }
        let stopped = match Stopped::stop(vm.threads(), STOP_TIME_MAX) {
            // A vCPU that came in between runs on.
            Ok(stopped) if vm.is_current() => return Ok(stopped),
            Ok(stopped) => stopped.resume(),
            Err(error) => Err(error),
        };
        match stopped {
            Err(error @ (StopError::Forbidden(_) | StopError::GroupStopped { .. })) => return Err(failed(error)),
            Err(error) if Instant::now() >= end => return Err(failed(error)),
            Ok(()) | Err(_) => std::thread::sleep(TRY_WAIT),
        }
    }
}

/// Writes while the threads are stopped.
struct Writer<'a>(&'a GuestRam);

fn failed(error: impl std::error::Error + Send + Sync + 'static) -> MachineError {
    MachineError::new("stopping the vCPUs' threads", error)
}

impl WriteCode for Writer<'_> {
    fn write(&mut self, writes: &[(Gpa, Vec<u8>)]) -> Result<(), MachineError> {
        let written = self.0.write_through_process(writes);
        written.map_err(|error| MachineError::new("writing the guest's RAM", error))
    }

    fn drain(&mut self) -> Result<(), MachineError> {
        Ok(())
    }
}
