//! The registry: what vmpatch has done to this guest, kept in the guest itself, at the start of the cave.
//!
//! It travels with a live migration and outlives any agent. One page, all numbers little-endian:
//!
//! | offset | size | what |
//! |---|---|---|
//! | 0 | 8 | `VMPATCH\0` |
//! | 8 | 4 | version of this layout: 2; 1 where no patch is known to the guest as a module |
//! | 12 | 4 | CRC-32 of bytes 16 to 64 |
//! | 16 | 8 | guest-virtual address of this page, in the kernel's text |
//! | 24 | 8 | guest-virtual address of the 2 MiB that the pool is mapped at |
//! | 32 | 8 | guest-physical address of the page-directory entry for that |
//! | 40 | 8 | pages in the pool, this one counted |
//! | 64 + 32·n | 8 | slot n: state ([`State`]), 0 where it is free |
//! | + 8 | 4, 4 | first page in the pool, and pages |
//! | + 16 | 4, 4 | offset of the record in these pages, and its bytes |
//! | + 24 | 4 | CRC-32 of the record |
//!
//! Page 1 of the pool is the page table for the mapping; pool page *n* is mapped, where it is, at page *n* of it.

use super::cave::{Cave, FILLER};
use super::record::Record;
use crate::addr::{Gpa, Gva};
use crate::change::Change;
use crate::kernel::image::WINDOW;
use crate::kernel::{KernelError, Live};
use crate::memory::VirtMemory;
use crate::paging::{PAGE_SIZE, PMD_SIZE};
use crate::unwind::{OrcTable, PatchCode};
use std::ops::Range;

const MAGIC: [u8; 8] = *b"VMPATCH\0";
/// Since 2, a record may say how the guest knows the patch: whoever does not read that must not take the patch out.
const VERSION: u32 = 2;
/// The oldest that is understood.
const VERSION_MIN: u32 = 1;
const HEADER_BYTES: usize = 64;
const SLOT_BYTES: usize = 32;
/// Patches that a guest can hold at one time: what fits the page.
pub const SLOTS: usize = (PAGE_SIZE as usize - HEADER_BYTES) / SLOT_BYTES;
/// Pages that one page table maps.
const POOL_PAGES_MAX: u64 = PMD_SIZE / PAGE_SIZE;
/// Registry and page table.
const POOL_PAGES_FIXED: u64 = 2;

/// Why the registry could not be read. Nothing was changed.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// Guest memory could not be read.
    #[error("reading the kernel for the registry")]
    Kernel(#[from] KernelError),
    /// There is a registry that this version does not understand.
    #[error("the registry at {at} has layout version {found}; this vmpatch knows {VERSION}")]
    Version {
        /// Where it is.
        at: Gva,
        /// Its version.
        found: u32,
    },
    /// Its contents contradict themselves: the guest, or a fault, wrote to it.
    #[error("the registry at {at} is damaged: {what}")]
    Damaged {
        /// Where it is.
        at: Gva,
        /// What was found instead of what.
        what: String,
    },
    /// No memory for it.
    #[error("the kernel has no text cave: no run of {} KiB of int3 in its text", super::cave::CAVE_BYTES_MIN >> 10)]
    NoCave,
    /// No room left.
    #[error("no room: {wanted} pages wanted, the longest free run of the pool has {free}")]
    Full {
        /// Pages wanted.
        wanted: u64,
        /// Longest free run.
        free: u64,
    },
    /// Every slot is taken.
    #[error("the registry's {SLOTS} slots are all taken")]
    NoSlot,
    /// The kernel window has no unused 2 MiB.
    #[error("no unused 2 MiB behind the kernel image to map the pool at")]
    NoWindow,
}

/// How far a patch has come. Only [`State::Applied`] is in force; the others are seen where vmpatch was killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u64)]
pub enum State {
    /// Being laid into the cave; no function is redirected. To be wiped.
    Placing = 1,
    /// Being committed: sites may be old or new. To be undone.
    Applying = 2,
    /// In force.
    Applied = 3,
    /// Out of force; its pages are still to be wiped.
    Reverted = 4,
}

impl State {
    fn from_word(word: u64) -> Option<Self> {
        [Self::Placing, Self::Applying, Self::Applied, Self::Reverted]
            .into_iter()
            .find(|state| *state as u64 == word)
    }
}

