//! The ELF file as far as a module loader reads it: sections that are loaded, their relocations, and symbols.
//!
//! Format: System V ABI, x86-64 supplement. The two additions of livepatch modules (`SHN_LIVEPATCH` symbols,
//! `.klp.rela.*` sections) are in the kernel's Documentation/livepatch/module-elf-format.rst.

use super::ModuleError;
use super::sections::{Relocation, Section, SectionId, SectionOffset, Symbol, SymbolId, SymbolPlace};
use object::LittleEndian;
use object::elf::{self, FileHeader64, Rela64, SectionHeader64, Sym64};
use object::read::elf::{FileHeader, Rela, SectionHeader, SectionTable, Sym, SymbolTable};
use object::read::{SectionIndex, SymbolIndex};

/// Largest module file that is read, in bytes: kernel modules with full debug information stay well below.
const FILE_BYTES_MAX: usize = 64 << 20;
/// Most sections: `-ffunction-sections` gives two a function.
const SECTIONS_MAX: usize = 20_000;
/// Most symbols.
const SYMBOLS_MAX: usize = 200_000;
/// Most relocations of loaded sections, all together.
const RELOCATIONS_MAX: usize = 400_000;
/// Longest name of a section or symbol, in bytes: `KSYM_NAME_LEN` is 512, and `.klp.sym.` names carry an object too.
const NAME_BYTES_MAX: usize = 1024;
/// Section index of a symbol that the livepatch core resolves (include/uapi/linux/elf.h).
const SHN_LIVEPATCH: u16 = 0xff20;
/// What the names of livepatch symbols begin with.
const KLP_SYMBOL: &str = ".klp.sym.";
/// What the names of sections with livepatch relocations begin with.
const KLP_RELOCATIONS: &str = ".klp.rela.";
/// Flag of such a section (include/uapi/linux/elf.h).
const SHF_RELA_LIVEPATCH: u64 = 0x10_0000;
/// Types of relocation sections that the kernel's loader passes over, as it does every type but REL and RELA: `SHT_RELR` of the System V
/// ABI, and `SHT_CREL` as LLVM writes it.
const OTHER_RELOCATIONS: [u32; 2] = [19, 0x4000_0014];

const LE: LittleEndian = LittleEndian;
type Header = FileHeader64<LittleEndian>;

/// What is read of the file.
#[derive(Debug)]
pub(crate) struct Elf<'d> {
    pub sections: Vec<Section<'d>>,
    pub symbols: Vec<Symbol<'d>>,
    /// Where the sized function symbols are, in ascending order of place.
    functions: Vec<(SectionOffset, SymbolId)>,
}

impl<'d> Elf<'d> {
    /// Reads headers, symbols and relocations. Section bytes stay where they are.
    pub fn parse(bytes: &'d [u8]) -> Result<Self, ModuleError> {
        let header = header(bytes)?;
        let table = header
            .sections(LE, bytes)
            .map_err(|e| ModuleError::elf("section headers", e))?;
        at_most("sections", table.len(), SECTIONS_MAX)?;
        let mut sections = Vec::with_capacity(table.len());
        for raw in table.iter() {
            sections.push(section(bytes, &table, raw)?);
        }
        let raw_symbols = table
            .symbols(LE, bytes, elf::SHT_SYMTAB)
            .map_err(|e| ModuleError::elf("the symbol table", e))?;
        at_most("symbols", raw_symbols.len(), SYMBOLS_MAX)?;
        let mut symbols = Vec::with_capacity(raw_symbols.len());
        for (index, raw) in raw_symbols.iter().enumerate() {
            symbols.push(symbol(&raw_symbols, SymbolIndex(index), raw, sections.len())?);
        }
        relocations(bytes, &table, raw_symbols.section(), &mut sections, &symbols)?;
        let functions = functions(&symbols);
        Ok(Self {
            sections,
            symbols,
            functions,
        })
    }

    /// The function symbol at `at`; where there are several, the first.
    pub fn function_at(&self, at: SectionOffset) -> Option<&Symbol<'d>> {
        let index = self.functions.partition_point(|(place, _)| *place < at);
        let (_, id) = self.functions.get(index).filter(|(place, _)| *place == at)?;
        self.symbols.get(id.0)
    }
}

