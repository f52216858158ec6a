//! Undoing and resuming for another process, which was killed in its pause.

use super::pause::{PauseError, Paused};
use super::{AttachError, Machine, RunState};
use crate::addr::Gpa;
use crate::client::CommandError;
use std::path::Path;
use std::time::Duration;

/// Why a recovery did not come to its end.
#[derive(Debug, thiserror::Error)]
pub enum RecoverError {
    /// QEMU was not reached.
    #[error(transparent)]
    Attach(#[from] AttachError),
    /// The stub that the killed process left could not be closed.
    #[error("cannot close the GDB stub that was left open")]
    Close(#[source] CommandError),
    /// The bytes were not written; a guest that was stopped is left so.
    #[error("cannot write the guest's memory back")]
    Write(#[source] PauseError),
    /// The guest does not run.
    #[error("cannot resume the guest")]
    Resume(#[source] CommandError),
}

/// Connects anew within `within`, closes what a killed process left, writes `writes` with the vCPUs stopped, and lets
/// the guest run if it did, or if `resume` says that it did before the killed process paused it.
///
/// Blocking, and without need of anything else from the killed process: for a supervisor.
pub fn recover(qmp: &Path, within: Duration, writes: &[(Gpa, &[u8])], resume: bool) -> Result<(), RecoverError> {
    let mut machine = Machine::attach(qmp, within)?;
    machine.close_stub().map_err(RecoverError::Close)?;
    if !writes.is_empty() {
        write_back(&mut machine, writes).map_err(RecoverError::Write)?;
    }
    if resume && machine.run_state().map_err(RecoverError::Resume)? == RunState::Paused {
        machine
            .block_on(machine.client().execute(qapi::qmp::cont {}))
            .map_err(RecoverError::Resume)?;
    }
    Ok(())
}

/// Not refused while QEMU is busy: half a patch is worse than any snapshot.
fn write_back(machine: &mut Machine, writes: &[(Gpa, &[u8])]) -> Result<(), PauseError> {
    let mut paused = Paused::begin(machine)?;
    paused.write(writes)?;
    paused.resume().map(drop)
}
