//! Relocatable object files: what a compiler leaves, and what a kernel module is.
//!
//! Format: System V ABI, x86-64 supplement. Files here come from the host's own compiler or from a kernel package; a damaged
//! one is an error, never a panic.

pub mod code;
mod read;
mod write;

pub use read::ElfError;
pub use write::write;

use std::collections::BTreeMap;

use object::elf;

use crate::assembler::LOCALS;

/// `SHN_LIVEPATCH` (include/uapi/linux/elf.h): a symbol that the guest's livepatch core resolves.
pub const SHN_LIVEPATCH: u16 = 0xff20;
/// `SHF_RELA_LIVEPATCH` (include/uapi/linux/elf.h): relocations that refer to such symbols.
pub const SHF_RELA_LIVEPATCH: u64 = 0x0010_0000;

/// A relocatable object file: sections with their relocations, and symbols.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Object {
    /// All sections but those for symbols, strings and relocations. Index 0 is no section.
    pub sections: Vec<Section>,
    /// All symbols. Index 0 is no symbol.
    pub symbols: Vec<Symbol>,
    /// Livepatch symbols, by index, that are resolved when another object than their own is loaded, with that object.
    pub resolved_with: BTreeMap<usize, String>,
}

/// A section with the relocations that change it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Section {
    /// Its name.
    pub name: String,
    /// `sh_type`.
    pub kind: u32,
    /// `sh_flags`.
    pub flags: u64,
    /// `sh_addralign`, in bytes.
    pub align: u64,
    /// `sh_entsize`, in bytes.
    pub entry_size: u64,
    /// Bytes in memory.
    pub size: u64,
    /// Bytes in the file: none for `SHT_NOBITS`.
    pub data: Vec<u8>,
    /// In ascending order of offset.
    pub relocations: Vec<Relocation>,
}

/// A symbol.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Symbol {
    /// Its name; empty for a section's own symbol.
    pub name: String,
    /// Where it is.
    pub place: Place,
    /// Its size, in bytes; 0 where the compiler or assembler did not say.
    pub size: u64,
    /// `STT_*`: what it is.
    pub kind: u8,
    /// `STB_*`: who sees it.
    pub binding: u8,
}

/// Where a symbol is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// In another file.
    Undefined,
    /// Nowhere: its value is a number.
    Absolute(u64),
    /// To be given a place by the linker.
    Common,
    /// For the guest's livepatch core to resolve.
    Livepatch,
    /// In a section of this file.
    In(At),
}

/// A place in a section.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct At {
    /// Index of the section.
    pub section: usize,
    /// Bytes from its start.
    pub offset: u64,
}

/// A relocation: `kind` of a value made of `symbol` and `addend`, stored at `offset`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Relocation {
    /// Bytes from the section's start.
    pub offset: u64,
    /// `R_X86_64_*`.
    pub kind: u32,
    /// Index of the symbol.
    pub symbol: usize,
    /// What is added to the symbol's value.
    pub addend: i64,
}

impl Section {
    /// True for a section that takes part in memory.
    pub fn is_loaded(&self) -> bool {
        self.flags & elf::SHF_ALLOC.0 != 0
    }

    /// True for code.
    pub fn is_code(&self) -> bool {
        self.is_loaded() && self.flags & elf::SHF_EXECINSTR.0 != 0
    }

    /// True for data that code may change.
    pub fn is_writable(&self) -> bool {
        self.flags & elf::SHF_WRITE.0 != 0
    }

    /// True for text constants that a linker merges: each a string that ends with a zero byte.
    pub fn is_strings(&self) -> bool {
        self.has_strings() && self.entry_size <= 1
    }

    /// The length of the text constant at `offset`, with the zero that ends it, in a section of those whose characters are wider than a
    /// byte (`L"a"`, `u"a"`); `None` elsewhere.
    pub fn wide_text_len(&self, offset: u64) -> Option<u64> {
        if !self.has_strings() || self.is_strings() {
            return None;
        }
        let width = usize::try_from(self.entry_size).ok()?;
        let rest = self.data.get(usize::try_from(offset).ok()?..)?;
        let end = rest
            .chunks_exact(width)
            .position(|one| one.iter().all(|byte| *byte == 0))?;
        u64::try_from((end + 1) * width).ok()
    }

    fn has_strings(&self) -> bool {
        self.is_loaded() && self.flags & elf::SHF_STRINGS.0 != 0
    }

    /// What a place in it is a multiple of, in bytes; at the most what the section is.
    pub fn alignment_at(&self, offset: u64) -> u64 {
        let of_offset = if offset == 0 {
            u64::MAX
        } else {
            1 << offset.trailing_zeros()
        };
        self.align.max(1).min(of_offset)
    }

    /// `len` bytes from `offset` on; zeros where the section has no bytes in the file. None past its end.
    pub fn bytes(&self, offset: u64, len: u64) -> Option<Vec<u8>> {
        let end = offset.checked_add(len).filter(|end| *end <= self.size)?;
        if self.kind == elf::SHT_NOBITS.0 {
            return Some(vec![0; usize::try_from(len).ok()?]);
        }
        let range = usize::try_from(offset).ok()?..usize::try_from(end).ok()?;
        self.data.get(range).map(<[u8]>::to_vec)
    }

    /// The relocations that change `start..end`.
    pub fn relocations_in(&self, start: u64, end: u64) -> &[Relocation] {
        let first = self.relocations.partition_point(|r| r.offset < start);
        let last = self.relocations.partition_point(|r| r.offset < end);
        self.relocations.get(first..last.max(first)).unwrap_or_default()
    }
}

impl Symbol {
    /// True for a function.
    pub fn is_function(&self) -> bool {
        self.kind == elf::STT_FUNC.0
    }

    /// True for a variable or constant.
    pub fn is_data(&self) -> bool {
        self.kind == elf::STT_OBJECT.0
    }

    /// True for the symbol that stands for a whole section.
    pub fn is_section(&self) -> bool {
        self.kind == elf::STT_SECTION.0
    }

    /// True where other files do not see it.
    pub fn is_local(&self) -> bool {
        self.binding == elf::STB_LOCAL.0
    }
}

impl Object {
    /// The section of an index, where there is one.
    pub fn section(&self, index: usize) -> Option<&Section> {
        self.sections.get(index)
    }

    /// The symbol of a relocation, where there is one.
    pub fn symbol(&self, relocation: &Relocation) -> Option<&Symbol> {
        self.symbols.get(relocation.symbol)
    }

    /// True where every reference to a function or variable of the file names it; see [`crate::assembler`].
    pub fn names_what_is_meant(&self) -> bool {
        self.section_named(LOCALS).is_some()
    }

    /// The section of that name and its index, where there is one.
    pub fn section_named(&self, name: &str) -> Option<(usize, &Section)> {
        self.sections
            .iter()
            .enumerate()
            .find(|(_, section)| section.name == name)
    }
}
