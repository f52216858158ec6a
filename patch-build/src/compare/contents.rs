//! What tells things apart that macros and the compiler only count: their contents.

use object::elf::{R_X86_64_64, R_X86_64_PC64};

use super::names;
use super::unit::{Item, ItemId, Target, Unit};
use crate::elf::{At, Section};

/// Where `pr_debug()` sites are described, each by a `struct _ddebug`.
const DEBUG_SITES: &str = "__dyndbg";
/// Where in such a structure its line is (include/linux/dynamic_debug.h of 5.10 to 7.3), and which bits of the four bytes are none.
const DEBUG_SITE_LINE: u64 = 32;
const DEBUG_SITE_NO_LINE: u32 = !((1 << 18) - 1);
/// How deep contents may refer to contents.
const DEPTH_MAX: usize = 4;

/// True for a variable that may start afresh: it only notes whether, or how often, something was said, or may be said.
pub(crate) fn is_forgetful(unit: &Unit, item: &Item) -> bool {
    names::is_forgetful(&item.name) || unit.section_of(item).name == DEBUG_SITES
}

/// The bytes of a piece of a section without what says a line of the source.
pub(super) fn bytes_without_lines(section: &Section, at: At, len: u64) -> Option<Vec<u8>> {
    let mut bytes = section.bytes(at.offset, len)?;
    if section.name == DEBUG_SITES && len >= DEBUG_SITE_LINE + 4 {
        let start = usize::try_from(DEBUG_SITE_LINE).ok()?;
        let word = bytes.get_mut(start..start + 4)?;
        let value = u32::from_le_bytes(word.try_into().ok()?) & DEBUG_SITE_NO_LINE;
        word.copy_from_slice(&value.to_le_bytes());
    }
    Some(bytes)
}

/// What tells an item from others of its key: its contents where it is counted only, nothing where the source names it. Two items
/// of two files that mean the same have the same.
pub(super) fn of_counted(unit: &Unit, id: ItemId) -> Option<String> {
    let item = unit.item(id);
    let counted = item.is_local && !item.is_function && names::is_counted(&item.name);
    (counted || unit.section_of(item).name == DEBUG_SITES).then(|| of(unit, id, 0))
}

fn of(unit: &Unit, id: ItemId, depth: usize) -> String {
    let item = unit.item(id);
    let section = unit.section_of(item);
    let mut bytes = bytes_without_lines(section, item.at, item.size).unwrap_or_default();
    let mut targets = String::new();
    for relocation in unit.relocations(item) {
        let at = relocation.offset - item.at.offset;
        let width = if [R_X86_64_64.0, R_X86_64_PC64.0].contains(&relocation.kind) {
            8
        } else {
            4
        };
        // What the linker writes over is no contents.
        let place = usize::try_from(at).map_or(0..0, |at| at..at + width);
        if let Some(place) = bytes.get_mut(place) {
            place.fill(0);
        }
        let target = target(unit, &unit.target(item.at.section, relocation), depth);
        targets.push_str(&format!("; {at} {} {target}", relocation.kind));
    }
    format!("{} {bytes:x?}{targets}", section.flags)
}

fn target(unit: &Unit, target: &Target, depth: usize) -> String {
    match target {
        Target::Extern(name, offset) => format!("{name} {offset}"),
        Target::Item(id, offset) => {
            let item = unit.item(*id);
            if depth < DEPTH_MAX && !item.is_function && names::is_counted(&item.name) {
                return format!("{offset} ({})", of(unit, *id, depth + 1));
            }
            format!("{} {offset}", item.key)
        }
        Target::Text(text, offset) => format!("{offset} {text:x?}"),
        // A constant without a name: who compares the items follows it.
        Target::Unnamed(..) => "a constant".to_owned(),
        Target::Number(number) => number.to_string(),
    }
}
