//! Ends a commit whose vmpatch was killed, with nothing but its journal. [`crate::transaction::recovery`] has the rules, and why they are safe.

use super::CommitError;
use super::write::{complete, restore};
use crate::change::{Change, ChangeError};
use crate::machine::{Journal, WriteCode};
use crate::memory::PhysMemory;
use crate::transaction::recovery::{Ending, Written};

/// Ends the commit of a vmpatch that died: undoes it, finishes it, or leaves the rest to the next vmpatch. Gives true where it is in force.
///
/// `has_run` says that the guest may have run since it was paused for the commit. It must be paused now. May be called again after a failure.
///
/// # Errors
///
/// Guest memory cannot be read or written.
pub fn roll_back(
    memory: &dyn PhysMemory,
    writer: &mut dyn WriteCode,
    journal: &Journal,
    has_run: bool,
) -> Result<bool, CommitError> {
    if is_complete(memory, &journal.atomic) {
        return Ok(true);
    }
    writer.drain()?;
    let commit = CutOff { memory, journal };
    let (redirects, mark) = (journal.redirects(), journal.applying_to_reverting());
    if mark.is_some_and(|mark| is_complete(memory, &[mark])) {
        // A failure may have come between.
        commit.restore_sites(writer)?;
        return Ok(false);
    }
    match commit.ending(redirects, has_run)? {
        Ending::Undo => {
            restore(memory, writer, &journal.atomic)?;
            // The next vmpatch finds marks by the registry.
            if commit.has_marks()? {
                return Ok(false);
            }
            for change in journal.staged.iter().rev() {
                change.restore(memory)?;
            }
            Ok(false)
        }
        Ending::UndoData => {
            let (data, _) = commit.around_first_code();
            if commit.are_free(data)? {
                restore(memory, writer, data)?;
            }
            Ok(false)
        }
        _ if journal.begins_revert() => commit.complete_begin(writer),
        ending => {
            if ending == Ending::Finish && commit.finish(writer)? {
                return Ok(true);
            }
            commit.restore_sites(writer)?;
            if !redirects && commit.written()? == Written::AllCode {
                commit.finish(writer)?;
            }
            Ok(!redirects)
        }
    }
}

/// True where all atomic changes were made. The last one is the patch's state in the registry.
pub(super) fn is_complete(memory: &dyn PhysMemory, atomic: &[Change]) -> bool {
    atomic.last().is_some_and(|state| state.verify(memory).is_ok())
}

/// A commit that was cut off before its last word.
struct CutOff<'a> {
    memory: &'a dyn PhysMemory,
    journal: &'a Journal,
}

impl<'a> CutOff<'a> {
    /// How much was written, the last word aside. What the guest has changed since counts as written.
    fn written(&self) -> Result<Written, ChangeError> {
        let is_old = |change: &Change| change.undone().is_made(self.memory);
        let atomic = match self.journal.atomic.split_last() {
            // Staging has recorded the state that the pause begins with.
            Some((state, atomic)) if is_old(state)? => atomic,
            _ => return Ok(Written::Nothing),
        };
        if all(atomic, is_old)? {
            return Ok(Written::Nothing);
        }
        let code = || atomic.iter().filter(|change| !change.is_data());
        Ok(if all(code(), |change| change.is_made(self.memory))? {
            Written::AllCode
        } else if all(code(), is_old)? {
            Written::Data
        } else {
            Written::SomeCode
        })
    }

    /// What is done with it. The jumps of a transition's end lead to the same code as those that they replace: it is finished.
    fn ending(&self, redirects: bool, has_run: bool) -> Result<Ending, ChangeError> {
        Ok(match Ending::of(self.written()?, redirects, has_run) {
            Ending::RestoreSites if self.journal.ends_transition() => Ending::Finish,
            ending => ending,
        })
    }

    /// True where tasks may have got their marks.
    fn has_marks(&self) -> Result<bool, ChangeError> {
        let is_unset = |mark: &Change| mark.undone().is_made(self.memory);
        Ok(!all(&self.journal.marks, is_unset)?)
    }

    /// The changes in front of the first code, which are written before it, and the others.
    fn around_first_code(&self) -> (&'a [Change], &'a [Change]) {
        let atomic = &self.journal.atomic;
        let first = atomic.iter().position(|change| !change.is_data());
        atomic.split_at(first.unwrap_or(0))
    }

    /// True where the guest holds no lock under which it uses what `changes` write, and has changed none of it since.
    fn are_free(&self, changes: &[Change]) -> Result<bool, CommitError> {
        for lock in &self.journal.locks {
            if !lock
                .is_free(self.memory)
                .map_err(ChangeError::of("a lock of the guest"))?
            {
                return Ok(false);
            }
        }
        Ok(all(changes, |change| change.is_ours(self.memory))?)
    }

    /// Makes what is left behind the code. Gives false, and changes nothing, where the guest uses it.
    fn finish(&self, writer: &mut dyn WriteCode) -> Result<bool, CommitError> {
        let (_, left) = self.around_first_code();
        let is_free = self.are_free(left)?;
        if is_free {
            complete(self.memory, writer, left)?;
        }
        Ok(is_free)
    }

    /// Makes what is left of the begin of a revert: code and a state alone, which no lock of the guest's is for. Gives false, and changes nothing,
    /// where the guest has written there since.
    fn complete_begin(&self, writer: &mut dyn WriteCode) -> Result<bool, CommitError> {
        let all_changes = &self.journal.atomic;
        let is_own = all(all_changes, |change| change.is_ours(self.memory))?;
        if is_own {
            complete(self.memory, writer, all_changes)?;
        }
        Ok(is_own)
    }

    /// Writes the old bytes into the sites. The code of a first apply may have run then: the registry says so before, and that the patches are
    /// in force that it was replacing.
    fn restore_sites(&self, writer: &mut dyn WriteCode) -> Result<(), CommitError> {
        let (data, code): (Vec<_>, Vec<_>) = self.journal.sites.iter().rev().partition(|change| change.is_data());
        let restored = |change: &Change| Ok((change.gpa(), change.restored(self.memory)?));
        let mark = self.journal.applying_to_reverting();
        let marked = mark.iter().map(|mark| Ok((mark.gpa(), mark.completed(self.memory)?)));
        let data = data.into_iter().map(restored);
        let writes = data.chain(marked).chain(code.into_iter().map(restored));
        Ok(writer.write(&writes.collect::<Result<Vec<_>, ChangeError>>()?)?)
    }
}

/// True where `is` holds for all `changes`.
fn all<'c>(
    changes: impl IntoIterator<Item = &'c Change>,
    is: impl Fn(&Change) -> Result<bool, ChangeError>,
) -> Result<bool, ChangeError> {
    for change in changes {
        if !is(change)? {
            return Ok(false);
        }
    }
    Ok(true)
}
