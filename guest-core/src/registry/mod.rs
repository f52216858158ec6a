//! Where patches live in the guest: the text cave, its alias mapping, and the registry of patches at the start of the cave.
//!
//! The guest itself keeps the registry. So it travels with a live migration and outlives any agent. It has one page; all numbers are
//! little-endian:
//!
//! | offset | size | what |
//! |---|---|---|
//! | 0 | 8 | `VMPATCH\0` |
//! | 8 | 4 | version of this layout: 5; in 4, no patch has trampolines or is in transition; in 3, no patch replaces or covers another; in 2, no record says what of a patch must stay; in 1, no patch is registered as a module of the guest |
//! | 12 | 4 | CRC-32 of bytes 16 to 64 |
//! | 16 | 8 | guest-virtual address of this page, in the kernel's text |
//! | 24 | 8 | guest-virtual address of the arena's alias mapping, 2 MiB |
//! | 32 | 8 | guest-physical address of the page-directory entry for that |
//! | 40 | 8 | pages of the arena, this one counted |
//! | 64 + 32·n | 8 | slot n: state ([`State`]), 0 where it is free |
//! | + 8 | 4, 4 | first page in the arena, and number of pages |
//! | + 16 | 4, 4 | offset of the record in these pages, and its length, in bytes |
//! | + 24 | 4 | CRC-32 of the record |
//!
//! The arena is the cave's first pages, up to 2 MiB. Page 1 of the arena is the page table of the alias mapping. Page *n* of the arena
//! is mapped at page *n* of the alias mapping, or not at all.

pub mod cave;
mod changes;
mod find;
pub mod record;

pub use cave::{Cave, FILLER};
pub use record::{Orc, PatchedFunction, Record, Redirect, Span};

use crate::addr::{Gpa, Gva};
use crate::kernel::{KernelError, Live};
use crate::paging::{PAGE_SIZE, PMD_SIZE};
use crate::unwind::{OrcTable, PatchCode};
use std::fmt;
use std::ops::Range;

const MAGIC: [u8; 8] = *b"VMPATCH\0";
/// Version of the layout. Since 2, a record may hold the patch's registration as a module; since 3, it says whether code must stay; since 4,
/// a patch may replace others, or take functions that others hold; since 5, it may be in transition.
/// A vmpatch that does not know the version must not revert the patch.
const VERSION: u32 = 5;
/// Oldest version that is understood.
const VERSION_MIN: u32 = 1;
const HEADER_BYTES: usize = 64;
const SLOT_BYTES: usize = 32;
/// Largest number of patches in a guest: as many slots fit into the page.
pub const SLOTS: usize = (PAGE_SIZE as usize - HEADER_BYTES) / SLOT_BYTES;
/// Most pages of an arena: as many as one page table maps.
const ARENA_PAGES_MAX: u64 = PMD_SIZE / PAGE_SIZE;
/// Pages that hold no patch: the registry and the page table.
const ARENA_PAGES_FIXED: u64 = 2;

/// Bits of the page-directory entry: present, writable (the table's entries decide), accessed, dirty. This is `_KERNPG_TABLE`
/// (arch/x86/include/asm/pgtable_types.h).
const DIRECTORY_ENTRY_BITS: u64 = 0x63;
/// Bits that the CPU sets by itself: accessed and dirty.
const IGNORED_BITS: u64 = crate::paging::entry::ACCESSED | crate::paging::entry::DIRTY;

