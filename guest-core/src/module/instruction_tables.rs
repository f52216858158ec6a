//! Tables in which the guest searches for the address of an instruction: the exception table (`__ex_table`), and the table of WARN and BUG
//! (`__bug_table`). Each row begins with a pointer to the instruction. All pointers are relative to themselves.
//!
//! Code may refer to its row of `__bug_table`: since 6.19, a WARN with a text passes the row's address (`__WARN_printf()`,
//! arch/x86/include/asm/bug.h).
//!
//! Formats: `struct exception_table_entry` (arch/x86/include/asm/extable.h; the third word is the distance of a handler up
//! to 5.15, and a number since) and `struct bug_entry` (include/asm-generic/bug.h; longer by a format since 6.19).

use super::PatchModule;
use super::layout::{AreaKind, Layout, LayoutError};
use super::link::Linker;
use super::sections::{Relocation, Section, SectionId, SectionOffset};
use super::sites::{Pointer, TableError};
use super::{LinkError, sections::SymbolPlace};
use crate::addr::Gva;
use object::elf::{R_X86_64_PC32, R_X86_64_PLT32};

/// The exception table. The loader sorts it (`sort_extable`, lib/extable.c), because the kernel searches it by bisection.
pub(crate) const FIXUPS: Form = Form {
    table: "__ex_table",
    area: AreaKind::RoData,
    is_sorted: true,
};
/// The table of WARN and BUG. The kernel writes to the row of a WARN that has warned.
pub(crate) const BUGS: Form = Form {
    table: "__bug_table",
    area: AreaKind::Data,
    is_sorted: false,
};
/// Size of the pointer that a row begins with, in bytes.
const POINTER_BYTES: u64 = 4;
/// Plausible lengths of a row, in bytes.
const ROW_BYTES_MAX: u64 = 32;

/// The kind of a table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Form {
    pub table: &'static str,
    area: AreaKind,
    is_sorted: bool,
}

/// One row of a table in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Row {
    /// Place of the instruction.
    pub site: SectionOffset,
    /// Place of the row.
    pub at: SectionOffset,
}

/// The rows of a table, before they have addresses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Rows {
    form: Form,
    pub rows: Vec<Row>,
    row_bytes: u64,
    /// Offset of the table in its area.
    offset: u64,
}

/// A table in the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Table {
    /// Guest-virtual address.
    pub at: Gva,
    /// Number of rows.
    pub count: u64,
    /// Length of a row in bytes; 0 for an empty table.
    pub row_bytes: u64,
}

impl<'d> PatchModule<'d> {
    /// Reads the rows of a table. Every row must begin with a pointer to an instruction of this module.
    pub(crate) fn rows(&self, form: Form) -> Result<Rows, TableError> {
        let mut found = Rows {
            form,
            rows: Vec::new(),
            row_bytes: 0,
            offset: 0,
        };
        for (id, section) in self.sections_named(form.table) {
            // The file does not say how long a row is, but each row starts with one pointer to code.
            let starts = section.relocations.iter().filter(|relocation| self.is_code(relocation));
            let row_bytes = match form.is_sorted {
                // In the exception table, a pointer to the fixup, which is code, too, follows.
                true => section.size.checked_div(starts.count() as u64 / 2),
                false => section.size.checked_div(starts.count() as u64),
            };
            let row_bytes = row_bytes.filter(|bytes| {
                (POINTER_BYTES..=ROW_BYTES_MAX).contains(bytes)
                    && bytes % POINTER_BYTES == 0
                    && section.size % bytes == 0
                    && (found.row_bytes == 0 || found.row_bytes == *bytes)
            });
            let row_bytes = row_bytes.ok_or_else(|| {
                let size = format!("{} bytes", section.size);
                TableError::new(section, section.size, size, "rows that begin with a pointer to code")
            })?;
            found.row_bytes = row_bytes;
            for offset in (0..section.size).step_by(usize::try_from(row_bytes).unwrap_or(1)) {
                let at = SectionOffset { section: id, offset };
                let site = self.instruction(section, offset)?;
                if form.is_sorted {
                    self.instruction(section, offset + POINTER_BYTES)?;
                }
                found.rows.push(Row { site, at });
            }
        }
        Ok(found)
    }

    /// The instruction that the pointer at `offset` means. It must be within a section of code, not at its end.
    fn instruction(&self, table: &Section<'_>, offset: u64) -> Result<SectionOffset, TableError> {
        let at = self.site(table, offset, Pointer::Relative)?;
        let code = self.section(at.section);
        if code.is_some_and(|code| code.is_executable() && at.offset < code.size) {
            return Ok(at);
        }
        Err(TableError::new(table, offset, self.place(at), "an instruction"))
    }

