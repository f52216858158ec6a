//! The kernel as it was shipped: where in it the items of a compiled file are, and their very code.

mod places;
mod shipped;

pub use places::{Found, Places};
pub use shipped::{Shipped, ShippedError};

use guest_core::pattern::Pattern;

use crate::compare::tables::Site;
use crate::compare::{ItemId, Unit, width};
use crate::elf::code::instructions;

/// The code of a function with all bytes masked that the running kernel may have changed, or that depend on where things are.
/// `code` is the function's code as shipped, or as compiled.
pub fn pattern(unit: &Unit, id: ItemId, code: &[u8]) -> Pattern {
    let item = unit.item(id);
    let mut pattern = Pattern::new(code);
    let mut mask = |start: u64, len: u64| {
        let start = usize::try_from(start).unwrap_or(usize::MAX);
        pattern.mask(start..start.saturating_add(usize::try_from(len).unwrap_or(0)));
    };
    for relocation in unit.relocations(item) {
        mask(relocation.offset - item.at.offset, width(relocation));
    }
    for entry in unit.entries(id) {
        let Some(start) = entry.place.offset.checked_sub(item.at.offset) else {
            continue;
        };
        let bytes = unit.object.section(entry.at.section);
        let bytes = bytes
            .and_then(|section| section.bytes(entry.at.offset, entry.len))
            .unwrap_or_default();
        let len = match entry.table().site {
            Site::Fixed => 0,
            Site::Bytes(len) => len,
            Site::Instruction => {
                let rest = usize::try_from(start).ok().and_then(|start| code.get(start..));
                let first = rest.and_then(|rest| instructions(rest).next());
                first.map_or(0, |instruction| instruction.next_ip())
            }
            Site::Counted(offset) => entry.counted(offset, &bytes),
        };
        mask(start, len);
    }
    pattern
}
