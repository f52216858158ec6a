//! Reading an object file.

use std::collections::{BTreeMap, BTreeSet};

use object::LittleEndian as LE;
use object::elf::{self, FileHeader64, SectionHeader64, Sym64};
use object::read::elf::{FileHeader as _, Rela as _, SectionHeader as _, SectionTable, Sym as _, SymbolTable};
use object::read::{SectionIndex, SymbolIndex};

use crate::assembler::LOCALS;

use super::{At, Object, Place, Relocation, SHN_LIVEPATCH, Section, Symbol};

type Header = FileHeader64<LE>;

/// Why an object file could not be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ElfError {
    /// Its parts do not fit together.
    #[error("the object file's {what}: {cause}")]
    Damaged {
        /// What was being read.
        what: String,
        /// What is wrong with it.
        cause: String,
    },
    /// Not a file that a linker would take.
    #[error("not a relocatable object file for x86-64: ELF type {kind}, machine {machine}")]
    Other {
        /// `e_type`.
        kind: u16,
        /// `e_machine`.
        machine: u16,
    },
}

fn damaged(what: &str) -> impl Fn(object::read::Error) -> ElfError {
    move |cause| ElfError::Damaged {
        what: what.to_owned(),
        cause: cause.to_string(),
    }
}

impl Object {
    /// Reads an object file.
    ///
    /// Errors: see [`ElfError`].
    pub fn parse(bytes: &[u8]) -> Result<Self, ElfError> {
        let header = Header::parse(bytes).map_err(damaged("header"))?;
        if header.e_machine(LE) != elf::EM_X86_64 || header.e_type(LE) != elf::ET_REL {
            return Err(ElfError::Other {
                kind: header.e_type(LE).0,
                machine: header.e_machine(LE).0,
            });
        }
        let table = header.sections(LE, bytes).map_err(damaged("section headers"))?;
        let symbols = table.symbols(LE, bytes, elf::SHT_SYMTAB).map_err(damaged("symbols"))?;
        let mut sections = Vec::with_capacity(table.len());
        for raw in table.iter() {
            sections.push(section(bytes, &table, raw)?);
        }
        for raw in table.iter() {
            let Some((relas, _)) = raw.rela(LE, bytes).map_err(damaged("relocations"))? else {
                continue;
            };
            let target = raw.info_link(LE).0;
            let Some(target) = sections.get_mut(target) else {
                continue;
            };
            target.relocations.extend(relas.iter().map(|rela| Relocation {
                offset: rela.r_offset(LE),
                kind: rela.r_type(LE, false).0,
                symbol: rela.symbol(LE, false).map_or(0, |symbol| symbol.0),
                addend: rela.r_addend(LE),
            }));
        }
        for section in &mut sections {
            section.relocations.sort_by_key(|relocation| relocation.offset);
        }
        let mut object = Self {
            sections,
            symbols: Vec::with_capacity(symbols.len()),
            resolved_with: BTreeMap::new(),
        };
        for (index, raw) in symbols.iter().enumerate() {
            let symbol = symbol(&symbols, SymbolIndex(index), raw, &object.sections)?;
            object.symbols.push(symbol);
        }
        object.restore_locals();
        Ok(object)
    }
}

impl Object {
    /// Makes those symbols local again that are global only for the assembler to keep their names.
    fn restore_locals(&mut self) {
        let Some((_, listed)) = self.section_named(LOCALS) else {
            return;
        };
        let names: BTreeSet<Vec<u8>> = listed.data.split(|byte| *byte == 0).map(<[u8]>::to_vec).collect();
        let is_listed = |symbol: &&mut Symbol| names.contains(symbol.name.as_bytes());
        for symbol in self.symbols.iter_mut().filter(is_listed) {
            symbol.binding = elf::STB_LOCAL.0;
        }
    }
}

fn section(bytes: &[u8], table: &SectionTable<'_, Header>, raw: &SectionHeader64<LE>) -> Result<Section, ElfError> {
    let name = table.section_name(LE, raw).map_err(damaged("section names"))?;
    let name = String::from_utf8_lossy(name).into_owned();
    // What only describes the file is not carried along: symbols, strings and relocations are read into their own.
    let kind = raw.sh_type(LE);
    let own = [
        elf::SHT_SYMTAB,
        elf::SHT_STRTAB,
        elf::SHT_RELA,
        elf::SHT_NULL,
        elf::SHT_SYMTAB_SHNDX,
    ];
    if own.contains(&kind) {
        return Ok(Section {
            name,
            ..Section::default()
        });
    }
    let data = raw.data(LE, bytes).map_err(damaged(&format!("section {name}")))?;
    Ok(Section {
        name,
        kind: kind.0,
        flags: raw.sh_flags(LE).0,
        align: raw.sh_addralign(LE).max(1),
        entry_size: raw.sh_entsize(LE),
        size: raw.sh_size(LE),
        data: data.to_vec(),
        relocations: Vec::new(),
    })
}

fn symbol(
    table: &SymbolTable<'_, Header>,
    index: SymbolIndex,
    raw: &Sym64<LE>,
    sections: &[Section],
) -> Result<Symbol, ElfError> {
    let name = table.symbol_name(LE, raw).map_err(damaged("symbol names"))?;
    let name = String::from_utf8_lossy(name).into_owned();
    let section = table
        .symbol_section(LE, raw, index)
        .map_err(damaged("symbols' sections"))?;
    let place = match section {
        Some(SectionIndex(section)) if section < sections.len() => Place::In(At {
            section,
            offset: raw.st_value(LE),
        }),
        Some(SectionIndex(section)) => {
            return Err(ElfError::Damaged {
                what: format!("symbol {name}"),
                cause: format!("section {section} of {}", sections.len()),
            });
        }
        None => match raw.st_shndx(LE) {
            elf::SHN_ABS => Place::Absolute(raw.st_value(LE)),
            elf::SHN_COMMON => Place::Common,
            other if other.0 == SHN_LIVEPATCH => Place::Livepatch,
            _ => Place::Undefined,
        },
    };
    Ok(Symbol {
        name,
        place,
        size: raw.st_size(LE),
        kind: raw.st_type().0,
        binding: raw.st_bind().0,
    })
}
