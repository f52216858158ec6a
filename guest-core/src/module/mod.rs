//! Livepatch modules: parses the file, selects what goes into the guest, and links the bytes that go there.
//!
//! In the order in which a module passes through:
//! - [`PatchModule`]: the file, checked ([`ModuleError`]);
//! - [`Patch`]: the functions that it replaces ([`PatchError`]), read with the guest's [`KlpLayout`]; one file for each
//!   [`PatchFormat`]: `klp.rs`, `kpatch.rs`, `klp_build.rs`; `init/` refuses what their init and exit do beside that;
//! - [`Image`]: the sections that those functions need (`selection.rs` follows what refers to what), and their [`Layout`] in
//!   memory ([`ImageError`]). One table in `section_policy.rs` decides for each section: copy, process, drop or refuse;
//! - [`Image::this_module_uses`]: the references to the module's own `struct module` (`this_module.rs`);
//! - [`Image::escapes`]: the addresses of the patch that the guest may still use after a revert (`escapes.rs`, `flow.rs`, `not_run.rs`);
//! - [`Linked`]: the finished bytes for given addresses ([`LinkError`]), after the work of the kernel's own loader.
//!
//! The work of the kernel's own loader is one file for each kind: `alternatives.rs` and `replace.rs`, `branches.rs` (return
//! and indirect branch sites; `thunks.rs` finds out how this guest handles them), `paravirt.rs`, `fentry.rs`, `orc.rs`,
//! `jump_labels.rs` and `jump_table.rs`, `instruction_tables.rs` (exception table, WARN and BUG).
//!
//! Nothing here writes to a guest. The file is treated as hostile: every length and offset in it is checked.

mod alternatives;
mod branches;
#[cfg(test)]
mod damaged;
mod descriptor;
mod elf;
mod error;
mod escapes;
mod fentry;
mod flow;
mod image;
mod init;
mod instruction_tables;
mod jump_labels;
mod jump_table;
mod klp;
mod klp_build;
mod kpatch;
mod layout;
mod link;
mod link_error;
mod modinfo;
#[cfg(test)]
mod native;
mod nops;
mod not_run;
pub mod note;
mod object_name;
mod orc;
mod paravirt;
mod patch;
mod relocate;
mod replace;
mod resolve;
mod section_policy;
mod sections;
mod selection;
mod sites;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
mod this_module;
mod thunks;
mod versions;

pub use alternatives::AltLayout;
pub use error::ModuleError;
pub use image::{Image, ImageError, PlacedSymbol, Undefined};
pub use init::{OwnFunction, Work};
pub use instruction_tables::Table;
pub use jump_labels::{JumpLabels, JumpLayout, UsedKey};
pub use jump_table::NODES_BYTES;
pub use layout::{Area, AreaKind, Layout, LayoutError, PlacedSection};
pub use link::{Bases, GuestContext, Linked, LinkedFunction};
pub use link_error::LinkError;
pub use modinfo::ModInfo;
pub use note::{Note, NoteError};
pub use orc::OrcTables;
pub use patch::{KlpLayout, Patch, PatchError, PatchFormat, PatchFunction, PatchObject};
pub use resolve::{ResolveError, ResolveSymbol};
pub use sections::{SectionId, SectionOffset};
pub use sites::TableError;
pub use this_module::ThisModuleUse;
pub use versions::Version;

use crate::btf::{Btf, BtfError};
use elf::Elf;
use sections::{Relocation, Section, Symbol, SymbolPlace};

/// The section with the kernel types that a module's own types use: BTF that the kernel reads from the file, without loading the section.
const BASE_TYPES: &str = ".BTF.base";

/// A livepatch module file, parsed and checked. It borrows the file's bytes.
#[derive(Debug)]
pub struct PatchModule<'d> {
    elf: Elf<'d>,
    info: ModInfo<'d>,
}

impl<'d> PatchModule<'d> {
    /// Parses a module file: a relocatable ELF file for x86-64 whose `.modinfo` says that it is a livepatch module.
    ///
    /// # Errors
    ///
    /// The file is no such module.
    pub fn parse(bytes: &'d [u8]) -> Result<Self, ModuleError> {
        let elf = Elf::parse(bytes)?;
        let info = elf
            .sections
            .iter()
            .find(|s| s.name == ".modinfo")
            .map_or(&[][..], |s| s.data);
        let info = ModInfo::parse(info)?;
        for key in ["name", "vermagic"] {
            info.get(key).ok_or(ModuleError::NoModinfo { key })?;
        }
        // The kernel checks for the key only, whatever its value (kernel/module/main.c, check_modinfo_livepatch).
        if info.get("livepatch").is_none() {
            return Err(ModuleError::NotLivepatch {
                name: info.get("name").unwrap_or_default().into(),
            });
        }
        Ok(Self { elf, info })
    }