/// Checks what kind of file it is, with an error of its own for each way to be the wrong one.
fn header(bytes: &[u8]) -> Result<&Header, ModuleError> {
    if bytes.len() > FILE_BYTES_MAX {
        return Err(ModuleError::TooMany {
            what: "bytes in the file",
            found: bytes.len(),
            max: FILE_BYTES_MAX,
        });
    }
    let magic = bytes.get(..4).unwrap_or(bytes);
    if magic != elf::ELFMAG {
        return Err(ModuleError::NotElf { found: magic.to_vec() });
    }
    if bytes.len() < size_of::<Header>() {
        return Err(ModuleError::Truncated {
            what: "the ELF header".into(),
            end: size_of::<Header>() as u64,
            len: bytes.len(),
        });
    }
    // Class and byte order decide how the rest is read, so they come before everything else.
    let (class, order) = (bytes.get(4).copied(), bytes.get(5).copied());
    if class != Some(elf::ELFCLASS64.0) || order != Some(elf::ELFDATA2LSB.0) {
        return Err(ModuleError::OtherArchitecture {
            found: format!(
                "ELF class {}, byte order {}",
                class.unwrap_or_default(),
                order.unwrap_or_default()
            ),
        });
    }
    let header = Header::parse(bytes).map_err(|e| ModuleError::elf("the ELF header", e))?;
    let machine = header.e_machine(LE);
    if machine != elf::EM_X86_64 {
        return Err(ModuleError::OtherArchitecture {
            found: format!("ELF machine {}", machine.0),
        });
    }
    if header.e_type(LE) != elf::ET_REL {
        return Err(ModuleError::NotRelocatable {
            found: header.e_type(LE).0,
        });
    }
    let table = u64::from(header.e_shnum.get(LE)) * u64::from(header.e_shentsize.get(LE));
    let end = header.e_shoff.get(LE).saturating_add(table);
    if end > bytes.len() as u64 {
        return Err(ModuleError::Truncated {
            what: "the section headers".into(),
            end,
            len: bytes.len(),
        });
    }
    Ok(header)
}

fn section<'d>(
    bytes: &'d [u8],
    table: &SectionTable<'d, Header>,
    raw: &'d SectionHeader64<LittleEndian>,
) -> Result<Section<'d>, ModuleError> {
    let name = table
        .section_name(LE, raw)
        .map_err(|e| ModuleError::elf("a section's name", e))?;
    let name = name_text("a section", name)?;
    let (kind, flags) = (raw.sh_type(LE), raw.sh_flags(LE));
    let (offset, size) = (raw.sh_offset.get(LE), raw.sh_size.get(LE));
    let in_file = kind != elf::SHT_NOBITS && kind != elf::SHT_NULL;
    let end = offset.saturating_add(size);
    if in_file && end > bytes.len() as u64 {
        return Err(ModuleError::Truncated {
            what: format!("section {name}"),
            end,
            len: bytes.len(),
        });
    }
    let is_read = flags.0 & elf::SHF_ALLOC.0 != 0 || name == super::BASE_TYPES;
    let data = if in_file && is_read {
        raw.data(LE, bytes)
            .map_err(|e| ModuleError::elf(&format!("section {name}"), e))?
    } else {
        &[]
    };
    // Zero and one both mean "anywhere" (System V ABI, sh_addralign).
    let align = raw.sh_addralign.get(LE).max(1);
    Ok(Section {
        name,
        kind: kind.0,
        flags: flags.0,
        size,
        align,
        data,
        relocations: Vec::new(),
    })
}

fn symbol<'d>(
    table: &SymbolTable<'d, Header>,
    index: SymbolIndex,
    raw: &Sym64<LittleEndian>,
    sections: usize,
) -> Result<Symbol<'d>, ModuleError> {
    let name = table
        .symbol_name(LE, raw)
        .map_err(|e| ModuleError::elf("a symbol's name", e))?;
    let name = name_text("a symbol", name)?;
    let value = raw.st_value(LE);
    let shndx = raw.st_shndx(LE);
    let defined_in = table
        .symbol_section(LE, raw, index)
        .map_err(|e| ModuleError::elf(&format!("symbol {name}"), e))?;
    if name.starts_with(KLP_SYMBOL) && shndx.0 != SHN_LIVEPATCH {
        return Err(ModuleError::KlpSymbolIndex {
            symbol: name.into(),
            found: shndx.0,
        });
    }
    let place = match defined_in {
        // Symbol 0 means "no symbol": its value is zero.
        _ if index.0 == 0 => SymbolPlace::Absolute(0),
        Some(SectionIndex(section)) if section < sections => SymbolPlace::Defined(SectionOffset {
            section: SectionId(section),
            offset: value,
        }),
        Some(SectionIndex(section)) => {
            return Err(ModuleError::SymbolSection {
                symbol: name.into(),
                found: section,
                sections,
            });
        }
        None if shndx == elf::SHN_UNDEF => SymbolPlace::Undefined {
            weak: raw.st_bind() == elf::STB_WEAK,
        },
        None if shndx == elf::SHN_ABS => SymbolPlace::Absolute(value),
        None if shndx == elf::SHN_COMMON => SymbolPlace::Common,
        None if shndx.0 == SHN_LIVEPATCH => {
            match name.strip_prefix(KLP_SYMBOL) {
                Some(_) => klp_symbol(name).ok_or_else(|| ModuleError::KlpSymbolName { symbol: name.into() })?,
                // What klp-build leaves of a symbol whose relocations it has made livepatch ones: a name without use
                // (`.klp.tombstone.…`, tools/objtool/klp-post-link.c of 7.2).
                None => SymbolPlace::Unknown(SHN_LIVEPATCH),
            }
        }
        None => SymbolPlace::Unknown(shndx.0),
    };
    Ok(Symbol {
        name,
        place,
        size: raw.st_size(LE),
        is_function: raw.st_type() == elf::STT_FUNC,
    })
}

