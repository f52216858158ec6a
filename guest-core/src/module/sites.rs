//! Tables of places in the code, as objtool and the compiler leave them for the loader: each entry is a pointer, absolute
//! or relative to itself, that a relocation fills in (tools/objtool/check.c, `create_*_sections`).

use super::PatchModule;
use super::sections::{Section, SectionId, SectionOffset};
use object::elf::{R_X86_64_64, R_X86_64_PC32};

/// A table for the loader that is not as it should be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("bad entry at {section}+{offset:#x}: found {found}, expected {expected}")]
pub struct TableError {
    /// The table's section.
    pub section: String,
    /// Offset of the entry, in bytes.
    pub offset: u64,
    /// What is there.
    pub found: String,
    /// What should be.
    pub expected: &'static str,
}

impl TableError {
    pub(crate) fn new(section: &Section<'_>, offset: u64, found: impl Into<String>, expected: &'static str) -> Self {
        Self::named(section.name, offset, found, expected)
    }

    pub(crate) fn named(section: &str, offset: u64, found: impl Into<String>, expected: &'static str) -> Self {
        Self {
            section: section.into(),
            offset,
            found: found.into(),
            expected,
        }
    }
}

/// How an entry holds its pointer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Pointer {
    /// 4 bytes, relative to themselves.
    Relative,
    /// 8 bytes.
    Absolute,
}

impl Pointer {
    fn bytes(self) -> u64 {
        match self {
            Self::Relative => 4,
            Self::Absolute => 8,
        }
    }
}

impl<'d> PatchModule<'d> {
    /// The places that a table consisting of nothing but pointers lists, in its order. No such section: none.
    pub(crate) fn sites(&self, table: &str, pointer: Pointer) -> Result<Vec<SectionOffset>, TableError> {
        let mut sites = Vec::new();
        for (_, section) in self.sections_named(table) {
            let size = pointer.bytes();
            if section.size % size != 0 {
                return Err(TableError::new(
                    section,
                    section.size,
                    "the end",
                    "a whole number of entries",
                ));
            }
            // An entry without relocation can't be told from one that is missing: count them.
            let mut offset = 0;
            while offset < section.size {
                sites.push(self.site(section, offset, pointer)?);
                offset += size;
            }
        }
        Ok(sites)
    }

    /// The place that the pointer at `offset` in `table` means.
    pub(crate) fn site(&self, table: &Section<'_>, offset: u64, pointer: Pointer) -> Result<SectionOffset, TableError> {
        let expected = "a pointer to a place in this module";
        let Some(relocation) = table.relocation_at(offset) else {
            return Err(TableError::new(table, offset, "no relocation", expected));
        };
        let kind = match pointer {
            Pointer::Relative => R_X86_64_PC32,
            Pointer::Absolute => R_X86_64_64,
        };
        let target = self.target(relocation, 0).filter(|_| relocation.kind == kind.0);
        // The end of a section is a place too: ORC tables mark it.
        let inside = target.filter(|t| self.section(t.section).is_some_and(|s| t.offset <= s.size));
        inside.ok_or_else(|| {
            let found = format!(
                "relocation type {} against {}",
                relocation.kind,
                self.symbol_name(relocation)
            );
            TableError::new(table, offset, found, expected)
        })
    }

    /// All sections of that name: `ld -r` leaves one, other tools may leave several.
    pub(crate) fn sections_named<'a>(&'a self, name: &'a str) -> impl Iterator<Item = (SectionId, &'a Section<'d>)> {
        self.sections().filter(move |(_, section)| section.name == name)
    }
}