    /// What the addend of a distance at `at` lacks. In code, a distance counts from the end of the instruction, which is the end of the distance,
    /// because no instruction that refers to a row has an operand behind it. In data, it counts from itself.
    fn bias(&self, at: SectionOffset, relocation: &Relocation) -> i64 {
        let is_distance = [R_X86_64_PC32.0, R_X86_64_PLT32.0].contains(&relocation.kind);
        match self.section(at.section) {
            Some(section) if is_distance && section.is_executable() => 4,
            _ => 0,
        }
    }

    fn is_code(&self, relocation: &Relocation) -> bool {
        let Some(SymbolPlace::Defined(at)) = self.symbol(relocation).map(|symbol| symbol.place) else {
            return false;
        };
        self.section(at.section).is_some_and(Section::is_executable)
    }
}

impl Rows {
    /// The sections that the rows for code in `section` refer to, besides that code, with the table's own section.
    pub(crate) fn references<'a>(
        &'a self,
        module: &'a PatchModule<'_>,
        section: SectionId,
    ) -> impl Iterator<Item = (SectionId, &'a Relocation)> {
        let rows = self.rows.iter().filter(move |row| row.site.section == section);
        rows.flat_map(move |row| {
            let rest = row.at.plus(POINTER_BYTES).offset..row.at.plus(self.row_bytes).offset;
            let table = module.section(row.at.section);
            let references = table.map(|table| table.relocations_in(rest.start, rest.end));
            let id = row.at.section;
            references.unwrap_or_default().iter().map(move |one| (id, one))
        })
    }

    /// The index of the row that a relocation at `at` means; `None` if it means no row of this table.
    ///
    /// # Errors
    ///
    /// The relocation means a place in the table that is not the start of a row.
    pub(crate) fn referred(
        &self,
        module: &PatchModule<'_>,
        at: SectionOffset,
        relocation: &Relocation,
    ) -> Result<Option<usize>, TableError> {
        let Some(SymbolPlace::Defined(symbol)) = module.symbol(relocation).map(|symbol| symbol.place) else {
            return Ok(None);
        };
        let Some(table) = module.section(symbol.section) else {
            return Ok(None);
        };
        if table.name != self.form.table {
            return Ok(None);
        }
        let target = module.target(relocation, module.bias(at, relocation));
        let position = target.and_then(|target| self.rows.binary_search_by_key(&target, |row| row.at).ok());
        let refused = || {
            let found = format!("a reference from {}", module.place(at));
            TableError::new(
                table,
                target.map_or(0, |target| target.offset),
                found,
                "the start of a row",
            )
        };
        position.map(Some).ok_or_else(refused)
    }

    /// The instruction of a row.
    pub(crate) fn site(&self, position: usize) -> Option<SectionOffset> {
        self.rows.get(position).map(|row| row.site)
    }

    /// The instructions of all rows.
    pub(crate) fn sites(&self) -> impl Iterator<Item = SectionOffset> {
        self.rows.iter().map(|row| row.site)
    }

    /// Keeps the rows whose code `is_placed`, and reserves space for them.
    pub(crate) fn place(
        &self,
        layout: &mut Layout,
        is_placed: impl Fn(SectionId) -> bool,
    ) -> Result<Self, LayoutError> {
        let mut placed = self.clone();
        placed.rows.retain(|row| is_placed(row.site.section));
        if !placed.rows.is_empty() {
            let size = (placed.rows.len() as u64).saturating_mul(self.row_bytes);
            placed.offset = layout.reserve(self.form.table, self.form.area, size, POINTER_BYTES)?;
        }
        Ok(placed)
    }
}

