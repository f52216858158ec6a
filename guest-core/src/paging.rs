//! x86-64 page tables of the guest: 4 and 5 levels, read from guest-physical memory.
//!
//! Format: Intel SDM volume 3A, chapter 4 ("Paging"), table 4-15 onwards.

use crate::addr::{Gpa, Gva};
use crate::memory::{MemoryError, PhysMemory, VirtMemory};
use std::ops::Range;

/// Bytes of a small page.
pub const PAGE_SIZE: u64 = 4096;
/// Bytes that one page-directory entry covers: a large page, or one page table.
pub const PMD_SIZE: u64 = 2 << 20;
/// CR4.LA57: the guest uses five levels.
const CR4_LA57: u64 = 1 << 12;
/// The physical address bits of an entry; the architecture ends at bit 51.
const ADDRESS_MASK: u64 = 0x000f_ffff_ffff_f000;

/// Bits of a page-table entry that vmpatch reads or sets.
pub mod entry {
    /// The entry is in force.
    pub const PRESENT: u64 = 1;
    /// Writes are allowed.
    pub const WRITABLE: u64 = 1 << 1;
    /// The CPU has used the entry.
    pub const ACCESSED: u64 = 1 << 5;
    /// The CPU has written through the entry.
    pub const DIRTY: u64 = 1 << 6;
    /// In a directory entry: it maps a large page and names no table.
    pub const LARGE: u64 = 1 << 7;
    /// Instruction fetch is forbidden.
    pub const NO_EXECUTE: u64 = 1 << 63;
    /// The bits that say where an entry leads.
    pub const TARGET: u64 = super::ADDRESS_MASK | PRESENT | LARGE;
}

/// Where a virtual address leads, and what the guest may do there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Translation {
    /// The guest-physical address of the byte asked for.
    pub gpa: Gpa,
    /// Bytes of the page that maps it: 4 KiB, 2 MiB or 1 GiB.
    pub page_size: u64,
    /// Every level allows writing.
    pub writable: bool,
    /// Every level allows instruction fetch.
    pub executable: bool,
}

/// Takes a last-level table: the first address that it maps, and where its pages lie.
pub type SmallTableVisitor<'a> = dyn FnMut(Gva, &[Option<Gpa>]) + 'a;

/// One guest page table: its root and depth.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AddressSpace {
    /// Guest-physical address of the top-level table.
    pub root: Gpa,
    /// 4 or 5.
    pub levels: u8,
}

impl AddressSpace {
    /// The address space that CR3 and CR4 of a vCPU name; CR3's control bits are dropped.
    pub fn from_control_registers(cr3: u64, cr4: u64) -> Self {
        let levels = if cr4 & CR4_LA57 != 0 { 5 } else { 4 };
        Self {
            root: Gpa(cr3 & ADDRESS_MASK),
            levels,
        }
    }

    /// Walks the tables for `at`. At most five reads. Errors: [`MemoryError::NotMapped`] with the entry that
    /// ended the walk; [`MemoryError::NotRam`] where a table lies outside of RAM.
    pub fn translate(&self, memory: &dyn PhysMemory, at: Gva) -> Result<Translation, MemoryError> {
        self.translate_seeing(memory, at, &mut |_, _| ())
    }

    /// The same, and shows `seen` the guest-physical address and the value of each entry on the way.
    pub fn translate_seeing(
        &self,
        memory: &dyn PhysMemory,
        at: Gva,
        seen: &mut dyn FnMut(Gpa, u64),
    ) -> Result<Translation, MemoryError> {
        let (mut table, mut rights) = (self.root, Rights::ALL);
        for level in (2..=self.levels).rev() {
            let (gpa, entry) = read_entry(memory, table, at, level)?;
            seen(gpa, entry);
            let large = entry & entry::LARGE != 0;
            if entry & entry::PRESENT == 0 || (large && level > 3) {
                return Err(MemoryError::NotMapped { at, level, entry });
            }
            rights = rights.and(entry);
            if large {
                return Ok(rights.page(entry, level, at));
            }
            table = Gpa(entry & ADDRESS_MASK);
        }
        let (gpa, entry) = read_entry(memory, table, at, 1)?;
        seen(gpa, entry);
        match entry & entry::PRESENT {
            0 => Err(MemoryError::NotMapped { at, level: 1, entry }),
            _ => Ok(rights.and(entry).page(entry, 1, at)),
        }
    }