fn functions(symbols: &[Symbol<'_>]) -> Vec<(SectionOffset, SymbolId)> {
    let sized = symbols.iter().enumerate().filter(|(_, s)| s.is_function && s.size > 0);
    let mut functions: Vec<_> = sized
        .filter_map(|(index, symbol)| match symbol.place {
            SymbolPlace::Defined(at) => Some((at, SymbolId(index))),
            _ => None,
        })
        .collect();
    functions.sort_unstable();
    functions
}

/// Splits `.klp.sym.OBJECT.NAME,SYMPOS`. The object has no dot, the name may (`foo.isra.0`).
fn klp_symbol(name: &str) -> Option<SymbolPlace<'_>> {
    let (object, rest) = name.strip_prefix(KLP_SYMBOL)?.split_once('.')?;
    let (name, sympos) = rest.split_once(',')?;
    let sympos = sympos.parse().ok()?;
    (!object.is_empty() && !name.is_empty()).then_some(SymbolPlace::Livepatch { object, name, sympos })
}

/// Gives every loaded section its relocations, those of `.klp.rela.*` among them.
fn relocations<'d>(
    bytes: &'d [u8],
    table: &SectionTable<'d, Header>,
    symbol_table: SectionIndex,
    sections: &mut [Section<'d>],
    symbols: &[Symbol<'d>],
) -> Result<(), ModuleError> {
    let mut total: usize = 0;
    for (index, raw) in table.iter().enumerate() {
        let kind = raw.sh_type(LE);
        let target = raw.sh_info(LE) as usize;
        let name = sections.get(index).map_or("", |s| s.name);
        let is_livepatch = name.starts_with(KLP_RELOCATIONS) || raw.sh_flags(LE).0 & SHF_RELA_LIVEPATCH != 0;
        if kind != elf::SHT_RELA && kind != elf::SHT_REL {
            if is_livepatch || OTHER_RELOCATIONS.contains(&kind.0) {
                return Err(ModuleError::RelocationType {
                    section: name.into(),
                    found: kind.0,
                });
            }
            continue;
        }
        let Some(section) = sections.get_mut(target).filter(|s| s.is_loaded()) else {
            // Debug information and the like: the kernel does not load it, so neither its relocations.
            continue;
        };
        let Some((relas, link)) = raw.rela(LE, bytes).map_err(|e| ModuleError::elf(name, e))? else {
            return Err(ModuleError::RelSection { section: name.into() });
        };
        if link != symbol_table {
            return Err(ModuleError::SymbolTable {
                section: name.into(),
                found: link.0,
                expected: symbol_table.0,
            });
        }
        total = total.saturating_add(relas.len());
        at_most("relocations", total, RELOCATIONS_MAX)?;
        for rela in relas {
            let relocation = relocation(rela);
            let Some(symbol) = symbols.get(relocation.symbol.0) else {
                return Err(ModuleError::RelocationSymbol {
                    section: section.name.into(),
                    offset: relocation.offset,
                    found: relocation.symbol.0,
                    symbols: symbols.len(),
                });
            };
            // As the kernel does (kernel/livepatch/core.c, `klp_resolve_symbols`).
            if is_livepatch && !matches!(symbol.place, SymbolPlace::Livepatch { .. }) {
                return Err(ModuleError::KlpRelocation {
                    section: name.into(),
                    offset: relocation.offset,
                    symbol: symbol.name.into(),
                });
            }
            section.relocations.push(relocation);
        }
    }
    for section in sections {
        section.relocations.sort_by_key(|r| r.offset);
    }
    Ok(())
}

fn relocation(rela: &Rela64<LittleEndian>) -> Relocation {
    Relocation {
        offset: rela.r_offset(LE),
        kind: rela.r_type(LE, false).0,
        symbol: SymbolId(rela.r_sym(LE, false) as usize),
        addend: rela.r_addend(LE),
    }
}

fn name_text<'d>(of: &'static str, name: &'d [u8]) -> Result<&'d str, ModuleError> {
    if name.len() > NAME_BYTES_MAX {
        return Err(ModuleError::TooMany {
            what: "bytes in a name",
            found: name.len(),
            max: NAME_BYTES_MAX,
        });
    }
    std::str::from_utf8(name).map_err(|_| ModuleError::Name {
        of,
        found: name.escape_ascii().to_string(),
    })
}

fn at_most(what: &'static str, found: usize, max: usize) -> Result<(), ModuleError> {
    if found > max {
        Err(ModuleError::TooMany { what, found, max })
    } else {
        Ok(())
    }
}
