//! The parts of a module file: sections, relocations and symbols.

use object::elf;

/// A section of the module, by its index in the section header table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SectionId(pub(crate) usize);

/// A symbol of the module, by its index in the symbol table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct SymbolId(pub(crate) usize);

/// A place in the module file: a section and an offset into it, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SectionOffset {
    /// The section.
    pub section: SectionId,
    /// Bytes from the section's start.
    pub offset: u64,
}

impl SectionOffset {
    /// The place `bytes` further on. It saturates at 2^64, which no section reaches.
    pub(crate) fn plus(self, bytes: u64) -> Self {
        Self {
            section: self.section,
            offset: self.offset.saturating_add(bytes),
        }
    }
}

/// One relocation of a loaded section.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Relocation {
    /// Bytes from the start of the section that it changes.
    pub offset: u64,
    /// ELF relocation type, `R_X86_64_*`.
    pub kind: u32,
    pub symbol: SymbolId,
    pub addend: i64,
}

impl Relocation {
    /// What the addend lacks in an instruction that ends at `end`: a distance counts from there; an address is absolute.
    pub fn bias(&self, end: u64) -> i64 {
        let is_distance = [elf::R_X86_64_PC32.0, elf::R_X86_64_PLT32.0].contains(&self.kind);
        let from_end = end.wrapping_sub(self.offset).cast_signed();
        if is_distance { from_end } else { 0 }
    }
}

/// A section.
#[derive(Debug)]
pub(crate) struct Section<'d> {
    pub name: &'d str,
    /// `SHT_*`.
    pub kind: u32,
    /// `SHF_*`.
    pub flags: u64,
    /// Size in memory, in bytes. A NOBITS section has no [`Section::data`].
    pub size: u64,
    pub align: u64,
    /// The bytes in the file; empty for sections that are not loaded.
    pub data: &'d [u8],
    /// In ascending order of offset.
    pub relocations: Vec<Relocation>,
}

impl Section<'_> {
    /// True if the kernel's loader gives the section memory (`SHF_ALLOC`), and it is not empty.
    pub fn is_loaded(&self) -> bool {
        self.flags & elf::SHF_ALLOC.0 != 0
            && self.size != 0
            && self.kind != elf::SHT_RELA.0
            && self.kind != elf::SHT_NULL.0
    }

    pub fn is_executable(&self) -> bool {
        self.flags & elf::SHF_EXECINSTR.0 != 0
    }

    pub fn is_writable(&self) -> bool {
        self.flags & elf::SHF_WRITE.0 != 0
    }

    /// The first relocation at `offset`.
    pub fn relocation_at(&self, offset: u64) -> Option<&Relocation> {
        self.relocations_in(offset, offset.saturating_add(1)).first()
    }

    /// The relocations with `from <= offset < to`.
    pub fn relocations_in(&self, from: u64, to: u64) -> &[Relocation] {
        let start = self.relocations.partition_point(|r| r.offset < from);
        let end = self.relocations.partition_point(|r| r.offset < to);
        self.relocations.get(start..end).unwrap_or_default()
    }

    /// `N` file bytes from `offset` on.
    pub fn bytes<const N: usize>(&self, offset: u64) -> Option<[u8; N]> {
        let start = usize::try_from(offset).ok()?;
        self.data.get(start..start.checked_add(N)?)?.try_into().ok()
    }
}

/// The place of a symbol.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum SymbolPlace<'d> {
    /// Undefined here: an exported symbol of the kernel.
    Undefined { weak: bool },
    /// An absolute number.
    Absolute(u64),
    /// A place in this module.
    Defined(SectionOffset),
    /// `.klp.sym.OBJECT.NAME,SYMPOS`: any symbol of an object, exported or not.
    Livepatch {
        object: &'d str,
        name: &'d str,
        sympos: u64,
    },
    /// `SHN_COMMON`, which the kernel's loader refuses.
    Common,
    /// A special section index that modules do not use.
    Unknown(u16),
}

/// A symbol.
#[derive(Debug)]
pub(crate) struct Symbol<'d> {
    pub name: &'d str,
    pub place: SymbolPlace<'d>,
    pub size: u64,
    pub is_function: bool,
}
