//! A guest's memory as QEMU saves it, and a kernel's parts in it. Nothing here is shared with vmpatch: what it changed is seen
//! by other eyes.

use std::collections::BTreeMap;
use std::ops::Range;
use std::{fs, io};

use images::guest::Guest;
use serde_json::{Value, json};

use crate::monitor::Monitor;
use crate::report::address;

const PAGE: u64 = 4096;
/// Where the kernel's own addresses begin: image, modules, fixmap (Documentation/arch/x86/x86_64/mm.rst).
const KERNEL_WINDOW: u64 = 0xffff_ffff_8000_0000;
/// Bits of a page-table entry that the processor sets by itself: accessed, dirty.
const SET_BY_CPU: u64 = 0x60;
const PRESENT: u64 = 1;
const LARGE: u64 = 1 << 7;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// All RAM of a guest with less than 2 GiB, which begins at address 0 and has no hole.
pub struct Ram {
    bytes: Vec<u8>,
}

impl Ram {
    /// Saves the guest's memory; it may run meanwhile.
    pub fn save(guest: &Guest, monitor: &mut Monitor) -> io::Result<Self> {
        let path = guest.folder().join("ram");
        let size = u64::from(guest.config().memory_mib) << 20;
        let arguments = json!({ "val": 0, "size": size, "filename": path.display().to_string() });
        monitor.call("pmemsave", arguments).map_err(io::Error::other)?;
        let bytes = fs::read(&path)?;
        fs::remove_file(&path)?;
        Ok(Self { bytes })
    }

    /// The first pages that differ, at most `most` of them.
    pub fn pages_unlike(&self, other: &Self, most: usize) -> Vec<String> {
        let pages = self
            .bytes
            .chunks(PAGE as usize)
            .zip(other.bytes.chunks(PAGE as usize))
            .zip(0_u64..);
        let unlike = pages.filter(|((ours, theirs), _)| ours != theirs);
        unlike
            .map(|(_, page)| format!("{:#x}", page * PAGE))
            .take(most)
            .collect()
    }

    fn slice(&self, at: u64, len: u64) -> &[u8] {
        let index = |address: u64| usize::try_from(address).expect("a 64-bit host");
        self.bytes
            .get(index(at)..index(at + len))
            .unwrap_or_else(|| panic!("{at:#x}+{len:#x} is no RAM"))
    }

    fn word(&self, at: u64) -> u64 {
        u64::from_le_bytes(self.slice(at, 8).try_into().expect("eight bytes"))
    }
}

/// Where a guest's kernel is: what `vmpatch inspect` found, checked against what the guest itself says.
pub struct KernelPlace {
    root: u64,
    levels: u64,
    symbols: BTreeMap<String, u64>,
}

/// The kernel's own names for the places that are compared (include/asm-generic/vmlinux.lds.h, kernel/trace/ftrace.c).
const SYMBOLS: [&str; 5] = [
    "_text",
    "_etext",
    "__start_rodata",
    "__end_rodata",
    "ftrace_pages_start",
];

impl KernelPlace {
    /// Of the kernel that runs in the guest.
    ///
    /// # Panics
    ///
    /// If vmpatch and the guest do not agree where the kernel is.
    pub fn of(guest: &Guest, inspection: &Value) -> Self {
        let pattern = format!(" ({})$", SYMBOLS.join("|"));
        let listed = guest
            .text(&["grep", "-E", &pattern, "/proc/kallsyms"])
            .expect("the guest lists its symbols");
        let symbols = listed.lines().filter_map(symbol).collect();
        let root = address(inspection, "/page_table_root");
        let levels = inspection
            .pointer("/page_table_levels")
            .and_then(Value::as_u64)
            .expect("a number of levels");
        let place = Self { root, levels, symbols };
        assert_eq!(
            place.symbol("_text"),
            address(inspection, "/image/start"),
            "{inspection}"
        );
        place
    }

    /// The address of one of [`SYMBOLS`].
    fn symbol(&self, name: &str) -> u64 {
        *self
            .symbols
            .get(name)
            .unwrap_or_else(|| panic!("the guest has no symbol {name}"))
    }

