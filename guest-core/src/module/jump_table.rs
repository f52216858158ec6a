//! The rows of `__jump_table` in the file: the static key of each branch. `jump_labels.rs` links them.

use super::PatchModule;
use super::layout::{AreaKind, Layout, LayoutError};
use super::sections::{Relocation, SectionId, SectionOffset, SymbolId};
use super::sites::{Pointer, TableError};
use object::elf::R_X86_64_PC64;
use std::collections::BTreeSet;

pub(super) const TABLE: &str = "__jump_table";
/// Length of a row, in bytes.
pub(super) const ROW_BYTES: u64 = 16;
/// Offsets in a row.
pub(super) const TARGET: u64 = 4;
pub(super) const KEY: u64 = 8;
/// Space for a key's nodes, in bytes: two `struct static_key_mod` of three pointers each (kernel/jump_label.c). A key may need one for its own
/// rows, beside the one for the patch's.
pub const NODES_BYTES: u64 = 48;

/// A row of the file's table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Row {
    /// The branch.
    pub site: SectionOffset,
    /// The row.
    pub at: SectionOffset,
    /// Symbol and addend of the key, with the bits.
    pub key: (SymbolId, i64),
}

/// The rows for placed code, before they have addresses.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct JumpRows {
    pub(super) rows: Vec<Row>,
    /// Offset of the sorted table in the read-only area.
    pub(super) table: u64,
    /// Offset of the space for nodes in the data area.
    pub(super) nodes: u64,
}

impl PatchModule<'_> {
    /// The rows of the table.
    pub(crate) fn jump_rows(&self) -> Result<JumpRows, TableError> {
        let mut found = JumpRows::default();
        for (id, section) in self.sections_named(TABLE) {
            if section.size % ROW_BYTES != 0 {
                let size = format!("{} bytes", section.size);
                return Err(TableError::new(section, section.size, size, "a whole number of 16"));
            }
            let mut offset = 0;
            while offset < section.size {
                let site = self.site(section, offset, Pointer::Relative)?;
                let target = self.site(section, offset + TARGET, Pointer::Relative)?;
                for (at, place) in [(offset, site), (offset + TARGET, target)] {
                    if !self.section(place.section).is_some_and(|code| code.is_executable()) {
                        return Err(TableError::new(section, at, self.place(place), "a place in code"));
                    }
                }
                let key = section.relocation_at(offset + KEY);
                let key = key.filter(|relocation| relocation.kind == R_X86_64_PC64.0);
                let key = key.ok_or_else(|| TableError::new(section, offset + KEY, "none", "a distance to a key"))?;
                found.rows.push(Row {
                    site,
                    at: SectionOffset { section: id, offset },
                    key: (key.symbol, key.addend),
                });
                offset += ROW_BYTES;
            }
        }
        Ok(found)
    }
}

impl JumpRows {
    pub(crate) fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// The targets and keys of the rows for code in `section`, with the table's own section.
    pub(crate) fn references<'a>(
        &'a self,
        module: &'a PatchModule<'_>,
        section: SectionId,
    ) -> impl Iterator<Item = (SectionId, &'a Relocation)> {
        let rows = self.rows.iter().filter(move |row| row.site.section == section);
        rows.flat_map(move |row| {
            let table = module.section(row.at.section);
            let (from, to) = (row.at.plus(TARGET).offset, row.at.plus(ROW_BYTES).offset);
            let references = table.map(|table| table.relocations_in(from, to));
            let id = row.at.section;
            references.unwrap_or_default().iter().map(move |one| (id, one))
        })
    }

    /// Keeps the rows whose code `is_placed`, and reserves space for the table and the nodes.
    pub(crate) fn place(
        &self,
        layout: &mut Layout,
        is_placed: impl Fn(SectionId) -> bool,
    ) -> Result<Self, LayoutError> {
        let mut placed = self.clone();
        placed.rows.retain(|row| is_placed(row.site.section));
        if placed.rows.is_empty() {
            return Ok(placed);
        }
        let size = (placed.rows.len() as u64).saturating_mul(ROW_BYTES);
        placed.table = layout.reserve(TABLE, AreaKind::RoData, size, 8)?;
        let keys: BTreeSet<_> = placed.rows.iter().map(|row| (row.key.0, row.key.1 & !3)).collect();
        let nodes = (keys.len() as u64).saturating_mul(NODES_BYTES);
        placed.nodes = layout.reserve("static_key_mod", AreaKind::Data, nodes, 8)?;
        Ok(placed)
    }
}