/// A run of pages of the pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pages {
    /// Index of the first page in the pool.
    pub first: u64,
    /// Number of pages.
    pub count: u64,
}

impl Pages {
    /// Bytes.
    pub fn len(&self) -> u64 {
        self.count * PAGE_SIZE
    }

    /// True where there is no page.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// True where a page belongs to both.
    pub fn overlaps(&self, other: &Self) -> bool {
        self.range().start < other.range().end && other.range().start < self.range().end
    }

    /// Page indexes.
    pub fn range(&self) -> Range<u64> {
        self.first..self.first + self.count
    }
}

/// One patch as the registry holds it.
#[derive(Debug, Clone)]
pub struct Entry {
    /// Index of its slot.
    pub slot: usize,
    /// How far it has come.
    pub state: State,
    /// Its pages.
    pub pages: Pages,
    /// What it consists of; where vmpatch was killed while laying it, there may be none yet.
    pub record: Option<Record>,
}

impl Entry {
    /// Its record, where it has one.
    pub fn record(&self) -> Option<&Record> {
        self.record.as_ref()
    }
}

/// The registry of one guest, and the pool of pages that it rules.
#[derive(Debug, Clone)]
pub struct Registry {
    /// Guest-virtual address of pool page 0 in the kernel's text.
    pub cave: Gva,
    /// Guest-physical address of pool page 0; the pool is contiguous.
    pub base: Gpa,
    /// Guest-virtual address that the pool is mapped at.
    pub window: Gva,
    /// Guest-physical address of the page-directory entry of `window`.
    pub directory_entry: Gpa,
    /// Pages in the pool.
    pub pool_pages: u64,
    /// What it holds.
    pub entries: Vec<Entry>,
    /// False where the guest has none yet, and this is where it would be.
    pub exists: bool,
    /// The version of its layout.
    pub version: u32,
}

impl Registry {
    /// The guest's registry; where it has none, a new one planned for the largest cave.
    pub fn find(live: &Live<'_>, caves: &[Cave]) -> Result<Self, RegistryError> {
        match Self::locate(live)? {
            Some((at, page)) => Self::read(live, at, &page),
            None => Self::plan(live, caves),
        }
    }

    /// The records of all patches.
    pub fn records(&self) -> impl Iterator<Item = &Record> {
        self.entries.iter().filter_map(Entry::record)
    }

    /// The code of all patches, with their ORC tables.
    pub fn laid_code(&self) -> Vec<PatchCode> {
        let code = self.records().map(|record| {
            let orc = OrcTable::new(Gva(record.orc.ips), Gva(record.orc.entries), record.orc.count);
            // Code whose table can't be is code that no stack can be unwound through: not safe, where one leads through it.
            let text = Gva(record.text.start)..Gva(record.text.start.saturating_add(record.text.len));
            Some(PatchCode { text, orc: orc.ok()? })
        });
        code.flatten().collect()
    }

    /// Guest-physical address of a page of the pool.
    pub fn page(&self, index: u64) -> Gpa {
        self.base.wrapping_add(index * PAGE_SIZE)
    }

    /// Guest-virtual address that a page of the pool is mapped at.
    pub fn mapped(&self, index: u64) -> Gva {
        self.window.wrapping_add(index * PAGE_SIZE)
    }

    /// Guest-physical address of the page-table entry for a page of the pool.
    pub fn table_entry(&self, index: u64) -> Gpa {
        self.page(1).wrapping_add(8 * index)
    }

    /// Finds room: a free slot, and the first run of `count` free pages.
    pub fn allocate(&self, count: u64) -> Result<(usize, Pages), RegistryError> {
        let slot = (0..SLOTS).find(|slot| self.entries.iter().all(|entry| entry.slot != *slot));
        let slot = slot.ok_or(RegistryError::NoSlot)?;
        let mut taken: Vec<_> = self.entries.iter().map(|entry| entry.pages.range()).collect();
        taken.push(self.pool_pages..u64::MAX);
        taken.sort_by_key(|range| range.start);
        let (mut first, mut longest) = (POOL_PAGES_FIXED, 0);
        for range in taken {
            let free = range.start.saturating_sub(first);
            if free >= count {
                return Ok((slot, Pages { first, count }));
            }
            longest = longest.max(free);
            first = first.max(range.end);
        }
        Err(RegistryError::Full {
            wanted: count,
            free: longest,
        })
    }

