//! Finding a guest's registry and reading it, or planning where a first one goes. What is read may have been written by anybody.

use super::{
    DIRECTORY_ENTRY_BITS, Entry, HEADER_BYTES, IGNORED_BITS, MAGIC, POOL_PAGES_FIXED, POOL_PAGES_MAX, Pages, Registry,
    RegistryError, SLOT_BYTES, SLOTS, State, VERSION, VERSION_MIN,
};
use crate::addr::{Gpa, Gva};
use crate::kernel::image::WINDOW;
use crate::kernel::{KernelError, Live};
use crate::memory::VirtMemory;
use crate::paging::{PAGE_SIZE, PMD_SIZE};
use crate::place::Record;
use crate::place::cave::{Cave, FILLER};

impl Registry {
    /// The guest's registry; where it has none, a new one planned for the largest cave.
    pub fn find(live: &Live<'_>, caves: &[Cave]) -> Result<Self, RegistryError> {
        match Self::locate(live)? {
            Some((at, page)) => Self::read(live, at, &page),
            None => Self::plan(live, caves),
        }
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
