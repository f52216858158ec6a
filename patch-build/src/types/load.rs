//! The debug sections of an object file, with their relocations done.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use gimli::{Dwarf, EndianSlice, LittleEndian, SectionId};
use object::elf::{R_X86_64_32, R_X86_64_64, R_X86_64_PC32};

use super::DebugError;
use crate::elf::{At, Object, Place};

/// How far apart sections lie in the addresses that debug information is given: more than any section's bytes.
const SECTION_SPAN_BITS: u32 = 32;

pub(super) type Slice<'d> = EndianSlice<'d, LittleEndian>;

/// The debug sections of an object file.
#[derive(Debug)]
pub struct DebugInfo {
    sections: BTreeMap<&'static str, Vec<u8>>,
}

impl DebugInfo {
    /// Takes the debug sections out of an object file. A file without has no units.
    ///
    /// An address in them is made of the section's index and the offset in it, as nothing has an address yet.
    pub fn of(object: &Object) -> Self {
        let ids = [
            SectionId::DebugAbbrev,
            SectionId::DebugAddr,
            SectionId::DebugInfo,
            SectionId::DebugLine,
            SectionId::DebugLineStr,
            SectionId::DebugLocLists,
            SectionId::DebugRngLists,
            SectionId::DebugRanges,
            SectionId::DebugStr,
            SectionId::DebugStrOffsets,
            SectionId::DebugTypes,
        ];
        let sections = ids.into_iter().filter_map(|id| {
            let (_, section) = object.section_named(id.name())?;
            let mut data = section.data.clone();
            for relocation in &section.relocations {
                let Some(Place::In(base)) = object.symbol(relocation).map(|symbol| symbol.place) else {
                    continue;
                };
                let loaded = object.section(base.section).is_some_and(|section| section.is_loaded());
                let start = if loaded { address(base) } else { base.offset };
                let value = start.wrapping_add_signed(relocation.addend);
                let Ok(offset) = usize::try_from(relocation.offset) else {
                    continue;
                };
                let bytes = value.to_le_bytes();
                let width = match relocation.kind {
                    kind if kind == R_X86_64_64.0 => 8,
                    kind if kind == R_X86_64_32.0 || kind == R_X86_64_PC32.0 => 4,
                    _ => continue,
                };
                if let (Some(slot), Some(bytes)) = (data.get_mut(offset..offset + width), bytes.get(..width)) {
                    slot.copy_from_slice(bytes);
                }
            }
            Some((id.name(), data))
        });
        Self {
            sections: sections.collect(),
        }
    }

    pub(super) fn dwarf(&self) -> Result<Dwarf<Slice<'_>>, DebugError> {
        let load = |id: SectionId| -> Result<Slice<'_>, DebugError> {
            let data = self.sections.get(id.name()).map(Vec::as_slice).unwrap_or_default();
            Ok(EndianSlice::new(data, LittleEndian))
        };
        Dwarf::load(load)
    }
}

fn address(at: At) -> u64 {
    (u64::try_from(at.section).unwrap_or_default() << SECTION_SPAN_BITS).wrapping_add(at.offset)
}

/// The place that such an address means.
pub(super) fn place(address: u64) -> Option<At> {
    Some(At {
        section: usize::try_from(address >> SECTION_SPAN_BITS).ok()?,
        offset: address & ((1 << SECTION_SPAN_BITS) - 1),
    })
}

/// A name or other text of an entry.
pub(super) fn text(
    dwarf: &Dwarf<Slice<'_>>,
    unit: &gimli::Unit<Slice<'_>>,
    entry: &gimli::DebuggingInformationEntry<Slice<'_>>,
    what: gimli::DwAt,
) -> Option<String> {
    let value = entry.attr_value(what)?;
    let text = dwarf.attr_string(unit, value).ok()?;
    Some(text.to_string_lossy().into_owned())
}

/// The name of an entry, its own or that of the declaration that it belongs to.
pub(super) fn name(
    dwarf: &Dwarf<Slice<'_>>,
    unit: &gimli::Unit<Slice<'_>>,
    entry: &gimli::DebuggingInformationEntry<Slice<'_>>,
) -> Option<String> {
    text(dwarf, unit, entry, gimli::DW_AT_name).or_else(|| text(dwarf, unit, &origin(unit, entry)?, gimli::DW_AT_name))
}

/// The entry that another one is a copy or the body of.
pub(super) fn origin<'d>(
    unit: &gimli::Unit<Slice<'d>>,
    entry: &gimli::DebuggingInformationEntry<Slice<'_>>,
) -> Option<gimli::DebuggingInformationEntry<Slice<'d>>> {
    let origin = entry
        .attr_value(gimli::DW_AT_abstract_origin)
        .or_else(|| entry.attr_value(gimli::DW_AT_specification))?;
    let gimli::AttributeValue::UnitRef(offset) = origin else {
        return None;
    };
    unit.entry(offset).ok()
}

/// Which of the files that debug information numbers is the one that is compiled: the same path may have several numbers, and
/// the first ones may be headers.
#[derive(Debug, Default)]
pub(super) struct MainFile {
    numbers: BTreeSet<u64>,
}

impl MainFile {
    /// Of a unit. With DWARF 5, number 0 is that file; before, the unit's own name is.
    pub fn of(dwarf: &Dwarf<Slice<'_>>, unit: &gimli::Unit<Slice<'_>>) -> Self {
        let Some(program) = &unit.line_program else {
            return Self::default();
        };
        let header = program.header();
        let path = |number: u64| -> Option<PathBuf> {
            let file = header.file(number)?;
            let text = |value| Some(dwarf.attr_string(unit, value).ok()?.to_string_lossy().into_owned());
            // Each may be told relative to the one before.
            let base = text(header.directory(0)?)?;
            let folder = text(file.directory(header)?)?;
            Some(PathBuf::from(base).join(folder).join(text(file.path_name())?))
        };
        let Some(main) = path(0) else {
            return Self::default();
        };
        let count = u64::try_from(header.file_names().len()).unwrap_or_default();
        let numbers = (0..=count).filter(|number| path(*number).as_ref() == Some(&main));
        Self {
            numbers: numbers.collect(),
        }
    }

    /// True for what the compiled file itself declares, not a header.
    pub fn has(&self, entry: &gimli::DebuggingInformationEntry<Slice<'_>>) -> bool {
        let file = match entry.attr_value(gimli::DW_AT_decl_file) {
            Some(gimli::AttributeValue::FileIndex(index)) => Some(index),
            other => other.and_then(|value| value.udata_value()),
        };
        file.is_some_and(|file| self.numbers.contains(&file))
    }
}
