//! The ORC tables of the new functions, which are placed with them in the guest.
//!
//! As in a loaded module, there is a table of 4-byte distances, each from itself to the code from which an entry applies, and a table of the entries. Both are
//! in the order of the code (arch/x86/kernel/unwind_orc.c, `unwind_module_init`).

use super::LinkError;
use super::PatchModule;
use super::layout::{AreaKind, Layout, LayoutError};
use super::link::Linker;
use super::sections::{SectionId, SectionOffset};
use super::sites::{Pointer, TableError};
use crate::addr::Gva;

const IPS: &str = ".orc_unwind_ip";
const ENTRIES: &str = ".orc_unwind";
/// Plausible lengths of an entry in bytes: 6 in all releases up to 7.x (arch/x86/include/asm/orc_types.h).
const ENTRY_BYTES_MAX: u64 = 16;

/// The rows for placed code, before it has addresses.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct OrcRows<'d> {
    rows: Vec<(SectionOffset, &'d [u8])>,
    entry_size: u64,
    /// True where there is space for the row of trampolines.
    has_trampolines: bool,
    /// Offsets of the two tables in the read-only area.
    ips: u64,
    entries: u64,
}

/// The ORC tables of linked code.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct OrcTables {
    /// Guest-virtual address of the table of distances, 4 bytes each.
    pub ips: Gva,
    /// Guest-virtual address of the table of entries.
    pub entries: Gva,
    /// Length of an entry, in bytes.
    pub entry_size: u64,
    /// The rows in order: from this address on, this entry applies (the bytes of a `struct orc_entry`).
    pub rows: Vec<(Gva, Vec<u8>)>,
}

impl<'d> PatchModule<'d> {
    /// The rows whose code `is_placed`.
    pub(crate) fn orc_rows(&self, is_placed: impl Fn(SectionId) -> bool) -> Result<OrcRows<'d>, TableError> {
        let sites = self.sites(IPS, Pointer::Relative)?;
        let Some((_, table)) = self.section_named(ENTRIES).filter(|_| !sites.is_empty()) else {
            return Ok(OrcRows::default());
        };
        let expected = "one entry for each of .orc_unwind_ip";
        let wrong = |found: String| TableError::new(table, table.size, found, expected);
        let count = sites.len() as u64;
        let entry_size = table.size / count;
        if table.size % count != 0
            || !(1..=ENTRY_BYTES_MAX).contains(&entry_size)
            || table.data.len() as u64 != table.size
        {
            return Err(wrong(format!("{} bytes for {count} entries", table.size)));
        }
        let chunk = usize::try_from(entry_size).unwrap_or(1);
        let rows = sites.into_iter().zip(table.data.chunks_exact(chunk));
        let rows = rows.filter(|(at, _)| is_placed(at.section)).collect();
        Ok(OrcRows {
            rows,
            entry_size,
            ..OrcRows::default()
        })
    }
}

impl OrcRows<'_> {
    /// Adds a row for trampolines, which comes with the link.
    pub(crate) fn reserve_row(&mut self, has_trampolines: bool) {
        self.has_trampolines = has_trampolines;
    }

    /// Reserves space for the tables.
    pub(crate) fn place(&mut self, layout: &mut Layout) -> Result<(), LayoutError> {
        let count = self.rows.len() as u64 + u64::from(self.has_trampolines);
        if !self.rows.is_empty() {
            self.ips = layout.reserve(IPS, AreaKind::RoData, count.saturating_mul(4), 4)?;
            self.entries = layout.reserve(ENTRIES, AreaKind::RoData, count.saturating_mul(self.entry_size), 2)?;
        }
        Ok(())
    }
}

impl<'d> Linker<'_, 'd, '_> {
    /// The entry of trampolines: that of the first instruction of a new function, which may begin in the padding in front of it. `None` where
    /// no row covers that.
    fn trampoline_row(&self) -> Option<(u64, bool, &'d [u8])> {
        let image = self.image;
        let mut functions = image.patch.objects.iter().flat_map(|object| &object.functions);
        let first = functions.next()?.new;
        let before = image.orc.rows.iter();
        let before = before.filter(|(at, _)| at.section == first.section && at.offset <= first.offset);
        let (_, entry) = before.max_by_key(|(at, _)| at.offset)?;
        let start = self.base(AreaKind::Text).wrapping_add(image.trampolines?);
        Some((start.0, true, *entry))
    }