    /// The changes that lay an empty registry and map its window, in the order in which to make them.
    pub fn creation(&self) -> Vec<Change> {
        let filler = |len| vec![FILLER; len];
        let page = PAGE_SIZE as usize;
        let entry = self.page(1).0 | DIRECTORY_ENTRY_BITS;
        let slots = self.base.wrapping_add(HEADER_BYTES as u64);
        vec![
            Change::replace("registry slots", slots, filler(page), vec![0; page - HEADER_BYTES]),
            Change::replace("registry header", self.base, filler(page), self.header(VERSION)),
            Change::replace("page table of the window", self.page(1), filler(page), vec![0; page]),
            Change::word("page-directory entry of the window", self.directory_entry, 0, entry),
        ]
    }

    /// The changes that take away a registry without entries, in the order in which to make them: the header goes last,
    /// so that up to then the next vmpatch finds it and goes on. `changed` are changes that will have been made before.
    pub fn removal(&self, live: &Live<'_>, changed: &[Change]) -> Result<Vec<Change>, KernelError> {
        let word = |gpa| {
            let mut bytes = [0; 8];
            self.read_pool(live, gpa, &mut bytes)
                .map(|()| u64::from_le_bytes(bytes))
        };
        let wipe = |what, gpa, len: usize| {
            let mut old = vec![0; len];
            self.read_pool(live, gpa, &mut old)?;
            changed.iter().for_each(|change| change.overlay(gpa, &mut old));
            Ok::<_, KernelError>(Change::replace(what, gpa, old, vec![FILLER; len]))
        };
        let mut changes = Vec::new();
        let entry = word(self.directory_entry)?;
        if entry != 0 {
            changes.push(Change::word(
                "page-directory entry of the window",
                self.directory_entry,
                entry,
                0,
            ));
        }
        let page = PAGE_SIZE as usize;
        changes.push(wipe("page table of the window", self.page(1), page)?);
        let slots = self.base.wrapping_add(HEADER_BYTES as u64);
        changes.push(wipe("registry slots", slots, page - HEADER_BYTES)?);
        changes.push(wipe("registry header", self.base, HEADER_BYTES)?);
        Ok(changes)
    }

    /// Reads guest-physical memory of the pool.
    pub(crate) fn read_pool(&self, live: &Live<'_>, gpa: Gpa, buf: &mut [u8]) -> Result<(), KernelError> {
        let what = "the pool";
        live.memory.read(gpa, buf).map_err(|source| KernelError::Unreadable {
            what,
            at: self.cave,
            source,
        })
    }

    /// The change of one slot's state.
    pub fn state_change(&self, slot: usize, from: State, to: State) -> Change {
        Change::word(format!("state of slot {slot}"), self.slot(slot), from as u64, to as u64)
    }

