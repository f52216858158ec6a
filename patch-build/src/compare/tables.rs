//! Tables that say something of places in the code, each entry of one place: what the compiler, inline assembly and objtool
//! leave for the kernel's loader.
//!
//! Sources: include/linux/{jump_label,static_call_types,instruction_pointer}.h, arch/x86/include/asm/{bug,extable,alternative,
//! orc_types,paravirt}.h, tools/objtool/check.c; read in 5.10, 6.1, 6.12 and 7.2.

use object::elf::R_X86_64_NONE;

use crate::elf::{At, Object, Section};

/// A kind of table.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Table {
    /// Its section; one that ends in `_` stands for all that begin with it.
    pub name: &'static str,
    /// How long an entry may be, in bytes; the kernel's release decides.
    strides: &'static [u64],
    /// Bytes of code at the place that the running kernel may change; see [`Site`].
    pub site: Site,
}

impl Table {
    pub(crate) fn is(&self, section: &str) -> bool {
        self.name == section || (self.name.ends_with('_') && section.starts_with(self.name))
    }
}

/// What of the code at a place that a table lists differs between the file and the running kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Site {
    /// Nothing.
    Fixed,
    /// So many bytes.
    Bytes(u64),
    /// The whole instruction there.
    Instruction,
    /// As many bytes as the byte at this offset of the entry says; the stride tells which offset.
    Counted(&'static [(u64, u64)]),
}

/// All that are known. Those of one length have one stride; where there are several, that one counts by which every entry
/// begins with a place in the code.
#[rustfmt::skip]
pub(crate) const TABLES: &[Table] = &[
    Table { name: "__bug_table",         strides: &[12, 16],     site: Site::Fixed },
    Table { name: "__ex_table",          strides: &[12],         site: Site::Fixed },
    Table { name: ".altinstructions",    strides: &[12, 13, 14], site: Site::Counted(&[(12, 10), (13, 10), (14, 12)]) },
    Table { name: ".parainstructions",   strides: &[16],         site: Site::Counted(&[(16, 9)]) },
    Table { name: "__jump_table",        strides: &[16],         site: Site::Instruction },
    Table { name: ".static_call_sites",  strides: &[8],          site: Site::Bytes(5) },
    Table { name: ".return_sites",       strides: &[4],          site: Site::Bytes(5) },
    Table { name: ".retpoline_sites",    strides: &[4],          site: Site::Instruction },
    Table { name: ".call_sites",         strides: &[4],          site: Site::Bytes(5) },
    Table { name: ".ibt_endbr_seal",     strides: &[4],          site: Site::Bytes(4) },
    Table { name: ".smp_locks",          strides: &[4],          site: Site::Bytes(1) },
    Table { name: "__mcount_loc",        strides: &[8],          site: Site::Bytes(5) },
    Table { name: "__patchable_function_entries", strides: &[8], site: Site::Bytes(5) },
    Table { name: ".orc_unwind_ip",      strides: &[4],          site: Site::Fixed },
    Table { name: "_kprobe_blacklist",   strides: &[8],          site: Site::Fixed },
    // Constants that the kernel writes into its code at boot; one section for each (asm/runtime-const.h, since 6.11).
    Table { name: "runtime_ptr_",        strides: &[4],          site: Site::Bytes(8) },
    Table { name: "runtime_shift_",      strides: &[4],          site: Site::Bytes(1) },
];

/// The table that goes with `.orc_unwind_ip`, entry by entry: how to unwind at that place.
pub(crate) const ORC: &str = ".orc_unwind";
const ORC_IP: &str = ".orc_unwind_ip";

/// An entry of a table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    /// Which table; an index of [`TABLES`].
    pub table: usize,
    /// The section, and where in it the entry starts.
    pub at: At,
    /// Its bytes.
    pub len: u64,
    /// The place in the code that it is about.
    pub place: At,
    /// For `.orc_unwind_ip`: the row that goes with it.
    pub row: Option<Vec<u8>>,
    /// The entry stands for the start of a function, where the file has none: objtool leaves out a row that is as the one in front of it
    /// in the section (tools/objtool/orc_gen.c of 6.1), which is of another function. `at` is that one's.
    pub is_inherited: bool,
}

impl Entry {
    pub(crate) fn table(&self) -> &'static Table {
        // Entries are only made with indexes of TABLES.
        &TABLES[self.table]
    }

    /// Bytes of the entry that say a line of the source file, from its start.
    pub(crate) fn line(&self) -> Option<std::ops::Range<u64>> {
        (self.table().name == "__bug_table").then(|| self.len - 4..self.len - 2)
    }
}

