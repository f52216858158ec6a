//! Where a patch is laid in the pool: its text, read-only data, data and record, one behind the other.

use crate::addr::{Gpa, Gva};
use crate::change::Change;
use crate::module::Linked;
use crate::paging::{PAGE_SIZE, entry};
use crate::place::{FILLER, Pages, Registry, RegistryError, State};

/// The room of a patch: the first page of each part, and the page behind the last.
#[derive(Debug, Clone, Copy)]
pub(super) struct Areas {
    /// The registry's slot.
    pub slot: usize,
    text: u64,
    rodata: u64,
    data: u64,
    record: u64,
    end: u64,
}

impl Areas {
    /// Finds room for text, read-only data and data of that many bytes, and for a record.
    pub fn find(registry: &Registry, sizes: [u64; 3], record_bytes: u64) -> Result<Self, RegistryError> {
        let [text, rodata, data] = sizes.map(pages);
        let record = pages(record_bytes);
        let (slot, area) = registry.allocate(text + rodata + data + record)?;
        Ok(Self {
            slot,
            text: area.first,
            rodata: area.first + text,
            data: area.first + text + rodata,
            record: area.first + text + rodata + data,
            end: area.first + area.count,
        })
    }

    /// Where text, read-only data and data are going to be.
    pub fn mapped(&self, registry: &Registry) -> [Gva; 3] {
        [self.text, self.rodata, self.data].map(|page| registry.mapped(page))
    }

    /// Where the data is in the guest's memory.
    pub fn data(&self, registry: &Registry) -> Gpa {
        registry.page(self.data)
    }

    /// Bytes that a record may have here.
    pub fn record_room(&self) -> u64 {
        (self.end - self.record) * PAGE_SIZE
    }

    /// The changes that lay the patch with its record, which [fits](Self::record_room): for the guest nothing of it is reachable.
    pub fn lay(&self, registry: &Registry, linked: &Linked, record: &[u8]) -> Vec<Change> {
        let mut changes = match registry.exists {
            true => registry.renewal().into_iter().collect(),
            false => registry.creation(),
        };
        let bytes = record.len() as u64;
        let pages = Pages {
            first: self.text,
            count: self.record - self.text + pages(bytes),
        };
        let offset = (self.record - self.text) * PAGE_SIZE;
        let stored = offset..offset + bytes;
        changes.push(registry.slot_change(self.slot, State::Placing, pages, &stored, crc32fast::hash(record)));
        let placed = [
            (self.text, linked.text.as_slice()),
            (self.rodata, &linked.rodata),
            (self.data, &linked.data),
            (self.record, record),
        ];
        let placed = placed.into_iter().filter(|(_, bytes)| !bytes.is_empty());
        changes.extend(placed.map(|(page, bytes)| fill(registry, page, bytes)));
        changes.extend(self.map(registry, linked));
        changes.push(registry.state_change(self.slot, State::Placing, State::Applying));
        changes
    }

    /// The page-table entries: text to run, read-only data to read, data to read and write. Accessed and dirty are set
    /// beforehand, so that no CPU ever writes to the table.
    fn map(&self, registry: &Registry, linked: &Linked) -> Vec<Change> {
        let seen = entry::PRESENT | entry::ACCESSED;
        let parts = [
            (self.text, &linked.text, seen),
            (self.rodata, &linked.rodata, seen | entry::NO_EXECUTE),
            (
                self.data,
                &linked.data,
                seen | entry::WRITABLE | entry::DIRTY | entry::NO_EXECUTE,
            ),
        ];
        let entries = parts.into_iter().flat_map(|(first, bytes, bits)| {
            (first..first + pages(bytes.len() as u64)).map(move |page| {
                let what = format!("page-table entry of pool page {page}");
                Change::word(what, registry.table_entry(page), 0, registry.page(page).0 | bits)
            })
        });
        entries.collect()
    }
}

fn pages(bytes: u64) -> u64 {
    bytes.div_ceil(PAGE_SIZE)
}

/// Bytes into pages of the pool that are still filler.
fn fill(registry: &Registry, page: u64, bytes: &[u8]) -> Change {
    Change::replace(
        format!("pool page {page}"),
        registry.page(page),
        vec![FILLER; bytes.len()],
        bytes.to_vec(),
    )
}
