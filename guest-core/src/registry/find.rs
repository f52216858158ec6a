//! Finds and reads a guest's registry, or plans where a first one goes. An attacker in the guest may have written what is read here.

use super::{
    ARENA_PAGES_FIXED, ARENA_PAGES_MAX, Cave, DIRECTORY_ENTRY_BITS, Entry, FILLER, HEADER_BYTES, IGNORED_BITS, MAGIC,
    Pages, Record, Registry, RegistryError, SLOT_BYTES, SLOTS, State, VERSION, VERSION_MIN,
};
use crate::addr::{Gpa, Gva};
use crate::kernel::{KernelError, Live};
use crate::memory::VirtMemory;
use crate::paging::{PAGE_SIZE, PMD_SIZE};
use std::ops::Range;

/// An address range that no x86-64 kernel uses: from the end of that of modules (`MODULES_END`, arch/x86/include/asm/pgtable_64_types.h) to
/// the fixmap's two tables (`level2_fixmap_pgt`, arch/x86/kernel/head_64.S, entries 506 and 507; Linux 5.10 to 7.2).
///
/// Nearer to the image, `virt_addr_valid` would be true of a patch's variables (`__virt_addr_valid`, arch/x86/mm/physaddr.c): the kernel
/// takes an address in the first `KERNEL_IMAGE_SIZE` for one of its image, and computes a page from it, which is somebody else's.
/// Hardened usercopy then stops the guest where that page is one of the slab allocator's.
const UNUSED: Range<Gva> = Gva(0xffff_ffff_ff00_0000)..Gva(0xffff_ffff_ff40_0000);

impl Registry {
    /// Finds the guest's registry. For a guest without one, gives the place of a new one at the start of the largest of `caves`.
    ///
    /// # Errors
    ///
    /// The registry cannot be read, contradicts itself or has an unknown layout version, or the guest has no space for a new one.
    pub fn find(live: &Live<'_>, caves: &[Cave]) -> Result<Self, RegistryError> {
        match Self::locate(live)? {
            Some((at, page)) => Self::read(live, at, &page),
            None => Self::plan(live, caves),
        }
    }

    /// Finds the page of the kernel's text that starts with the magic bytes. The guest's kernel cannot write to its text, so a second
    /// such page is a fault or an attack.
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
        let (alias, directory_entry, arena_pages) = (Gva(word(24)), Gpa(word(32)), word(40));
        let fits = (ARENA_PAGES_FIXED..=ARENA_PAGES_MAX).contains(&arena_pages)
            && at.wrapping_add(arena_pages * PAGE_SIZE) <= live.kernel.symbol("_etext")?;
        if word(16) != at.0 || !fits || alias.0 % PMD_SIZE != 0 {
            return Err(damaged(format!(
                "it says that it lies at {:#x}, has {arena_pages} pages and is mapped at {alias}",
                word(16)
            )));
        }
        let (expected, value) = live
            .kernel
            .space
            .directory_entry(live.memory, alias)
            .map_err(|source| KernelError::Unreadable {
                what: "page directory",
                at: alias,
                source,
            })?;
        let mut registry = Self {
            cave: at,
            base,
            alias,
            directory_entry,
            arena_pages,
            entries: Vec::new(),
            exists: true,
            version,
        };
        for slot in 0..SLOTS {
            let Some(entry) = registry.entry(live, page, slot)? else {
                continue;
            };
            // Each page of the arena belongs to one patch. This check also bounds the size of all records together.
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
        // A registry without entries may have lost its alias mapping: vmpatch was killed while it removed the registry.
        let is_being_removed = value == 0 && registry.entries.is_empty();
        if expected != directory_entry || (value & !IGNORED_BITS != mapped & !IGNORED_BITS && !is_being_removed) {
            return Err(damaged(format!(
                "the page-directory entry of {alias} is {value:#x}, not {mapped:#x}"
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
        // Filler: vmpatch was killed while it removed the registry.
        if word == 0 || word == u64::from_le_bytes([FILLER; 8]) {
            return Ok(None);
        }
        let state = State::from_word(word).ok_or_else(|| damaged(format!("unknown state {word:#x}")))?;
        let pages = Pages {
            first: number(8),
            count: number(12),
        };
        if pages.first < ARENA_PAGES_FIXED || pages.range().end > self.arena_pages {
            return Err(damaged(format!(
                "pages {:?} are outside of the arena of {}",
                pages.range(),
                self.arena_pages
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
            // vmpatch was killed before it staged the record, or while it wiped it: there is nothing else left to undo.
            (Err(_), State::Staging | State::Reverted) => Ok(Some(Entry {
                slot,
                state,
                pages,
                record: None,
            })),
            (Err(error), _) => Err(error),
        }
    }

    /// Plans the place of a first registry: the start of the largest cave, with its alias mapping at the first unused 2 MiB between
    /// modules and fixmap.
    fn plan(live: &Live<'_>, caves: &[Cave]) -> Result<Self, RegistryError> {
        let cave = caves.iter().max_by_key(|cave| cave.len).ok_or(RegistryError::NoCave)?;
        let base = live.kernel.image.physical(cave.start).ok_or(RegistryError::NoCave)?;
        let arena_pages = (cave.len / PAGE_SIZE).min(ARENA_PAGES_MAX);
        let (alias, directory_entry) = unused_alias_range(live)?;
        Ok(Self {
            cave: cave.start,
            base,
            alias,
            directory_entry,
            arena_pages,
            entries: Vec::new(),
            exists: false,
            version: VERSION,
        })
    }
}

/// Finds the first 2 MiB of [`UNUSED`] whose page-directory entry is empty.
fn unused_alias_range(live: &Live<'_>) -> Result<(Gva, Gpa), RegistryError> {
    let mut at = UNUSED.start;
    while at < UNUSED.end {
        let entry = live.kernel.space.directory_entry(live.memory, at);
        let (gpa, entry) = entry.map_err(|source| KernelError::Unreadable {
            what: "page directory",
            at,
            source,
        })?;
        if entry == 0 {
            return Ok((at, gpa));
        }
        at = at.wrapping_add(PMD_SIZE);
    }
    Err(RegistryError::NoAliasRange)
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at.checked_add(4)?)?.try_into().ok()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(at..at.checked_add(8)?)?.try_into().ok()?))
}