    /// Visits every page mapped in the 1 GiB at `at`, a multiple of that, in ascending order. Each table is read once: at
    /// most 517 reads of 4 KiB and less. What lies in tables outside of RAM is not mapped. Errors:
    /// [`MemoryError::Host`].
    pub fn visit_gib(
        &self,
        memory: &dyn PhysMemory,
        at: Gva,
        visit: &mut dyn FnMut(Gva, Translation),
    ) -> Result<(), MemoryError> {
        let (mut table, mut rights) = (self.root, Rights::ALL);
        for level in (3..=self.levels).rev() {
            let Some((_, entry)) = in_ram(read_entry(memory, table, at, level))? else {
                return Ok(());
            };
            if entry & entry::PRESENT == 0 || (level > 3 && entry & entry::LARGE != 0) {
                return Ok(());
            }
            rights = rights.and(entry);
            if entry & entry::LARGE != 0 {
                visit(at, rights.page(entry, level, at));
                return Ok(());
            }
            table = Gpa(entry & ADDRESS_MASK);
        }
        let mut at = at;
        for entry in read_table(memory, table)? {
            let rights = rights.and(entry);
            if entry & entry::PRESENT != 0 && entry & entry::LARGE != 0 {
                visit(at, rights.page(entry, 2, at));
            } else if entry & entry::PRESENT != 0 {
                let mut at = at;
                for entry in read_table(memory, Gpa(entry & ADDRESS_MASK))? {
                    if entry & entry::PRESENT != 0 {
                        visit(at, rights.and(entry).page(entry, 1, at));
                    }
                    at = at.wrapping_add(PAGE_SIZE);
                }
            }
            at = at.wrapping_add(PMD_SIZE);
        }
        Ok(())
    }

    /// Visits the last-level tables for `range`, of which each maps 2 MiB in small pages: gives the first address that a
    /// table maps, and where its 512 pages lie, none for one that is not mapped. Tables outside of RAM map nothing. Gives
    /// false where more than `tables_max` would have to be read, of all levels. Errors: [`MemoryError::Host`].
    pub fn visit_small_tables(
        &self,
        memory: &dyn PhysMemory,
        range: &Range<Gva>,
        tables_max: usize,
        visit: &mut SmallTableVisitor<'_>,
    ) -> Result<bool, MemoryError> {
        // all of the range has the same bits above those that the tables translate
        let top = Gva(range.start.0 & !((1 << (level_shift(self.levels) + 9)) - 1));
        let mut tables = vec![(top, self.root)];
        let mut left = tables_max;
        for level in (1..=self.levels).rev() {
            let span = 1 << level_shift(level);
            let mut next = Vec::new();
            for (start, table) in tables {
                let Some(fewer) = left.checked_sub(1) else {
                    return Ok(false);
                };
                left = fewer;
                let entries = read_table(memory, table)?;
                if level == 1 {
                    let page = |entry: &u64| (entry & entry::PRESENT != 0).then_some(Gpa(entry & ADDRESS_MASK));
                    visit(start, &entries.iter().map(page).collect::<Vec<_>>());
                    continue;
                }
                let mut at = start;
                for entry in entries {
                    let is_in = at < range.end && at.wrapping_add(span - 1) >= range.start;
                    if is_in && entry & entry::PRESENT != 0 && entry & entry::LARGE == 0 {
                        next.push((at, Gpa(entry & ADDRESS_MASK)));
                    }
                    at = at.wrapping_add(span);
                }
                // what is left over would not be read anyway
                next.truncate(left + 1);
            }
            tables = next;
        }
        Ok(true)
    }

    /// The guest-physical address and value of the level-2 (page directory) entry for `at`.
    /// Errors as [`AddressSpace::translate`]; the entry itself need not be present.
    pub fn directory_entry(&self, memory: &dyn PhysMemory, at: Gva) -> Result<(Gpa, u64), MemoryError> {
        let mut table = self.root;
        for level in (3..=self.levels).rev() {
            let (_, entry) = read_entry(memory, table, at, level)?;
            if entry & entry::PRESENT == 0 || entry & entry::LARGE != 0 {
                return Err(MemoryError::NotMapped { at, level, entry });
            }
            table = Gpa(entry & ADDRESS_MASK);
        }
        read_entry(memory, table, at, 2)
    }
}

/// A guest-physical memory seen through one address space.
#[derive(Clone, Copy)]
pub struct MappedMemory<'a> {
    /// What the tables and pages are read from.
    pub memory: &'a dyn PhysMemory,
    /// The tables.
    pub space: AddressSpace,
}

impl VirtMemory for MappedMemory<'_> {
    fn read(&self, at: Gva, buf: &mut [u8]) -> Result<(), MemoryError> {
        let mut at = at;
        let mut rest = buf;
        while !rest.is_empty() {
            let there = self.space.translate(self.memory, at)?;
            let in_page = there.page_size - (at.0 & (there.page_size - 1));
            let len = rest.len().min(usize::try_from(in_page).unwrap_or(usize::MAX));
            let (now, later) = rest.split_at_mut(len);
            self.memory.read(there.gpa, now)?;
            at = at.wrapping_add(len as u64);
            rest = later;
        }
        Ok(())
    }
}

/// What all levels of a walk so far allow.
#[derive(Clone, Copy)]
struct Rights {
    writable: bool,
    executable: bool,
}

impl Rights {
    const ALL: Self = Self {
        writable: true,
        executable: true,
    };

    fn and(self, entry: u64) -> Self {
        Self {
            writable: self.writable && entry & entry::WRITABLE != 0,
            executable: self.executable && entry & entry::NO_EXECUTE == 0,
        }
    }