    /// The change that fills a free slot.
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
            // Pages and record lie within the pool's 2 MiB.
            field.copy_from_slice(&(word as u32).to_le_bytes());
        }
        Change::replace(format!("slot {slot}"), self.slot(slot), vec![0; SLOT_BYTES], bytes)
    }

    /// The change that empties a slot, whatever it holds.
    pub fn clear_slot(&self, live: &Live<'_>, slot: usize) -> Result<Change, KernelError> {
        let mut old = vec![0; SLOT_BYTES];
        self.read_pool(live, self.slot(slot), &mut old)?;
        Ok(Change::replace(
            format!("slot {slot}"),
            self.slot(slot),
            old,
            vec![0; SLOT_BYTES],
        ))
    }

    fn slot(&self, slot: usize) -> Gpa {
        self.base.wrapping_add((HEADER_BYTES + SLOT_BYTES * slot) as u64)
    }

    /// The change that brings the header of an older registry to the version of what is going to be kept in it.
    pub fn renewal(&self) -> Option<Change> {
        let headers = (self.header(self.version), self.header(VERSION));
        (self.exists && self.version != VERSION)
            .then(|| Change::replace("registry header", self.base, headers.0, headers.1))
    }

    fn header(&self, version: u32) -> Vec<u8> {
        let mut page = vec![0; HEADER_BYTES];
        page[..8].copy_from_slice(&MAGIC);
        page[8..12].copy_from_slice(&version.to_le_bytes());
        let words = [self.cave.0, self.window.0, self.directory_entry.0, self.pool_pages];
        for (field, word) in page[16..48].chunks_exact_mut(8).zip(words) {
            field.copy_from_slice(&word.to_le_bytes());
        }
        let crc = crc32fast::hash(&page[16..HEADER_BYTES]);
        page[12..16].copy_from_slice(&crc.to_le_bytes());
        page
    }

    /// The page in the kernel's text that starts with the magic. Text is read-only to the guest's kernel, so a second
    /// one is a fault or a trick.
    fn locate(live: &Live<'_>) -> Result<Option<(Gva, Vec<u8>)>, RegistryError> {
        let (start, end) = (live.kernel.symbol("_stext")?, live.kernel.symbol("_etext")?);
        let mut found = None;
        let mut at = start.align_down(PAGE_SIZE);
        while at < end {
            let mut magic = [0; 8];
            let unreadable = |source| KernelError::Unreadable {
                what: "kernel text",
                at,
                source,
            };
            live.read(at, &mut magic).map_err(unreadable)?;
            if magic == MAGIC {
                if let Some((first, _)) = &found {
                    let what = format!("there is another one at {first}");
                    return Err(RegistryError::Damaged { at, what });
                }
                let mut page = vec![0; PAGE_SIZE as usize];
                live.read(at, &mut page).map_err(unreadable)?;
                found = Some((at, page));
            }
            at = at.wrapping_add(PAGE_SIZE);
        }
        Ok(found)
    }

    fn read(live: &Live<'_>, at: Gva, page: &[u8]) -> Result<Self, RegistryError> {
        let damaged = |what: String| RegistryError::Damaged { at, what };
        let word = |offset| u64_at(page, offset).unwrap_or(0);
        let version = u32_at(page, 8).unwrap_or(0);
        if !(VERSION_MIN..=VERSION).contains(&version) {
            return Err(RegistryError::Version { at, found: version });
        }
        let crc = page.get(16..HEADER_BYTES).map(crc32fast::hash);
        if crc != u32_at(page, 12) {
            return Err(damaged("its checksum does not fit its header".to_owned()));
        }
        let base = live
            .kernel
            .image
            .physical(at)
            .ok_or_else(|| damaged("it is not in the image".to_owned()))?;
        let (window, directory_entry, pool_pages) = (Gva(word(24)), Gpa(word(32)), word(40));
        let fits = (POOL_PAGES_FIXED..=POOL_PAGES_MAX).contains(&pool_pages)
            && at.wrapping_add(pool_pages * PAGE_SIZE) <= live.kernel.symbol("_etext")?;
        if word(16) != at.0 || !fits || window.0 % PMD_SIZE != 0 {
            return Err(damaged(format!(
                "it says that it lies at {:#x}, has {pool_pages} pages and is mapped at {window}",
                word(16)
            )));
        }
        let (expected, value) = live
            .kernel
            .space
            .directory_entry(live.memory, window)
            .map_err(|source| KernelError::Unreadable {
                what: "page directory",
                at: window,
                source,
            })?;
        let mut registry = Self {
            cave: at,
            base,
            window,
            directory_entry,
            pool_pages,
            entries: Vec::new(),
            exists: true,
            version,
        };
        for slot in 0..SLOTS {
            let Some(entry) = registry.entry(live, page, slot)? else {
                continue;
            };
            // Each byte of the pool belongs to one patch; this also bounds what all records together can hold.
            if let Some(other) = registry.entries.iter().find(|other| other.pages.overlaps(&entry.pages)) {
                let (pages, taken) = (entry.pages.range(), other.pages.range());
                return Err(damaged(format!(
                    "slot {slot} has pages {pages:?}, slot {} has {taken:?}",
                    other.slot
                )));
            }
            registry.entries.push(entry);
        }
        let mapped = registry.page(1).0 | DIRECTORY_ENTRY_BITS;
        // Without an entry the window may be gone already: vmpatch was killed while it took the registry away.
        let taken_away = value == 0 && registry.entries.is_empty();
        if expected != directory_entry || (value & !IGNORED_BITS != mapped & !IGNORED_BITS && !taken_away) {
            return Err(damaged(format!(
                "the page-directory entry of {window} is {value:#x}, not {mapped:#x}"
            )));
        }
        Ok(registry)
    }

    fn entry(&self, live: &Live<'_>, page: &[u8], slot: usize) -> Result<Option<Entry>, RegistryError> {
        let at = HEADER_BYTES + SLOT_BYTES * slot;
        let damaged = |what: String| RegistryError::Damaged {
            at: self.cave,
            what: format!("slot {slot}: {what}"),
        };
        let number = |offset| u64::from(u32_at(page, at + offset).unwrap_or(0));
        let word = u64_at(page, at).unwrap_or(0);
        // Filler: vmpatch was killed while it took the registry away.
        if word == 0 || word == u64::from_le_bytes([FILLER; 8]) {
            return Ok(None);
        }
        let state = State::from_word(word).ok_or_else(|| damaged(format!("unknown state {word:#x}")))?;
        let pages = Pages {
            first: number(8),
            count: number(12),
        };
        if pages.first < POOL_PAGES_FIXED || pages.range().end > self.pool_pages {
            return Err(damaged(format!(
                "pages {:?} are outside of the pool of {}",
                pages.range(),
                self.pool_pages
            )));
        }
        let (offset, len) = (number(16), number(20));
        if offset + len > pages.len() {
            return Err(damaged(format!(
                "a record of {len} bytes at {offset} in {} bytes",
                pages.len()
            )));
        }
        let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
        live.memory
            .read(self.page(pages.first).wrapping_add(offset), &mut bytes)
            .map_err(|source| KernelError::Unreadable {
                what: "patch record",
                at: self.cave,
                source,
            })?;
        let record = if crc32fast::hash(&bytes) == u32_at(page, at + 24).unwrap_or(0) {
            Record::from_bytes(&bytes).map_err(|error| damaged(error.to_string()))
        } else {
            Err(damaged("the checksum does not fit the record".to_owned()))
        };
        match (record, state) {
            (Ok(record), _) => Ok(Some(Entry {
                slot,
                state,
                pages,
                record: Some(record),
            })),
            // Killed before the record was laid, or while it was wiped: there is nothing else left to undo.
            (Err(_), State::Placing | State::Reverted) => Ok(Some(Entry {
                slot,
                state,
                pages,
                record: None,
            })),
            (Err(error), _) => Err(error),
        }
    }

    /// Where a first registry goes: the start of the largest cave, mapped at the first unused 2 MiB behind the image.
    fn plan(live: &Live<'_>, caves: &[Cave]) -> Result<Self, RegistryError> {
        let cave = caves.iter().max_by_key(|cave| cave.len).ok_or(RegistryError::NoCave)?;
        let base = live.kernel.image.physical(cave.start).ok_or(RegistryError::NoCave)?;
        let pool_pages = (cave.len / PAGE_SIZE).min(POOL_PAGES_MAX);
        let (window, directory_entry) = unused_window(live)?;
        Ok(Self {
            cave: cave.start,
            base,
            window,
            directory_entry,
            pool_pages,
            entries: Vec::new(),
            exists: false,
            version: VERSION,
        })
    }
}