    /// Writes the tables, and gives their rows.
    pub(super) fn write_orc(&mut self) -> Result<OrcTables, LinkError> {
        let image = self.image;
        let mut rows = Vec::with_capacity(image.orc.rows.len());
        for (at, entry) in &image.orc.rows {
            // The last row of a section ends it, and may have the same address as the first row of the next section. The later row must take precedence.
            let ends = image
                .module
                .section(at.section)
                .is_some_and(|section| section.size == at.offset);
            rows.push((self.address(*at)?, !ends, *entry));
        }
        rows.extend(self.trampoline_row());
        rows.sort_by_key(|(address, begins, _)| (*address, *begins));
        let base = self.base(AreaKind::RoData);
        let (ips, entries) = (base.wrapping_add(image.orc.ips), base.wrapping_add(image.orc.entries));
        for (index, (address, _, entry)) in (0_u64..).zip(&rows) {
            let place = ips.wrapping_add(index * 4);
            let distance = i32::try_from(address.wrapping_sub(place.0).cast_signed());
            let distance = distance.map_err(|_| LinkError::Overflow {
                at: format!("{IPS}+{:#x}", index * 4),
                place: place.0,
                kind: "an ORC distance",
                symbol: "the code".into(),
                target: *address,
            })?;
            self.write_area(AreaKind::RoData, image.orc.ips + index * 4, &distance.to_le_bytes());
            self.write_area(
                AreaKind::RoData,
                image.orc.entries + index * image.orc.entry_size,
                entry,
            );
        }
        let rows = rows
            .into_iter()
            .map(|(address, _, entry)| (Gva(address), entry.to_vec()))
            .collect();
        Ok(OrcTables {
            ips,
            entries,
            entry_size: image.orc.entry_size,
            rows,
        })
    }
}

#[cfg(test)]
mod tests {
    use crate::addr::Gva;
    use crate::module::PatchModule;
    use crate::module::testing::{ALT_6_1, BASES, KLP_6_1, TestElf, TestGuest};
    use object::elf::{R_X86_64_PC32, R_X86_64_PLT32, SHF_ALLOC, SHF_EXECINSTR};

    #[test]
    fn rows_of_placed_code_are_sorted_and_written_as_the_kernel_keeps_them() {
        // jmp .text.unlikely; the two sections lie side by side.
        let mut elf = TestElf::livepatch(&[0xe9, 0, 0, 0, 0]);
        let cold = elf.section(".text.unlikely", SHF_ALLOC.0 | SHF_EXECINSTR.0, &[0xc3]);
        let cold = elf.section_symbol(cold);
        elf.relocation(1, 1, R_X86_64_PLT32, cold, -4);
        let ips = elf.section(".orc_unwind_ip", SHF_ALLOC.0, &[0; 20]);
        // Out of order: cold's begin, text's end (the same address), text's begin, init's, cold's end.
        for (offset, (symbol, addend)) in [(cold, 0), (1, 5), (1, 0), (4, 0), (cold, 1)].into_iter().enumerate() {
            elf.relocation(ips, offset as u64 * 4, R_X86_64_PC32, symbol, addend);
        }
        let entries: Vec<u8> = (0..5).flat_map(|entry| [entry; 6]).collect();
        elf.section(".orc_unwind", SHF_ALLOC.0, &entries);
        let file = elf.build();
        let module = PatchModule::parse(&file).unwrap();
        let patch = module.patch(&KLP_6_1).unwrap();
        let image = module.image(&patch, &ALT_6_1).unwrap();
        let linked = image.link(&BASES, &TestGuest::default().context()).unwrap();
        let text = BASES.text;
        let rows: Vec<_> = linked
            .orc
            .rows
            .iter()
            .map(|(at, entry)| (at.0 - text.0, entry[0]))
            .collect();
        assert_eq!(rows, [(0, 2), (5, 1), (5, 0), (6, 4)]);
        assert_eq!(
            (linked.orc.ips, linked.orc.entries),
            (BASES.rodata, BASES.rodata.wrapping_add(16))
        );
        let distance = i32::from_le_bytes(linked.rodata[4..8].try_into().unwrap());
        assert_eq!(
            linked.orc.ips.wrapping_add(4).wrapping_offset(distance.into()),
            Gva(text.0 + 5)
        );
        assert_eq!(linked.rodata[16..], [[2; 6], [1; 6], [0; 6], [4; 6]].concat());
    }

    #[test]
    fn tables_that_do_not_match_are_refused() {
        let mut elf = TestElf::livepatch(&[0xc3]);
        let ips = elf.section(".orc_unwind_ip", SHF_ALLOC.0, &[0; 8]);
        elf.relocation(ips, 0, R_X86_64_PC32, 1, 0);
        elf.relocation(ips, 4, R_X86_64_PC32, 1, 1);
        elf.section(".orc_unwind", SHF_ALLOC.0, &[0; 13]);
        let file = elf.build();
        let module = PatchModule::parse(&file).unwrap();
        let patch = module.patch(&KLP_6_1).unwrap();
        let error = module.image(&patch, &ALT_6_1).unwrap_err();
        assert!(error.to_string().contains("13 bytes for 2 entries"), "{error}");
    }
}
