//! Writing the module: a standard livepatch module, which a guest of that kernel can load itself.
//!
//! In this order: what was selected is laid into sections (`Layer`); the glue, a small C text compiled with the kernel's own
//! headers, adds the `struct module`, the `struct klp_patch` and the code that enables it; then come the symbols' checksums and
//! the note.

mod glue;
mod layer;
mod output;
#[cfg(test)]
mod parts;

pub(crate) use glue::{Named, ObjectOf, add_glue, text};
pub(crate) use layer::Layer;

use object::elf;

use crate::elf::{Object, Section};
use crate::facts::Exports;

/// Bytes of a `struct modversion_info` (include/linux/module.h).
const VERSION_BYTES: usize = 64;

/// What every module with checksums of symbols has one of: the checksum of `struct module` itself.
const LAYOUT: &str = "module_layout";

/// Adds `__versions`: the checksum of every exported symbol that the module uses, which the kernel compares with its own.
pub(crate) fn add_versions(object: &mut Object, exports: &Exports) {
    let used = object
        .symbols
        .iter()
        .filter(|symbol| symbol.place == crate::elf::Place::Undefined)
        .map(|symbol| symbol.name.as_str());
    let mut names: Vec<&str> = used.chain([LAYOUT]).filter(|name| !name.is_empty()).collect();
    names.sort_unstable();
    names.dedup();
    let mut data = Vec::new();
    for name in names {
        let Some(export) = exports.get(name) else { continue };
        let mut entry = u64::from(export.crc).to_le_bytes().to_vec();
        entry.extend(name.as_bytes());
        // A longer name than fits has no checksum here; the kernel lets it pass.
        if entry.len() < VERSION_BYTES {
            entry.resize(VERSION_BYTES, 0);
            data.extend(entry);
        }
    }
    add_section(object, "__versions", elf::SHT_PROGBITS, elf::SHF_ALLOC, 32, data);
}

/// Adds the note.
pub(crate) fn add_note(object: &mut Object, bytes: Vec<u8>) {
    let name = guest_core::module::note::NOTE_SECTION;
    add_section(object, name, elf::SHT_NOTE, elf::SHF_ALLOC, 4, bytes);
}

fn add_section(
    object: &mut Object,
    name: &str,
    kind: elf::SectionType,
    flags: elf::SectionFlags,
    align: u64,
    data: Vec<u8>,
) {
    object.sections.push(Section {
        name: name.to_owned(),
        kind: kind.0,
        flags: flags.0,
        align,
        entry_size: 0,
        size: u64::try_from(data.len()).unwrap_or(u64::MAX),
        data,
        relocations: Vec::new(),
    });
}