/// Why the registry cannot be read, or has no space for a patch. Nothing was changed.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// Guest memory could not be read.
    #[error("reading the kernel for the registry")]
    Kernel(#[from] KernelError),
    /// The guest has a registry of a layout version that this vmpatch does not understand.
    #[error("the registry at {at} has layout version {found}; this vmpatch knows {VERSION}")]
    Version {
        /// Guest-virtual address of the registry.
        at: Gva,
        /// Its layout version.
        found: u32,
    },
    /// The registry contradicts itself: the guest, or a fault, wrote to it.
    #[error("the registry at {at} is damaged: {what}")]
    Damaged {
        /// Guest-virtual address of the registry.
        at: Gva,
        /// What was found instead of what.
        what: String,
    },
    /// The kernel's text has no cave for a registry.
    #[error("the kernel has no text cave: no run of {} KiB of int3 in its text", cave::CAVE_BYTES_MIN >> 10)]
    NoCave,
    /// The arena has no free run of pages that is long enough.
    #[error("no space: {wanted} pages wanted, the longest free run of the arena has {free}{kept}")]
    Full {
        /// Pages that the patch needs.
        wanted: u64,
        /// Pages of the longest free run.
        free: u64,
        /// Reverted patches whose code takes space.
        kept: KeptCode,
    },
    /// All slots of the registry are taken.
    #[error("the registry's {SLOTS} slots are all taken{kept}")]
    NoSlot {
        /// Reverted patches that take slots.
        kept: KeptCode,
    },
    /// The kernel uses the addresses that no known kernel uses.
    #[error("no unused 2 MiB between the kernel's modules and its fixmap to map the arena at")]
    NoAliasRange,
}

/// The names of reverted patches whose code is kept, for a message.
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

/// The state of a patch. [`State::Applied`] and [`State::Kept`] last; the others are seen while vmpatch changes the patch, and after it was
/// killed. [`Rest::of`](crate::transaction::recovery::Rest::of) says what is left to do then.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u64)]
pub enum State {
    /// It is being staged in the cave; no function is redirected.
    Staging = 1,
    /// Its commit is under way: sites may be old or new.
    Applying = 2,
    /// It is in force.
    Applied = 3,
    /// It is reverted; its pages must still be wiped.
    Reverted = 4,
    /// It is reverted; its code and variables stay registered in the guest, which may still use them.
    Kept = 5,
    /// It was kept, and is being applied again: sites may be old or new.
    Reapplying = 6,
    /// It is being reverted, and its code may have run: sites may be old or new. A vmpatch that does not know this state refuses the registry.
    Reverting = 7,
    /// Another patch has replaced it: no function leads to its code, which must still be wiped or kept.
    Replaced = 8,
    /// It is being applied in a transition: its functions lead to trampolines, and marked tasks run the old code.
    Transition = 9,
    /// It is being reverted in a transition: its functions lead to trampolines, and marked tasks run the new code.
    Unpatching = 10,
    /// Such a transition is beginning: functions may lead to the patch's code or to trampolines.
    StartUnpatching = 11,
}

impl State {
    /// True where tasks run the patch's code: all, or some in a transition.
    pub fn is_in_force(self) -> bool {
        matches!(
            self,
            Self::Applied | Self::Transition | Self::Unpatching | Self::StartUnpatching
        )
    }

    /// True where no function leads to the patch's code, and none is about to.
    pub fn is_off(self) -> bool {
        matches!(self, Self::Kept | Self::Replaced)
    }

    fn from_word(word: u64) -> Option<Self> {
        let all = [
            Self::Staging,
            Self::Applying,
            Self::Applied,
            Self::Reverted,
            Self::Kept,
            Self::Reapplying,
            Self::Reverting,
            Self::Replaced,
            Self::Transition,
            Self::Unpatching,
            Self::StartUnpatching,
        ];
        all.into_iter().find(|state| *state as u64 == word)
    }
}

/// A run of pages of the arena.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pages {
    /// Index of the first page in the arena.
    pub first: u64,
    /// Number of pages.
    pub count: u64,
}

impl Pages {
    /// Length in bytes.
    pub fn len(&self) -> u64 {
        self.count * PAGE_SIZE
    }

    /// True where the run has no page.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// True where a page belongs to both runs.
    pub fn overlaps(&self, other: &Self) -> bool {
        self.range().start < other.range().end && other.range().start < self.range().end
    }

    /// The indexes of the pages in the arena.
    pub fn range(&self) -> Range<u64> {
        self.first..self.first + self.count
    }
}

/// A slot of the registry that holds a patch.
#[derive(Debug, Clone)]
pub struct Entry {
    /// Index of the slot.
    pub slot: usize,
    /// State of the patch.
    pub state: State,
    /// The pages that hold the patch.
    pub pages: Pages,
    /// The patch's record; `None` where vmpatch was killed while it staged or wiped the patch.
    pub record: Option<Record>,
}

