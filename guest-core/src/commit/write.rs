//! The writes of a pause: all of them, read back, or none.

use super::{CommitError, chain};
use crate::change::Change;
use crate::kernel::Live;
use crate::machine::Paused;
use crate::memory::PhysMemory;

/// Writes all changes in the pause and reads them back; on any failure puts the old bytes back, still in the pause.
pub(super) fn write(live: &Live<'_>, paused: &mut dyn Paused, changes: &[Change]) -> Result<(), CommitError> {
    let mut prepared = Vec::with_capacity(changes.len());
    for change in changes {
        prepared.push((change, change.prepare(live.memory)?));
    }
    // the last one says that all is done
    let last = prepared.split_off(prepared.len().saturating_sub(1));
    let written = write_some(live, paused, prepared).and_then(|()| write_some(live, paused, last));
    let verified = written.and_then(|()| Ok(changes.iter().try_for_each(|change| change.verify(live.memory))?));
    let Err(first) = verified else { return Ok(()) };
    match restore(live.memory, paused, changes) {
        Ok(()) => Err(first),
        Err(undo) => Err(CommitError::HalfDone {
            first: chain(&first),
            undo: chain(&undo),
        }),
    }
}

/// Writes data past the VMM, in a fraction of the time, and what may be code at once, where the first of it stands: a revert forgets
/// what the guest knows of the new code only when nothing leads there any more, should the pause end in between.
fn write_some(live: &Live<'_>, paused: &mut dyn Paused, changes: Vec<(&Change, Vec<u8>)>) -> Result<(), CommitError> {
    let (mut code, mut behind) = (Vec::with_capacity(changes.len()), Vec::new());
    for (change, bytes) in changes {
        match change.is_data() {
            true if code.is_empty() => change.write(live.memory, &bytes)?,
            true => behind.push((change, bytes)),
            false => code.push((change.gpa(), bytes)),
        }
    }
    if !code.is_empty() {
        paused.write(&code)?;
    }
    for (change, bytes) in behind {
        change.write(live.memory, &bytes)?;
    }
    Ok(())
}

/// Puts back the old bytes of `changes`, however much of them was made, last first.
pub(super) fn restore(memory: &dyn PhysMemory, paused: &mut dyn Paused, changes: &[Change]) -> Result<(), CommitError> {
    paused.settle()?;
    let mut writes = Vec::with_capacity(changes.len());
    for change in changes.iter().rev() {
        let bytes = change.restored(memory)?;
        if bytes != change.current(memory)? {
            writes.push((change.gpa(), bytes));
        }
    }
    Ok(paused.write(&writes)?)
}
