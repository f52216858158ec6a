//! Modules that somebody has damaged: a good one, of which a few bytes are altered where they hurt.

use std::fs;
use std::ops::Range;

use object::LittleEndian;
use object::elf::FileHeader64;
use object::read::elf::{FileHeader, SectionHeader};

const LE: LittleEndian = LittleEndian;
/// Bytes of a section header and of a relocation with an addend (System V ABI).
const HEADER_BYTES: usize = 64;
const RELA_BYTES: usize = 24;

/// A member of a section header: its offset and bytes.
#[derive(Clone, Copy, Debug)]
pub enum Header {
    /// `sh_name`, in the low half; in the high half `sh_type`.
    Name = 0,
    /// `sh_flags`.
    Flags = 8,
    /// `sh_size`.
    Size = 32,
    /// `sh_addralign`.
    Align = 48,
}

/// A member of a relocation.
#[derive(Clone, Copy, Debug)]
pub enum Rela {
    /// `r_offset`.
    Offset,
    /// The low half of `r_info`.
    Kind,
    /// The high half of `r_info`.
    Symbol,
    /// `r_addend`.
    Addend,
}

/// A module's file.
#[derive(Clone, Debug)]
pub struct Spoiled {
    bytes: Vec<u8>,
}

impl Spoiled {
    /// Nothing altered yet.
    ///
    /// # Panics
    ///
    /// If it can't be read; and, as every method here, if it is not a module that has what is to be altered.
    pub fn of(path: &str) -> Self {
        let bytes = fs::read(path).expect("the module can be read");
        Self { bytes }
    }

    /// The file.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Alters a member of a section's header.
    #[must_use]
    pub fn header(self, section: &str, member: Header, alter: impl Fn(u64) -> u64) -> Self {
        let at = self.section(section).0 + member as usize;
        self.word(at, alter)
    }

    /// Alters a member of the `index`-th relocation of a section.
    #[must_use]
    pub fn rela(self, section: &str, index: usize, member: Rela, alter: impl Fn(u64) -> u64) -> Self {
        let at = self.section(&format!(".rela{section}")).1.start + index * RELA_BYTES;
        let low = |word: u64| word & 0xffff_ffff;
        match member {
            Rela::Offset => self.word(at, alter),
            Rela::Kind => self.word(at + 8, |info| (info & !0xffff_ffff) | alter(low(info))),
            Rela::Symbol => self.word(at + 8, |info| alter(info >> 32) << 32 | low(info)),
            Rela::Addend => self.word(at + 16, alter),
        }
    }

    /// Makes a relocation of a section mean what another one means.
    #[must_use]
    pub fn rela_like(self, section: &str, index: usize, other: usize) -> Self {
        let start = self.section(&format!(".rela{section}")).1.start;
        let rest = |index: usize| start + index * RELA_BYTES + 8..start + (index + 1) * RELA_BYTES;
        let same = self.slice(rest(other)).to_vec();
        self.put(rest(index).start, &same)
    }

    /// Alters bytes of a section.
    #[must_use]
    pub fn data(self, section: &str, at: usize, bytes: &[u8]) -> Self {
        let start = self.section(section).1.start;
        self.put(start + at, bytes)
    }

    /// Alters the first appearance of `text` in a section.
    #[must_use]
    pub fn text(self, section: &str, text: &str, other: &str) -> Self {
        let range = self.section(section).1;
        let found = self
            .slice(range.clone())
            .windows(text.len())
            .position(|part| part == text.as_bytes());
        let at = found.unwrap_or_else(|| panic!("no {text} in {section}"));
        self.put(range.start + at, other.as_bytes())
    }

    /// Replaces each byte of a section.
    #[must_use]
    pub fn each(mut self, section: &str, alter: impl Fn(u8) -> u8) -> Self {
        let range = self.section(section).1;
        let slot = self.bytes.get_mut(range).expect("within the file");
        slot.iter_mut().for_each(|byte| *byte = alter(*byte));
        self
    }

    /// Alters the word at an offset of the file.
    #[must_use]
    pub fn word(self, at: usize, alter: impl Fn(u64) -> u64) -> Self {
        let word = u64::from_le_bytes(self.slice(at..at + 8).try_into().expect("eight bytes"));
        self.put(at, &alter(word).to_le_bytes())
    }

    /// Writes at an offset of the file.
    #[must_use]
    pub fn put(mut self, at: usize, bytes: &[u8]) -> Self {
        let slot = self.bytes.get_mut(at..at + bytes.len()).expect("within the file");
        slot.copy_from_slice(bytes);
        self
    }

    /// Offset of a section's header, of the section's bytes, and of their end.
    pub fn section(&self, name: &str) -> (usize, Range<usize>) {
        let header = FileHeader64::<LittleEndian>::parse(&*self.bytes).expect("an ELF file");
        let table = header.sections(LE, &*self.bytes).expect("with sections");
        let (index, found) = table
            .section_by_name(LE, name.as_bytes())
            .unwrap_or_else(|| panic!("no section {name}"));
        let start = usize::try_from(header.e_shoff(LE)).expect("a 64-bit host");
        let (offset, size) = found.file_range(LE).unwrap_or_default();
        let (offset, size) = (usize::try_from(offset), usize::try_from(size));
        let offset = offset.expect("a 64-bit host");
        (
            start + index.0 * HEADER_BYTES,
            offset..offset + size.expect("a 64-bit host"),
        )
    }

    fn slice(&self, range: Range<usize>) -> &[u8] {
        self.bytes.get(range).expect("within the file")
    }
}