/// Present, writable (the table's own entries decide), accessed, dirty: `_KERNPG_TABLE`.
const DIRECTORY_ENTRY_BITS: u64 = 0x63;
/// The CPU sets accessed and dirty by itself.
const IGNORED_BITS: u64 = crate::paging::entry::ACCESSED | crate::paging::entry::DIRTY;

/// The first 2 MiB behind the image, one more left free between them, whose page-directory entry is empty.
fn unused_window(live: &Live<'_>) -> Result<(Gva, Gpa), RegistryError> {
    let image = &live.kernel.image;
    let end = live.kernel.symbol("_end")?.max(image.end());
    let mut at = Gva(end.0.saturating_add(2 * PMD_SIZE - 1)).align_down(PMD_SIZE);
    while at < WINDOW.end {
        let (gpa, entry) =
            live.kernel
                .space
                .directory_entry(live.memory, at)
                .map_err(|source| KernelError::Unreadable {
                    what: "page directory",
                    at,
                    source,
                })?;
        if entry == 0 {
            return Ok((at, gpa));
        }
        at = at.wrapping_add(PMD_SIZE);
    }
    Err(RegistryError::NoWindow)
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at.checked_add(4)?)?.try_into().ok()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(at..at.checked_add(8)?)?.try_into().ok()?))
}