/// A table whose entries could not be told apart.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the table {section} is not understood: {what}")]
pub struct TableError {
    /// The section.
    pub section: String,
    /// What does not fit.
    pub what: String,
}

/// All entries of all tables, in the file's order.
pub(crate) fn entries(object: &Object) -> Result<Vec<Entry>, TableError> {
    let mut entries = Vec::new();
    for (index, section) in object.sections.iter().enumerate() {
        let Some(table) = TABLES.iter().position(|table| table.is(&section.name)) else {
            continue;
        };
        if section.size == 0 {
            continue;
        }
        let found = TABLES[table]
            .strides
            .iter()
            .find_map(|stride| split(object, index, section, table, *stride));
        let mut found = found.ok_or_else(|| TableError {
            section: section.name.clone(),
            what: format!(
                "{} bytes that are not entries of a place in the code each",
                section.size
            ),
        })?;
        if section.name == ORC_IP {
            add_rows(object, section, &mut found)?;
        }
        entries.extend(found);
    }
    Ok(entries)
}

/// The entries, where each of that length begins with a relocation to code. The last may be shorter than the rest, as
/// `.parainstructions` is aligned before each entry only.
fn split(object: &Object, index: usize, section: &Section, table: usize, stride: u64) -> Option<Vec<Entry>> {
    let mut entries = Vec::new();
    let mut start = 0;
    while start < section.size {
        let len = stride.min(section.size - start);
        let is_short = len < stride && TABLES[table].name != ".parainstructions";
        let relocation = section.relocations_in(start, start + 1).first().filter(|_| !is_short)?;
        if relocation.kind == R_X86_64_NONE.0 {
            return None;
        }
        let place = code_at(object, section, relocation)?;
        entries.push(Entry {
            table,
            at: At {
                section: index,
                offset: start,
            },
            len,
            place,
            row: None,
            is_inherited: false,
        });
        start += stride;
    }
    Some(entries)
}

/// The place in the code that a relocation of a table means.
fn code_at(object: &Object, _table: &Section, relocation: &crate::elf::Relocation) -> Option<At> {
    let crate::elf::Place::In(base) = object.symbol(relocation)?.place else {
        return None;
    };
    object.section(base.section).filter(|section| section.is_code())?;
    let offset = base.offset.checked_add_signed(relocation.addend)?;
    Some(At { offset, ..base })
}

fn add_rows(object: &Object, ips: &Section, entries: &mut [Entry]) -> Result<(), TableError> {
    let wrong = |what: String| TableError {
        section: ORC.to_owned(),
        what,
    };
    let (_, rows) = object
        .section_named(ORC)
        .ok_or_else(|| wrong("it is missing".to_owned()))?;
    let count = u64::try_from(entries.len()).unwrap_or(u64::MAX).max(1);
    if rows.size % count != 0 {
        return Err(wrong(format!(
            "{} bytes for {count} entries of {}",
            rows.size, ips.name
        )));
    }
    let row = rows.size / count;
    for (entry, start) in entries
        .iter_mut()
        .zip((0..).step_by(usize::try_from(row.max(1)).unwrap_or(1)))
    {
        entry.row = rows.bytes(start, row);
    }
    Ok(())
}

/// How to unwind at the start of a function that has no row of its own there; none where nothing in front of it says so either.
pub(crate) fn inherited(entries: &[Entry], start: At) -> Option<Entry> {
    let rows = entries.iter().filter(|entry| entry.row.is_some());
    let in_front = rows.filter(|entry| entry.place.section == start.section && entry.place.offset <= start.offset);
    let last = in_front.max_by_key(|entry| entry.place.offset)?;
    (last.place != start).then(|| Entry {
        place: start,
        is_inherited: true,
        ..last.clone()
    })
}

impl Entry {
    /// The number of bytes that the entry itself says; `bytes` are the entry's.
    pub(crate) fn counted(&self, offsets: &[(u64, u64)], bytes: &[u8]) -> u64 {
        // The last of .parainstructions may lack its padding.
        let stride = if self.table().name == ".parainstructions" {
            16
        } else {
            self.len
        };
        let offset = offsets.iter().find(|(of, _)| *of == stride).map(|(_, offset)| *offset);
        let byte = offset.and_then(|offset| bytes.get(usize::try_from(offset).ok()?));
        byte.copied().map_or(0, u64::from)
    }
}