    /// The translation of `at` through the last entry of a walk.
    fn page(self, entry: u64, level: u8, at: Gva) -> Translation {
        let page_size = 1_u64 << level_shift(level);
        let base = entry & ADDRESS_MASK & !(page_size - 1);
        Translation {
            gpa: Gpa(base | (at.0 & (page_size - 1))),
            page_size,
            writable: self.writable,
            executable: self.executable,
        }
    }
}

/// The entries of a whole table; none of one that is not in RAM.
fn read_table(memory: &dyn PhysMemory, table: Gpa) -> Result<Vec<u64>, MemoryError> {
    let mut bytes = [0; PAGE_SIZE as usize];
    let found = in_ram(memory.read(table, &mut bytes))?.is_some();
    let words = bytes.as_chunks::<8>().0.iter().map(|word| u64::from_le_bytes(*word));
    Ok(if found { words.collect() } else { Vec::new() })
}

fn in_ram<T>(result: Result<T, MemoryError>) -> Result<Option<T>, MemoryError> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(MemoryError::NotRam { .. }) => Ok(None),
        Err(error) => Err(error),
    }
}

/// The shift of the page that an entry of `level` (1 to 5) covers.
fn level_shift(level: u8) -> u32 {
    12 + 9 * (u32::from(level) - 1)
}

fn read_entry(memory: &dyn PhysMemory, table: Gpa, at: Gva, level: u8) -> Result<(Gpa, u64), MemoryError> {
    let index = (at.0 >> level_shift(level)) & 0x1ff;
    let gpa = table.wrapping_add(index * 8);
    let mut bytes = [0; 8];
    memory.read(gpa, &mut bytes)?;
    Ok((gpa, u64::from_le_bytes(bytes)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Ram;

    /// Tables at 0x1000 (top), 0x2000, 0x3000, 0x4000 that map 0xffff_ffff_8000_0000 upwards.
    fn kernel_window() -> (Ram, AddressSpace) {
        let ram = Ram::new(0x10000);
        ram.put_u64(0x1000 + 511 * 8, 0x2000 | 0x63);
        ram.put_u64(0x2000 + 510 * 8, 0x3000 | 0x63);
        ram.put_u64(0x3000, 0x0040_0000 | 0xe1); // 2 MiB, read-only, executable
        ram.put_u64(0x3000 + 8, 0x4000 | 0x63);
        ram.put_u64(0x4000 + 3 * 8, 0x9000 | 0x63 | entry::NO_EXECUTE);
        (
            ram,
            AddressSpace {
                root: Gpa(0x1000),
                levels: 4,
            },
        )
    }

    #[test]
    fn a_large_page_keeps_the_offset_within_it() {
        let (ram, space) = kernel_window();
        let there = space.translate(&ram, Gva(0xffff_ffff_8001_2345)).unwrap();
        assert_eq!(
            there,
            Translation {
                gpa: Gpa(0x0041_2345),
                page_size: PMD_SIZE,
                writable: false,
                executable: true
            }
        );
    }

    #[test]
    fn a_small_page_carries_the_permissions_of_its_entry() {
        let (ram, space) = kernel_window();
        let there = space.translate(&ram, Gva(0xffff_ffff_8020_3010)).unwrap();
        assert_eq!(
            there,
            Translation {
                gpa: Gpa(0x9010),
                page_size: 4096,
                writable: true,
                executable: false
            }
        );
    }

    #[test]
    fn an_absent_entry_is_named_with_its_level() {
        let (ram, space) = kernel_window();
        let error = space.translate(&ram, Gva(0xffff_ffff_8020_4000)).unwrap_err();
        assert_eq!(
            error,
            MemoryError::NotMapped {
                at: Gva(0xffff_ffff_8020_4000),
                level: 1,
                entry: 0
            }
        );
    }

    #[test]
    fn a_table_outside_of_ram_is_an_error() {
        let (ram, space) = kernel_window();
        ram.put_u64(0x3000 + 16, 0x7f00_0000_0000 | 0x63);
        let error = space.translate(&ram, Gva(0xffff_ffff_8040_0000)).unwrap_err();
        assert!(matches!(error, MemoryError::NotRam { .. }));
    }

    #[test]
    fn a_table_that_names_itself_ends_after_the_levels() {
        let ram = Ram::new(0x4000);
        for index in 0..512 {
            ram.put_u64(0x1000 + index * 8, 0x1000 | 0x63);
        }
        let space = AddressSpace {
            root: Gpa(0x1000),
            levels: 5,
        };
        assert_eq!(space.translate(&ram, Gva(0x1234)).unwrap().gpa, Gpa(0x1234));
    }

    #[test]
    fn reads_cross_pages() {
        let (ram, space) = kernel_window();
        ram.put_u64(0x4000 + 4 * 8, 0x6000 | 0x63);
        ram.put_u64(0x9ff8, 0x1111_1111_1111_1111);
        ram.put_u64(0x6000, 0x2222_2222_2222_2222);
        let mut bytes = [0; 16];
        MappedMemory { memory: &ram, space }
            .read(Gva(0xffff_ffff_8020_3ff8), &mut bytes)
            .unwrap();
        assert_eq!(bytes, [[0x11; 8], [0x22; 8]].concat()[..]);
    }
}
