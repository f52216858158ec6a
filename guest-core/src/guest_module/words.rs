//! Edits words of guest memory: words that were set are read back with their new values, and become changes in the end.

use crate::addr::Gva;
use crate::change::Change;
use crate::kernel::{KernelError, Live};
use crate::memory::{MemoryError, VirtMemory};
use std::collections::BTreeMap;

/// Bytes of a word.
pub(super) const WORD: u64 = 8;

/// Guest memory, with new values for some of its words.
pub(super) struct Words<'a> {
    memory: &'a dyn VirtMemory,
    /// Memory that is not staged yet, and its address. Its words are set at once.
    own: (Gva, Vec<u8>),
    /// The old and the new value of each word that was set, by address.
    set: BTreeMap<Gva, (u64, u64)>,
}

impl<'a> Words<'a> {
    /// Starts without new values. `own` are bytes that will be staged at `at`.
    pub fn new(memory: &'a dyn VirtMemory, at: Gva, own: Vec<u8>) -> Self {
        Self {
            memory,
            own: (at, own),
            set: BTreeMap::new(),
        }
    }

    /// The word at `at`.
    pub fn get(&self, at: Gva) -> Result<u64, KernelError> {
        if let Some((_, word)) = self.set.get(&at) {
            return Ok(*word);
        }
        if let Some(bytes) = self.own(at).and_then(|offset| self.own.1.get(offset..)?.first_chunk()) {
            return Ok(u64::from_le_bytes(*bytes));
        }
        self.memory.read_u64(at).map_err(|source| unreadable(at, source))
    }

    /// Like [`Self::get`]; `None` where the guest's page tables map nothing there.
    pub fn get_mapped(&self, at: Gva) -> Result<Option<u64>, KernelError> {
        match self.get(at) {
            Err(KernelError::Unreadable {
                source: MemoryError::NotMapped { .. },
                ..
            }) => Ok(None),
            word => word.map(Some),
        }
    }

    /// Sets the word at `at`.
    pub fn set(&mut self, at: Gva, word: u64) -> Result<(), KernelError> {
        if let Some((_, now)) = self.set.get_mut(&at) {
            *now = word;
            return Ok(());
        }
        let offset = self.own(at);
        let slot = offset.and_then(|offset| self.own.1.get_mut(offset..)?.first_chunk_mut());
        if let Some(slot) = slot {
            *slot = word.to_le_bytes();
            return Ok(());
        }
        self.set.insert(at, (self.get(at)?, word));
        Ok(())
    }

    /// The bytes that are not staged yet, and a change for each word with a new value.
    pub fn finish(self, live: &Live<'_>, what: &str) -> Result<(Vec<u8>, Vec<Change>), KernelError> {
        let mut changes = Vec::new();
        for (at, (old, new)) in self.set.into_iter().filter(|(_, (old, new))| old != new) {
            changes.push(word_change(live, what, at, old, new)?);
        }
        Ok((self.own.1, changes))
    }

    /// Addresses and values of the words that were set.
    #[cfg(test)]
    pub fn set_words(&self) -> Vec<(u64, u64)> {
        self.set.iter().map(|(at, (_, word))| (at.0, *word)).collect()
    }

    /// The offset of a word in the memory that is not staged yet.
    fn own(&self, at: Gva) -> Option<usize> {
        let offset = usize::try_from(at.checked_sub(self.own.0)?).ok()?;
        (offset < self.own.1.len()).then_some(offset)
    }
}

/// The change of one word at a guest-virtual address. The word must not cross a page boundary.
fn word_change(live: &Live<'_>, what: &str, at: Gva, old: u64, new: u64) -> Result<Change, KernelError> {
    let (gpa, contiguous) = live.physical(at).map_err(|source| unreadable(at, source))?;
    if !at.0.is_multiple_of(WORD) || contiguous < WORD {
        return Err(KernelError::Disagrees {
            what: WHAT,
            found: at.to_string(),
            expected: "the address of a whole word".to_owned(),
        });
    }
    Ok(Change::word(what, gpa, old, new).of_data())
}

/// Name of what is read here, for errors.
const WHAT: &str = "the guest's modules";

/// The error of an address that cannot be read.
pub(super) fn unreadable(at: Gva, source: MemoryError) -> KernelError {
    KernelError::Unreadable { what: WHAT, at, source }
}

/// The error of a structure that contradicts itself.
pub(super) fn damaged(found: String, expected: &str) -> KernelError {
    KernelError::Disagrees {
        what: WHAT,
        found,
        expected: expected.to_owned(),
    }
}
