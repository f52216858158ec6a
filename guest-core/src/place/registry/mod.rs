//! The registry: what vmpatch has done to this guest, kept in the guest itself, at the start of the cave.
//!
//! It travels with a live migration and outlives any agent. One page, all numbers little-endian:
//!
//! | offset | size | what |
//! |---|---|---|
//! | 0 | 8 | `VMPATCH\0` |
//! | 8 | 4 | version of this layout: 3; 2 where no record says what of a patch must stay; 1 where no patch is known to the guest as a module |
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

mod changes;
mod find;

use super::record::Record;
use crate::addr::{Gpa, Gva};
use crate::kernel::{KernelError, Live};
use crate::paging::{PAGE_SIZE, PMD_SIZE};
use crate::unwind::{OrcTable, PatchCode};
use std::fmt;
use std::ops::Range;

const MAGIC: [u8; 8] = *b"VMPATCH\0";
/// Since 2, a record may say how the guest knows the patch, and since 3, that its code must stay. A vmpatch that does not know
/// the version must not revert the patch.
const VERSION: u32 = 3;
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

/// Present, writable (the table's own entries decide), accessed, dirty: `_KERNPG_TABLE`.
const DIRECTORY_ENTRY_BITS: u64 = 0x63;
/// The CPU sets accessed and dirty by itself.
const IGNORED_BITS: u64 = crate::paging::entry::ACCESSED | crate::paging::entry::DIRTY;

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
    #[error("no room: {wanted} pages wanted, the longest free run of the pool has {free}{kept}")]
    Full {
        /// Pages wanted.
        wanted: u64,
        /// Longest free run.
        free: u64,
        /// Reverted patches that take room.
        kept: KeptCode,
    },
    /// Every slot is taken.
    #[error("the registry's {SLOTS} slots are all taken{kept}")]
    NoSlot {
        /// Reverted patches that take slots.
        kept: KeptCode,
    },
    /// The kernel window has no unused 2 MiB.
    #[error("no unused 2 MiB behind the kernel image to map the pool at")]
    NoWindow,
}

/// Reverted patches whose code is kept, by name, for a message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeptCode(pub Vec<String>);

impl fmt::Display for KeptCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.as_slice() {
            [] => Ok(()),
            names => write!(
                f,
                "; until the guest reboots, the code of {} reverted patches is kept: {}",
                names.len(),
                names.join(", ")
            ),
        }
    }
}

/// How far a patch has come. [`State::Applied`] is in force, [`State::Kept`] was; the others are seen where vmpatch was killed.
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
    /// Out of force; its code and variables stay, and the guest knows them, as it may still use them.
    Kept = 5,
    /// The same, being brought into force again: sites may be old or new. To be undone.
    Reapplying = 6,
}

impl State {
    fn from_word(word: u64) -> Option<Self> {
        let all = [
            Self::Placing,
            Self::Applying,
            Self::Applied,
            Self::Reverted,
            Self::Kept,
            Self::Reapplying,
        ];
        all.into_iter().find(|state| *state as u64 == word)
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
    /// The records of all patches but those that were reverted and whose code is kept.
    pub fn records(&self) -> impl Iterator<Item = &Record> {
        let entries = self.entries.iter().filter(|entry| entry.state != State::Kept);
        entries.filter_map(Entry::record)
    }

    /// The records of all patches that the guest holds code of.
    pub fn all_records(&self) -> impl Iterator<Item = &Record> {
        self.entries.iter().filter_map(Entry::record)
    }

    /// The patches that were reverted and whose code is kept.
    pub fn kept(&self) -> impl Iterator<Item = (&Entry, &Record)> {
        let entries = self.entries.iter().filter(|entry| entry.state == State::Kept);
        entries.filter_map(|entry| Some((entry, entry.record()?)))
    }

    /// The code of all patches, with their ORC tables.
    pub fn laid_code(&self) -> Vec<PatchCode> {
        let code = self.all_records().map(|record| {
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
        let kept = || KeptCode(self.kept().map(|(_, record)| record.id.clone()).collect());
        let slot = slot.ok_or_else(|| RegistryError::NoSlot { kept: kept() })?;
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
            kept: kept(),
        })
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

    fn slot(&self, slot: usize) -> Gpa {
        self.base.wrapping_add((HEADER_BYTES + SLOT_BYTES * slot) as u64)
    }
}