    /// Text and read-only data, which a kernel changes only to patch itself.
    pub fn image(&self, ram: &Ram) -> Vec<u8> {
        let text = self.symbol("_text")..self.symbol("_etext");
        let rodata = self.symbol("__start_rodata")..self.symbol("__end_rodata");
        [text, rodata]
            .into_iter()
            .flat_map(|range| self.read(ram, range))
            .collect()
    }

    /// The page tables of the kernel's own addresses: each page's address, and its entries without what the processor sets.
    pub fn page_tables(&self, ram: &Ram) -> BTreeMap<u64, Vec<u64>> {
        let mut tables = BTreeMap::new();
        let mut level = self.levels;
        let mut pages = vec![self.root];
        while level > 0 {
            // Above the level whose entries map a gigabyte each, only the last entry leads to them.
            let (first, keep) = match level {
                4.. => (511, false),
                3 => (entry_index(KERNEL_WINDOW, 3), true),
                _ => (0, true),
            };
            let mut below = Vec::new();
            for page in pages {
                let entries: Vec<u64> = (first..512).map(|index| ram.word(page + index * 8)).collect();
                let is_table = |entry: &&u64| **entry & PRESENT != 0 && (level > 3 || **entry & LARGE == 0);
                below.extend(entries.iter().filter(is_table).map(|entry| entry & ADDRESS));
                if keep {
                    tables.insert(page, entries.iter().map(|entry| entry & !SET_BY_CPU).collect());
                }
            }
            pages = below;
            level -= 1;
        }
        tables
    }

    /// All `struct dyn_ftrace`, 16 bytes each (include/linux/ftrace.h), group by group.
    pub fn ftrace_records(&self, ram: &Ram) -> Vec<u8> {
        let pointer = |at| u64::from_le_bytes(self.read(ram, at..at + 8).try_into().expect("eight bytes"));
        let mut records = Vec::new();
        // struct ftrace_page: next, records, index, order (kernel/trace/ftrace.c).
        let mut group = pointer(self.symbol("ftrace_pages_start"));
        while group != 0 {
            let (first, count) = (pointer(group + 8), pointer(group + 16) & u64::from(u32::MAX));
            records.extend(self.read(ram, first..first + count * 16));
            group = pointer(group);
        }
        records
    }

    /// The bytes at guest-virtual addresses of the kernel.
    pub fn read(&self, ram: &Ram, range: Range<u64>) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut at = range.start;
        while at < range.end {
            let len = (PAGE - at % PAGE).min(range.end - at);
            bytes.extend_from_slice(ram.slice(self.translate(ram, at), len));
            at += len;
        }
        bytes
    }

    fn translate(&self, ram: &Ram, address: u64) -> u64 {
        let mut table = self.root;
        for level in (1..=self.levels).rev() {
            let entry = ram.word(table + entry_index(address, level) * 8);
            assert!(entry & PRESENT != 0, "{address:#x} is not mapped at level {level}");
            let covered = PAGE << (9 * (level - 1));
            if level == 1 || (level < 4 && entry & LARGE != 0) {
                return (entry & ADDRESS & !(covered - 1)) + address % covered;
            }
            table = entry & ADDRESS;
        }
        unreachable!("level 1 always ends the walk")
    }
}

fn entry_index(address: u64, level: u64) -> u64 {
    address >> (12 + 9 * (level - 1)) & 511
}

/// A line of /proc/kallsyms: address, type, name.
fn symbol(line: &str) -> Option<(String, u64)> {
    let mut words = line.split(' ');
    let address = u64::from_str_radix(words.next()?, 16).ok()?;
    Some((words.nth(1)?.to_owned(), address))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_cut_into_nine_bits_for_each_level() {
        assert_eq!(
            [4, 3, 2, 1].map(|level| entry_index(0xffff_ffff_8120_3456, level)),
            [511, 510, 9, 3]
        );
    }

    #[test]
    fn a_line_of_kallsyms_is_an_address_a_type_and_a_name() {
        assert_eq!(
            symbol("ffffffff81000000 T _text"),
            Some(("_text".to_owned(), 0xffff_ffff_8100_0000))
        );
    }

    #[test]
    fn pages_that_differ_are_named_by_address() {
        let mut changed = vec![0; 3 * 4096];
        changed[4096] = 1;
        let (before, after) = (
            Ram {
                bytes: vec![0; 3 * 4096],
            },
            Ram { bytes: changed },
        );
        assert_eq!(before.pages_unlike(&after, 9), ["0x1000"]);
    }
}