    /// The module's name.
    pub fn name(&self) -> &'d str {
        self.info.get("name").unwrap_or_default()
    }

    /// The entries of the module's `.modinfo`.
    pub fn info(&self) -> &ModInfo<'d> {
        &self.info
    }

    /// The digest of the ORC format that the module was built with, if it has one (6.4 and later). It must equal the guest's own `.orc_header` (arch/x86/include/asm/orc_header.h).
    pub fn orc_header(&self) -> Option<&'d [u8]> {
        self.section_named(".orc_header").map(|(_, section)| section.data)
    }

    /// The linker's build ID, if the module has one: an ELF note of type 3 (`NT_GNU_BUILD_ID`) of the owner "GNU".
    pub fn build_id(&self) -> Option<&'d [u8]> {
        let (_, section) = self.section_named(".note.gnu.build-id")?;
        // Lengths of owner and contents, the type, the owner with its NUL: 4 bytes each, little-endian.
        let contents = section.data.strip_prefix(&[4, 0, 0, 0])?;
        let (len, contents) = contents.split_first_chunk::<4>()?;
        let contents = contents.strip_prefix(b"\x03\0\0\0GNU\0")?;
        contents.get(..usize::try_from(u32::from_le_bytes(*len)).ok()?)
    }

    /// The origin of the patch and the code that it was made for. Only modules that `vmpatch build` made have this note.
    ///
    /// # Errors
    ///
    /// The note cannot be used.
    pub fn note(&self) -> Result<Option<Note>, NoteError> {
        let section = self.section_named(note::NOTE_SECTION);
        section.map(|(_, section)| Note::parse(section.data)).transpose()
    }

    /// The kernel types that the module's own types use, by name and size, if it was built with BTF (`.BTF.base`, since 6.11;
    /// tools/lib/bpf/btf.c, `btf__distill_base`).
    ///
    /// # Errors
    ///
    /// The section is no valid BTF.
    pub fn base_types(&self) -> Result<Option<Btf>, BtfError> {
        let section = self.elf.sections.iter().find(|section| section.name == BASE_TYPES);
        section.map(|section| Btf::parse(section.data.to_vec())).transpose()
    }

    /// The names of the symbols that the module imports. The kernel's own loader searches them among exports.
    pub fn undefined(&self) -> impl Iterator<Item = &'d str> {
        let symbols = self.elf.symbols.iter().filter(|symbol| !symbol.name.is_empty());
        let undefined = symbols.filter(|symbol| matches!(symbol.place, SymbolPlace::Undefined { .. }));
        undefined.map(|symbol| symbol.name)
    }

    /// All sections that a loader gives memory.
    fn sections(&self) -> impl Iterator<Item = (SectionId, &Section<'d>)> {
        self.elf
            .sections
            .iter()
            .enumerate()
            .map(|(index, s)| (SectionId(index), s))
            .filter(|(_, s)| s.is_loaded())
    }

    fn section(&self, id: SectionId) -> Option<&Section<'d>> {
        self.elf.sections.get(id.0).filter(|section| section.is_loaded())
    }

    fn section_named(&self, name: &str) -> Option<(SectionId, &Section<'d>)> {
        self.sections().find(|(_, section)| section.name == name)
    }

    /// The symbol of a relocation. [`Elf::parse`] has checked that it exists.
    fn symbol(&self, relocation: &Relocation) -> Option<&Symbol<'d>> {
        self.elf.symbols.get(relocation.symbol.0)
    }

    fn symbol_count(&self) -> usize {
        self.elf.symbols.len()
    }

    fn symbol_name(&self, relocation: &Relocation) -> &'d str {
        self.symbol(relocation).map_or("", |symbol| symbol.name)
    }

    /// The place in this module that `relocation` means: symbol plus addend plus `bias`. `None` if its symbol is not defined in this module,
    /// or the place is before the section.
    fn target(&self, relocation: &Relocation, bias: i64) -> Option<SectionOffset> {
        let SymbolPlace::Defined(base) = self.symbol(relocation)?.place else {
            return None;
        };
        let offset = base.offset.checked_add_signed(relocation.addend.checked_add(bias)?)?;
        Some(SectionOffset { offset, ..base })
    }

    /// A place for a message: `.text+0x1f5`.
    fn place(&self, at: SectionOffset) -> String {
        format!("{}+{:#x}", self.section_name(at.section), at.offset)
    }

    fn section_name(&self, id: SectionId) -> &'d str {
        self.elf.sections.get(id.0).map_or("?", |section| section.name)
    }
}