impl Linker<'_, '_, '_> {
    /// The address that a relocation at `at` means, addend included, if it refers to a row of `__bug_table`; `None` for any other.
    pub(super) fn bug_target(&self, at: SectionOffset, relocation: &Relocation) -> Result<Option<u64>, TableError> {
        let bugs = &self.image.bugs;
        let position = bugs.referred(self.image.module, at, relocation)?;
        Ok(position.map(|position| {
            let row = (position as u64).saturating_mul(bugs.row_bytes);
            let start = self.base(bugs.form.area).wrapping_add(bugs.offset);
            let bias = self.image.module.bias(at, relocation);
            start.wrapping_add(row).wrapping_offset(-bias).0
        }))
    }

    /// Writes a table, and gives its address and size.
    pub(super) fn write_rows(&mut self, table: &Rows) -> Result<Table, LinkError> {
        let image = self.image;
        let mut rows = Vec::with_capacity(table.rows.len());
        for row in &table.rows {
            rows.push((self.address(row.site)?, row.at));
        }
        if table.form.is_sorted {
            rows.sort_by_key(|(site, _)| *site);
        }
        let start = self.base(table.form.area).wrapping_add(table.offset);
        for (index, (_, at)) in (0_u64..).zip(&rows) {
            let Some(section) = image.module.section(at.section) else {
                continue;
            };
            let (first, end) = (at.offset, at.plus(table.row_bytes).offset);
            let range = usize::try_from(first).unwrap_or(usize::MAX)..usize::try_from(end).unwrap_or(usize::MAX);
            let mut bytes = section.data.get(range).unwrap_or_default().to_vec();
            let moved = index * table.row_bytes;
            for relocation in section.relocations_in(first, end) {
                let within = relocation.offset.saturating_sub(first);
                let from = SectionOffset {
                    offset: relocation.offset,
                    ..*at
                };
                let value = self.relocated(from, relocation, start.wrapping_add(moved + within).0)?;
                let within = usize::try_from(within).unwrap_or(usize::MAX);
                match bytes.get_mut(within..within.saturating_add(value.len())) {
                    Some(slot) => slot.copy_from_slice(&value),
                    None => {
                        let expected = "a pointer within its row";
                        let found = format!("{} bytes", value.len());
                        return Err(TableError::new(section, relocation.offset, found, expected).into());
                    }
                }
            }
            self.write_area(table.form.area, table.offset + moved, &bytes);
        }
        Ok(Table {
            at: start,
            count: rows.len() as u64,
            row_bytes: table.row_bytes,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::module::Linked;
    use crate::module::testing::{ALT_6_1, BASES, KLP_6_1, TestElf, TestGuest};
    use object::elf::{R_X86_64_32S, R_X86_64_64, RelocationType, SHF_ALLOC, SHF_EXECINSTR, SHF_WRITE};

    fn link(elf: &TestElf) -> Result<Linked, String> {
        let file = elf.build();
        let module = PatchModule::parse(&file).unwrap();
        let patch = module.patch(&KLP_6_1).unwrap();
        let image = module.image(&patch, &ALT_6_1).map_err(|error| error.to_string())?;
        let linked = image.link(&BASES, &TestGuest::default().context());
        linked.map_err(|error| error.to_string())
    }

    /// A module of 16 bytes of code, and a table of that many bytes.
    fn with_table(name: &'static str, flags: u64, bytes: &[u8]) -> (TestElf, u16) {
        let mut elf = TestElf::livepatch(&[0x90; 16]);
        let table = elf.section(name, SHF_ALLOC.0 | flags, bytes);
        (elf, table)
    }

    fn distance(bytes: &[u8], base: Gva, at: u64) -> u64 {
        let start = usize::try_from(at).unwrap();
        let distance = i32::from_le_bytes(bytes[start..start + 4].try_into().unwrap());
        base.wrapping_add(at).wrapping_offset(distance.into()).0
    }

    #[test]
    fn fixups_of_placed_code_are_sorted_and_keep_their_types() {
        let rows = [[0; 8], [0; 8], [0; 8]]
            .map(|row| [&row[..], &[0; 4]].concat())
            .concat();
        let (mut elf, table) = with_table("__ex_table", 0, &rows);
        // The rows are out of order, and one is for code of exit, which is not placed.
        let exit = elf.section(".exit.text", SHF_ALLOC.0 | SHF_EXECINSTR.0, &[0xc3; 4]);
        let exit = elf.section_symbol(exit);
        for (row, (section, from, to)) in (0..).zip([(1, 9, 12), (exit, 0, 2), (1, 3, 14)]) {
            elf.relocation(table, 12 * row, R_X86_64_PC32, section, from);
            elf.relocation(table, 12 * row + 4, R_X86_64_PC32, section, to);
            elf.patch_bytes(table, usize::try_from(12 * row + 8).unwrap(), &[3 + row as u8, 0, 0, 0]);
        }
        let linked = link(&elf).unwrap();
        let Table { at, count, row_bytes } = linked.fixups;
        assert_eq!((at, count, row_bytes), (BASES.rodata, 2, 12));
        let code = |offset| BASES.text.0 + offset;
        let target = |offset| distance(&linked.rodata, BASES.rodata, offset);
        assert_eq!([target(0), target(12)], [code(3), code(9)]);
        assert_eq!([target(4), target(16)], [code(14), code(12)]);
        assert_eq!((linked.rodata[8], linked.rodata[20]), (5, 3));
    }

    #[test]
    fn bugs_lie_in_data_that_the_guest_may_write_and_bring_their_files_name() {
        let (mut elf, table) = with_table("__bug_table", SHF_WRITE.0, &[0; 12]);
        elf.relocation(table, 0, R_X86_64_PC32, 1, 7);
        elf.relocation(table, 4, R_X86_64_PC32, 2, 0);
        elf.patch_bytes(table, 8, &[42, 0, 1, 0]);
        let linked = link(&elf).unwrap();
        assert_eq!((linked.bugs.at, linked.bugs.count), (BASES.data, 1));
        assert_eq!(linked.rodata, b"old_f\0");
        assert_eq!(distance(&linked.data, BASES.data, 0), BASES.text.0 + 7);
        assert_eq!(distance(&linked.data, BASES.data, 4), BASES.rodata.0);
        assert_eq!(linked.data[8..12], [42, 0, 1, 0]);
    }

    /// Two rows of 16 bytes, for init code and for placed code, which refers to the place at `offset` of the table.
    fn with_reference(kind: RelocationType, offset: i64) -> TestElf {
        let mut elf = TestElf::livepatch(&[0; 16]);
        let table = elf.section("__bug_table", SHF_ALLOC.0 | SHF_WRITE.0, &[0; 32]);
        elf.relocation(table, 0, R_X86_64_PC32, 4, 0);
        elf.relocation(table, 16, R_X86_64_PC32, 1, 7);
        let rows = elf.symbol("", 3, table, 0, 0);
        elf.relocation(1, 3, kind, rows, offset);
        elf
    }

    #[test]
    fn code_that_refers_to_its_own_row_gets_the_rows_place_in_the_guest() {
        let linked = link(&with_reference(R_X86_64_PC32, 16 - 4)).unwrap();
        assert_eq!((linked.bugs.count, linked.bugs.row_bytes), (1, 16));
        let field = i32::from_le_bytes(linked.text[3..7].try_into().unwrap());
        assert_eq!(BASES.text.wrapping_add(7).wrapping_offset(field.into()), linked.bugs.at);
        let linked = link(&with_reference(R_X86_64_32S, 16)).unwrap();
        let field = i32::from_le_bytes(linked.text[3..7].try_into().unwrap());
        assert_eq!(i64::from(field), linked.bugs.at.0.cast_signed());
    }

    #[test]
    fn data_that_refers_to_a_row_gets_its_place_too() {
        for (kind, bytes) in [(R_X86_64_PC32, 4), (R_X86_64_64, 8)] {
            let mut elf = with_reference(R_X86_64_PC32, 16 - 4);
            let data = elf.section(".data.rows", SHF_ALLOC.0 | SHF_WRITE.0, &[0; 8]);
            let [data_symbol, rows] = [data, data - 1].map(|section| elf.section_symbol(section));
            elf.relocation(data, 0, kind, rows, 16);
            elf.relocation(1, 8, R_X86_64_32S, data_symbol, 0);
            let linked = link(&elf).unwrap();
            let at = linked.data.len() - 24;
            let found = &linked.data[at..at + bytes];
            let meant = match bytes {
                4 => distance(&linked.data, BASES.data, at as u64),
                _ => u64::from_le_bytes(found.try_into().unwrap()),
            };
            assert_eq!(Gva(meant), linked.bugs.at, "{bytes}");
        }
    }

    #[test]
    fn a_reference_to_no_rows_start_is_refused() {
        for offset in [11, 13, 16, 28, 1 << 40] {
            let refused = link(&with_reference(R_X86_64_PC32, offset)).unwrap_err();
            assert!(refused.contains("the start of a row"), "{offset}: {refused}");
        }
    }

    #[test]
    fn a_reference_to_the_row_of_code_that_is_not_placed_is_refused() {
        let refused = link(&with_reference(R_X86_64_PC32, -4)).unwrap_err();
        assert!(refused.contains(".init.text"), "{refused}");
    }

    #[test]
    fn a_table_whose_rows_are_no_rows_is_refused() {
        // No pointer at all; one pointer too few; a length that no row has.
        for (len, sites) in [(12, &[][..]), (24, &[0]), (12 * 40, &[0]), (13, &[0]), (24, &[0, 8])] {
            let (mut elf, table) = with_table("__bug_table", SHF_WRITE.0, &vec![0; len]);
            for at in sites {
                elf.relocation(table, *at, R_X86_64_PC32, 1, 7);
            }
            let refused = link(&elf);
            // One pointer in 24 bytes may be one long row.
            assert!(refused.is_err() || (len, sites) == (24, &[0][..]), "{len} {sites:?}");
        }
    }

    #[test]
    fn a_pointer_past_the_code_or_of_another_kind_is_refused() {
        let refused = |kind, symbol, to| {
            let (mut elf, table) = with_table("__ex_table", 0, &[0; 12]);
            elf.relocation(table, 0, R_X86_64_PC32, 1, 3);
            elf.relocation(table, 4, kind, symbol, to);
            link(&elf).unwrap_err()
        };
        assert!(refused(R_X86_64_PC32, 1, 16).contains("found .text+0x10, expected an instruction"));
        assert!(refused(R_X86_64_PC32, 1, 17).contains("expected a pointer"));
        assert!(refused(R_X86_64_64, 1, 4).contains("expected a pointer"));
        assert!(refused(R_X86_64_PC32, 2, 0).contains("rows that begin with a pointer"));
    }
}
