//! Errors of parsing a module file.

/// Why [`PatchModule::parse`](super::PatchModule::parse) refused a file.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ModuleError {
    /// The file is no ELF file.
    #[error("not an ELF file: it begins with {found:02x?}, expected [7f, 45, 4c, 46]")]
    NotElf {
        /// Its first bytes, at most four.
        found: Vec<u8>,
    },
    /// A part of the file would end behind the end of the file.
    #[error("the file is truncated: {what} ends at byte {end}, the file at byte {len}")]
    Truncated {
        /// What is cut off.
        what: String,
        /// Where it should end, in bytes from the file's start.
        end: u64,
        /// Bytes in the file.
        len: usize,
    },
    /// The file was made for another machine.
    #[error("not an x86-64 module: {found}, expected ELF class 2, byte order 1, machine 62")]
    OtherArchitecture {
        /// The machine in the header.
        found: String,
    },
    /// The file is an executable, a shared library or a core dump.
    #[error("not a kernel module: ELF file type {found}, expected 1 (relocatable)")]
    NotRelocatable {
        /// `e_type`.
        found: u16,
    },
    /// The ELF structure contradicts itself.
    #[error("cannot read {what}: {cause}")]
    Elf {
        /// What was being read.
        what: String,
        /// What is wrong with it.
        cause: String,
    },
    /// The file has more of something than any real module.
    #[error("{found} {what}, at most {max} are taken")]
    TooMany {
        /// Of what.
        what: &'static str,
        /// How many there are.
        found: usize,
        /// The limit.
        max: usize,
    },
    /// The kernel's loader could not compare the module's checksums of types.
    #[error("{section}+{at:#x}: {problem}")]
    Versions {
        /// The section.
        section: &'static str,
        /// Bytes from its start.
        at: usize,
        /// What is wrong there.
        problem: &'static str,
    },
    /// A name is not text.
    #[error("the name of {of} is not UTF-8: {found}")]
    Name {
        /// What it names.
        of: &'static str,
        /// The name, escaped.
        found: String,
    },
    /// A symbol is in a section that does not exist.
    #[error("symbol {symbol} is in section {found}, the file has {sections}")]
    SymbolSection {
        /// The symbol's name.
        symbol: String,
        /// Its section index.
        found: usize,
        /// Number of sections.
        sections: usize,
    },
    /// The name of a livepatch symbol does not have the form `.klp.sym.OBJECT.NAME,SYMPOS`.
    #[error("livepatch symbol {symbol} is not of the form .klp.sym.OBJECT.NAME,SYMPOS")]
    KlpSymbolName {
        /// The symbol's name.
        symbol: String,
    },
    /// A symbol with a livepatch symbol's name has another section index than SHN_LIVEPATCH (0xff20). `ld -r` does this to a module
    /// whose livepatch symbols are there already.
    #[error(
        "livepatch symbol {symbol} has section index {found:#x}, expected SHN_LIVEPATCH (0xff20): \
         was the module linked once more after it was made?"
    )]
    KlpSymbolIndex {
        /// The symbol's name.
        symbol: String,
        /// Its section index.
        found: u16,
    },
    /// A livepatch relocation refers to a symbol that is no livepatch symbol.
    #[error(
        "the livepatch relocation of offset {offset:#x} in {section} refers to {symbol:?}, which is no livepatch symbol"
    )]
    KlpRelocation {
        /// The section of the relocation.
        section: String,
        /// The offset that it relocates, in bytes from the start of the relocated section.
        offset: u64,
        /// The symbol's name.
        symbol: String,
    },
    /// A section of relocations has a type that a module loader does not read: what it relocates would be left as it is.
    #[error("section {section} holds relocations and has type {found:#x}, expected SHT_RELA (4)")]
    RelocationType {
        /// The section's name.
        section: String,
        /// Its type (`sh_type`).
        found: u32,
    },
    /// The file has relocations without addends, which x86-64 does not use.
    #[error("section {section} holds relocations of type SHT_REL, expected SHT_RELA")]
    RelSection {
        /// The section's name.
        section: String,
    },
    /// Relocations refer to another symbol table.
    #[error("the relocations in {section} refer to symbol table {found}, expected {expected}")]
    SymbolTable {
        /// The relocation section's name.
        section: String,
        /// Its `sh_link`.
        found: usize,
        /// The module's symbol table.
        expected: usize,
    },
    /// A relocation refers to a symbol that does not exist.
    #[error("the relocation at {section}+{offset:#x} refers to symbol {found}, the file has {symbols}")]
    RelocationSymbol {
        /// The section that it changes.
        section: String,
        /// Where, in bytes.
        offset: u64,
        /// Symbol index.
        found: usize,
        /// Number of symbols.
        symbols: usize,
    },
    /// The file has no `.modinfo`, or one without an entry that every module has.
    #[error("not a kernel module: .modinfo has no {key}= entry")]
    NoModinfo {
        /// The entry looked for.
        key: &'static str,
    },
    /// An entry of `.modinfo` is not text.
    #[error("the .modinfo entry at byte {at} is not UTF-8 text")]
    ModinfoText {
        /// Bytes from the section's start.
        at: usize,
    },
    /// The module is no livepatch module.
    #[error("{name} is not a livepatch module: .modinfo has no livepatch= entry")]
    NotLivepatch {
        /// The module's name.
        name: String,
    },
}

impl ModuleError {
    pub(crate) fn elf(what: &str, cause: object::Error) -> Self {
        Self::Elf {
            what: what.into(),
            cause: cause.to_string(),
        }
    }
}
