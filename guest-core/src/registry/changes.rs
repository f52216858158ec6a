//! The changes that create, edit and remove a registry.

use super::{DIRECTORY_ENTRY_BITS, FILLER, HEADER_BYTES, MAGIC, Pages, Registry, SLOT_BYTES, State, VERSION};
use crate::change::Change;
use crate::kernel::{KernelError, Live};
use crate::paging::PAGE_SIZE;
use std::ops::Range;

impl Registry {
    /// Plans an empty registry and its alias mapping. The changes must be made in this order: the header goes first, so that the next vmpatch
    /// knows whose the rest is, and removes a registry whose creation was cut off.
    pub fn creation(&self) -> Vec<Change> {
        let filler = |len| vec![FILLER; len];
        let page = PAGE_SIZE as usize;
        let entry = self.page(1).0 | DIRECTORY_ENTRY_BITS;
        let slots = self.base.wrapping_add(HEADER_BYTES as u64);
        vec![
            Change::replace("registry header", self.base, filler(page), self.header(VERSION)),
            Change::replace("registry slots", slots, filler(page), vec![0; page - HEADER_BYTES]),
            Change::replace(
                "page table of the alias mapping",
                self.page(1),
                filler(page),
                vec![0; page],
            ),
            Change::word(
                "page-directory entry of the alias mapping",
                self.directory_entry,
                0,
                entry,
            ),
        ]
    }

    /// Plans the removal of a registry without entries. The changes must be made in this order: the header goes last, so that the next
    /// vmpatch finds a registry whose removal was cut off, and finishes. `changed` are the changes that are made before these.
    ///
    /// # Errors
    ///
    /// The registry cannot be read.
    pub fn removal(&self, live: &Live<'_>, changed: &[Change]) -> Result<Vec<Change>, KernelError> {
        let word = |gpa| {
            let mut bytes = [0; 8];
            self.read_arena(live, gpa, &mut bytes)
                .map(|()| u64::from_le_bytes(bytes))
        };
        let wipe = |what, gpa, len: usize| {
            let mut old = vec![0; len];
            self.read_arena(live, gpa, &mut old)?;
            changed.iter().for_each(|change| change.overlay(gpa, &mut old));
            Ok::<_, KernelError>(Change::replace(what, gpa, old, vec![FILLER; len]))
        };
        let mut changes = Vec::new();
        let entry = word(self.directory_entry)?;
        if entry != 0 {
            changes.push(Change::word(
                "page-directory entry of the alias mapping",
                self.directory_entry,
                entry,
                0,
            ));
        }
        let page = PAGE_SIZE as usize;
        changes.push(wipe("page table of the alias mapping", self.page(1), page)?);
        let slots = self.base.wrapping_add(HEADER_BYTES as u64);
        changes.push(wipe("registry slots", slots, page - HEADER_BYTES)?);
        changes.push(wipe("registry header", self.base, HEADER_BYTES)?);
        Ok(changes)
    }

    /// Plans the change of a slot's state.
    pub fn state_change(&self, slot: usize, from: State, to: State) -> Change {
        Change::word(format!("state of slot {slot}"), self.slot(slot), from as u64, to as u64).of_data()
    }

    /// Plans the filling of a free slot. `record` is the range of bytes within `pages` that holds the record, `crc` its CRC-32.
    pub fn slot_change(&self, slot: usize, state: State, pages: Pages, record: &Range<u64>, crc: u32) -> Change {
        let mut bytes = vec![0; SLOT_BYTES];
        let words = [
            pages.first,
            pages.count,
            record.start,
            record.end - record.start,
            u64::from(crc),
        ];
        bytes[..8].copy_from_slice(&(state as u64).to_le_bytes());
        for (field, word) in bytes[8..28].chunks_exact_mut(4).zip(words) {
            // Pages and record lie within the arena's 2 MiB.
            field.copy_from_slice(&(word as u32).to_le_bytes());
        }
        Change::replace(format!("slot {slot}"), self.slot(slot), vec![0; SLOT_BYTES], bytes)
    }

    /// Plans the emptying of a slot, whatever it holds.
    ///
    /// # Errors
    ///
    /// The slot cannot be read.
    pub fn clear_slot(&self, live: &Live<'_>, slot: usize) -> Result<Change, KernelError> {
        let mut old = vec![0; SLOT_BYTES];
        self.read_arena(live, self.slot(slot), &mut old)?;
        Ok(Change::replace(
            format!("slot {slot}"),
            self.slot(slot),
            old,
            vec![0; SLOT_BYTES],
        ))
    }

    /// Plans the upgrade of an older registry's header to the current layout version; `None` where there is nothing to upgrade.
    pub fn upgrade(&self) -> Option<Change> {
        let headers = (self.header(self.version), self.header(VERSION));
        (self.exists && self.version != VERSION)
            .then(|| Change::replace("registry header", self.base, headers.0, headers.1))
    }

    fn header(&self, version: u32) -> Vec<u8> {
        let mut page = vec![0; HEADER_BYTES];
        page[..8].copy_from_slice(&MAGIC);
        page[8..12].copy_from_slice(&version.to_le_bytes());
        let words = [self.cave.0, self.alias.0, self.directory_entry.0, self.arena_pages];
        for (field, word) in page[16..48].chunks_exact_mut(8).zip(words) {
            field.copy_from_slice(&word.to_le_bytes());
        }
        let crc = crc32fast::hash(&page[16..HEADER_BYTES]);
        page[12..16].copy_from_slice(&crc.to_le_bytes());
        page
    }
}