impl Entry {
    /// The patch's record, where the entry has one.
    pub fn record(&self) -> Option<&Record> {
        self.record.as_ref()
    }
}

/// The registry of one guest, and the arena that it hands out.
#[derive(Debug, Clone)]
pub struct Registry {
    /// Guest-virtual address of arena page 0 in the kernel's text.
    pub cave: Gva,
    /// Guest-physical address of arena page 0; the arena is contiguous.
    pub base: Gpa,
    /// Guest-virtual address of the alias mapping.
    pub alias: Gva,
    /// Guest-physical address of the page-directory entry of `alias`.
    pub directory_entry: Gpa,
    /// Number of pages of the arena.
    pub arena_pages: u64,
    /// The patches.
    pub entries: Vec<Entry>,
    /// False for a planned registry, which the guest does not have yet.
    pub exists: bool,
    /// Layout version.
    pub version: u32,
}

impl Registry {
    /// The records of all patches except those in [`State::Kept`] and [`State::Replaced`].
    pub fn records(&self) -> impl Iterator<Item = &Record> {
        let entries = self.entries.iter().filter(|entry| !entry.state.is_off());
        entries.filter_map(Entry::record)
    }

    /// The records of all patches.
    pub fn all_records(&self) -> impl Iterator<Item = &Record> {
        self.entries.iter().filter_map(Entry::record)
    }

    /// The patches in [`State::Kept`]: reverted, with their code kept.
    pub fn kept(&self) -> impl Iterator<Item = (&Entry, &Record)> {
        let entries = self.entries.iter().filter(|entry| entry.state == State::Kept);
        entries.filter_map(|entry| Some((entry, entry.record()?)))
    }

    /// The code of all patches, with its ORC tables.
    pub fn patch_code(&self) -> Vec<PatchCode> {
        let code = self.all_records().map(|record| {
            let orc = OrcTable::new(Gva(record.orc.ips), Gva(record.orc.entries), record.orc.count);
            // A table that cannot exist leaves its code out: a stack that leads through that code can then not be unwound, and is not safe.
            let text = Gva(record.text.start)..Gva(record.text.start.saturating_add(record.text.len));
            Some(PatchCode { text, orc: orc.ok()? })
        });
        code.flatten().collect()
    }

    /// Guest-physical address of a page of the arena.
    pub fn page(&self, index: u64) -> Gpa {
        self.base.wrapping_add(index * PAGE_SIZE)
    }

    /// Guest-virtual address of a page of the arena in the alias mapping.
    pub fn mapped(&self, index: u64) -> Gva {
        self.alias.wrapping_add(index * PAGE_SIZE)
    }

    /// Guest-physical address of the page-table entry of a page in the alias mapping.
    pub fn table_entry(&self, index: u64) -> Gpa {
        self.page(1).wrapping_add(8 * index)
    }

    /// Finds a free slot, and the first free run of `count` pages.
    ///
    /// # Errors
    ///
    /// [`RegistryError::NoSlot`] or [`RegistryError::Full`].
    pub fn allocate(&self, count: u64) -> Result<(usize, Pages), RegistryError> {
        let slot = (0..SLOTS).find(|slot| self.entries.iter().all(|entry| entry.slot != *slot));
        let kept = || KeptCode(self.kept().map(|(_, record)| record.id.clone()).collect());
        let slot = slot.ok_or_else(|| RegistryError::NoSlot { kept: kept() })?;
        let mut taken: Vec<_> = self.entries.iter().map(|entry| entry.pages.range()).collect();
        taken.push(self.arena_pages..u64::MAX);
        taken.sort_by_key(|range| range.start);
        let (mut first, mut longest) = (ARENA_PAGES_FIXED, 0);
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

    /// Reads guest-physical memory of the arena.
    pub(crate) fn read_arena(&self, live: &Live<'_>, gpa: Gpa, buf: &mut [u8]) -> Result<(), KernelError> {
        let what = "the arena";
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
