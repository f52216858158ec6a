//! Writes the atomic changes in the pause: all of them, read back, or none.

use super::CommitError;
use crate::addr::Gpa;
use crate::change::{Change, ChangeError};
use crate::kernel::Live;
use crate::machine::WriteCode;
use crate::memory::PhysMemory;
use crate::text::chain;

/// Writes all changes and reads them back. After a failure, restores the old bytes, still in the pause.
pub(super) fn write(live: &Live<'_>, writer: &mut dyn WriteCode, changes: &[Change]) -> Result<(), CommitError> {
    let mut prepared = Vec::with_capacity(changes.len());
    for change in changes {
        prepared.push((change, change.prepare(live.memory)?));
    }
    // The last change marks the commit as complete.
    let last = prepared.split_off(prepared.len().saturating_sub(1));
    let written = write_some(live, writer, prepared).and_then(|()| write_some(live, writer, last));
    let verified = written.and_then(|()| Ok(changes.iter().try_for_each(|change| change.verify(live.memory))?));
    let Err(first) = verified else { return Ok(()) };
    match restore(live.memory, writer, changes) {
        Ok(()) => Err(first),
        Err(undo) => Err(CommitError::HalfDone {
            first: chain(&first),
            undo: chain(&undo),
        }),
    }
}

/// Writes in order, but all code at once, at the place of the first. Data are written past the VMM, which takes a fraction of the time; those in
/// front of the code by one request, and so those behind it.
/// A revert's code comes before its data: should the pause end in between, no redirect leads to code that is no longer registered.
fn write_some(
    live: &Live<'_>,
    writer: &mut dyn WriteCode,
    changes: Vec<(&Change, Vec<u8>)>,
) -> Result<(), CommitError> {
    let (mut before, mut code, mut behind) = (Vec::new(), Vec::with_capacity(changes.len()), Vec::new());
    for (change, bytes) in changes {
        let writes = match change.is_data() {
            true if code.is_empty() => &mut before,
            true => &mut behind,
            false => &mut code,
        };
        writes.push((change.gpa(), bytes));
    }
    let write_data = |writes: &[(Gpa, Vec<u8>)]| {
        live.memory.write_all(writes).map_err(|source| ChangeError::Memory {
            what: "the data of a patch".to_owned(),
            source,
        })
    };
    write_data(&before)?;
    if !code.is_empty() {
        writer.write(&code)?;
    }
    Ok(write_data(&behind)?)
}

/// Restores the old bytes of `changes`, last first. Any part of them may have been made.
pub(super) fn restore(
    memory: &dyn PhysMemory,
    writer: &mut dyn WriteCode,
    changes: &[Change],
) -> Result<(), CommitError> {
    writer.drain()?;
    let mut writes = Vec::with_capacity(changes.len());
    for change in changes.iter().rev() {
        let bytes = change.restored(memory)?;
        if bytes != change.current(memory)? {
            writes.push((change.gpa(), bytes));
        }
    }
    Ok(writer.write(&writes)?)
}

/// Makes those of the last `changes` of a commit that were not made, or only in part. Code comes first, the last change last.
pub(super) fn complete(
    memory: &dyn PhysMemory,
    writer: &mut dyn WriteCode,
    changes: &[Change],
) -> Result<(), CommitError> {
    let (mut code, mut data) = (Vec::with_capacity(changes.len()), Vec::new());
    for change in changes {
        let bytes = change.completed(memory)?;
        if bytes != change.current(memory)? {
            let writes = if change.is_data() { &mut data } else { &mut code };
            writes.push((change.gpa(), bytes));
        }
    }
    code.append(&mut data);
    writer.write(&code)?;
    Ok(changes.iter().try_for_each(|change| change.verify(memory))?)
}
