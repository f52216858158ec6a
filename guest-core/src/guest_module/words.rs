//! Words of guest memory as they are going to be: what has been set is read back, and becomes changes in the end.

use crate::addr::Gva;
use crate::change::Change;
use crate::kernel::{KernelError, Live};
use crate::memory::VirtMemory;
use std::collections::BTreeMap;

/// Bytes of a word.
pub(super) const WORD: u64 = 8;

/// Guest memory, and what is to become of some of its words.
pub(super) struct Words<'a> {
    memory: &'a dyn VirtMemory,
    /// Memory that is not laid yet, and its address: words in there are set at once.
    own: (Gva, Vec<u8>),
    /// By address: the word that is there, and the one that is to be there.
    set: BTreeMap<Gva, (u64, u64)>,
}

impl<'a> Words<'a> {
    /// Nothing set yet. `own` are bytes that are going to be at `at`.
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

    /// Says what the word at `at` is going to be.
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

    /// The bytes that are not laid yet, and a change for each word that is going to be another one.
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

    /// The offset of a word in the memory that is not laid yet.
    fn own(&self, at: Gva) -> Option<usize> {
        let offset = usize::try_from(at.checked_sub(self.own.0)?).ok()?;
        (offset < self.own.1.len()).then_some(offset)
    }
}

/// The change of one word at a guest-virtual address, which must not cross a page.
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

/// What is read here, for errors.
const WHAT: &str = "the guest's modules";

/// An address that could not be read.
pub(super) fn unreadable(at: Gva, source: crate::memory::MemoryError) -> KernelError {
    KernelError::Unreadable { what: WHAT, at, source }
}

/// A structure that contradicts itself.
pub(super) fn damaged(found: String, expected: &str) -> KernelError {
    KernelError::Disagrees {
        what: WHAT,
        found,
        expected: expected.to_owned(),
    }
}
