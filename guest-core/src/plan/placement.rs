//! The pages of the arena that a patch gets: for its text, read-only data, data and record, in this order.

use crate::addr::{Gpa, Gva};
use crate::change::Change;
use crate::module::Linked;
use crate::paging::{PAGE_SIZE, entry};
use crate::registry::{FILLER, Pages, Registry, RegistryError, State};

/// The pages of a patch, as indexes in the arena: the first page of each part, and the page behind the last.
#[derive(Debug, Clone, Copy)]
pub(super) struct Placement {
    /// The registry's slot.
    pub slot: usize,
    text: u64,
    rodata: u64,
    data: u64,
    record: u64,
    end: u64,
}

impl Placement {
    /// Finds space for text, read-only data and data of `sizes` bytes, and for a record.
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

    /// Guest-virtual addresses of text, read-only data and data in the alias mapping.
    pub fn mapped(&self, registry: &Registry) -> [Gva; 3] {
        [self.text, self.rodata, self.data].map(|page| registry.mapped(page))
    }

    /// Guest-physical address of the data.
    pub fn data(&self, registry: &Registry) -> Gpa {
        registry.page(self.data)
    }

    /// Space for the record, in bytes.
    pub fn record_space(&self) -> u64 {
        (self.end - self.record) * PAGE_SIZE
    }

    /// The changes that stage the patch and its record, while the guest cannot reach them. The record must
    /// [fit](Self::record_space).
    pub fn stage(&self, registry: &Registry, linked: &Linked, record: &[u8]) -> Vec<Change> {
        let mut changes = match registry.exists {
            true => registry.upgrade().into_iter().collect(),
            false => registry.creation(),
        };
        let bytes = record.len() as u64;
        let pages = Pages {
            first: self.text,
            count: self.record - self.text + pages(bytes),
        };
        let offset = (self.record - self.text) * PAGE_SIZE;
        let stored = offset..offset + bytes;
        changes.push(registry.slot_change(self.slot, State::Staging, pages, &stored, crc32fast::hash(record)));
        let placed = [
            (self.text, linked.text.as_slice()),
            (self.rodata, &linked.rodata),
            (self.data, &linked.data),
            (self.record, record),
        ];
        let placed = placed.into_iter().filter(|(_, bytes)| !bytes.is_empty());
        changes.extend(placed.map(|(page, bytes)| fill(registry, page, bytes)));
        changes.extend(self.map(registry, linked));
        changes.push(registry.state_change(self.slot, State::Staging, State::Applying));
        changes
    }

    /// The page-table entries of the alias mapping: executable text, read-only data, writable data. The bits accessed and dirty are set
    /// from the start, so that no CPU ever writes to the table.
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
                let what = format!("page-table entry of arena page {page}");
                Change::word(what, registry.table_entry(page), 0, registry.page(page).0 | bits)
            })
        });
        entries.collect()
    }
}

fn pages(bytes: u64) -> u64 {
    bytes.div_ceil(PAGE_SIZE)
}

/// The change that writes `bytes` into pages of the arena that are still filler.
fn fill(registry: &Registry, page: u64, bytes: &[u8]) -> Change {
    Change::replace(
        format!("arena page {page}"),
        registry.page(page),
        vec![FILLER; bytes.len()],
        bytes.to_vec(),
    )
}
