//! Which lines of the source code is of.

use std::collections::BTreeMap;

use super::DebugError;
use super::load::{self, DebugInfo};
use crate::elf::At;

/// Lines of the source, by the places of the code that the compiler made of them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rows {
    /// By section: offset and line, ascending.
    by_section: BTreeMap<usize, Vec<(u64, u64)>>,
}

impl Rows {
    /// Reads them.
    ///
    /// Errors: damaged debug information.
    pub fn read(info: &DebugInfo) -> Result<Self, DebugError> {
        let dwarf = info.dwarf()?;
        let mut all = Vec::new();
        let mut units = dwarf.units();
        while let Some(header) = units.next()? {
            let unit = dwarf.unit(header)?;
            let Some(program) = unit.line_program.clone() else {
                continue;
            };
            let mut rows = program.rows();
            while let Some((_, row)) = rows.next_row()? {
                if let (Some(at), Some(line), false) = (load::place(row.address()), row.line(), row.end_sequence()) {
                    all.push((at, line.get()));
                }
            }
        }
        Ok(Self::of(all))
    }

    /// Of places and their lines.
    pub(crate) fn of(rows: Vec<(At, u64)>) -> Self {
        let mut by_section: BTreeMap<usize, Vec<(u64, u64)>> = BTreeMap::new();
        for (at, line) in rows {
            by_section.entry(at.section).or_default().push((at.offset, line));
        }
        by_section.values_mut().for_each(|rows| rows.sort_unstable());
        Self { by_section }
    }

    /// The lines of `len` bytes of code from a place on.
    pub fn lines_in(&self, at: At, len: u64) -> impl Iterator<Item = u64> + '_ {
        let rows = self.by_section.get(&at.section).map(Vec::as_slice).unwrap_or_default();
        let first = rows.partition_point(|(offset, _)| *offset < at.offset);
        let rest = rows.get(first..).unwrap_or_default().iter();
        rest.take_while(move |(offset, _)| offset - at.offset < len)
            .map(|(_, line)| *line)
    }
}
