//! Writing an object file.

use std::collections::BTreeMap;

use object::Endianness;
use object::build::elf::{Builder, Relocation, SectionData, SectionId, SymbolId};
use object::elf::{self, SectionFlags, SectionType, SymbolSection};

use super::{ElfError, Object, Place, SHF_RELA_LIVEPATCH, SHN_LIVEPATCH, Section};

/// Bytes of an ELF relocation with addend.
const RELA_BYTES: u64 = 24;
/// Bytes of an ELF symbol.
const SYMBOL_BYTES: u64 = 24;

/// The bytes of an object file. Relocations that refer to livepatch symbols stand in sections of their own,
/// `.klp.rela.OBJECT.SECTION` (Documentation/livepatch/module-elf-format.rst, Linux 4.7). The same object gives the same bytes.
pub fn write(object: &Object) -> Result<Vec<u8>, ElfError> {
    let wrong = |what: &str| {
        let what = what.to_owned();
        move |cause: object::build::Error| ElfError::Damaged {
            what,
            cause: cause.to_string(),
        }
    };
    let mut builder = Builder::new(Endianness::Little, true);
    builder.header.e_type = elf::ET_REL;
    builder.header.e_machine = elf::EM_X86_64;
    let sections = add_sections(&mut builder, object);
    let symtab = add_tables(&mut builder);
    let symbols = add_symbols(&mut builder, object, &sections);
    for (index, section) in object.sections.iter().enumerate() {
        if let Some(Some(target)) = sections.get(index) {
            for (name, flags, relocations) in relocations(object, section, &symbols) {
                let added = builder.sections.add();
                added.name = name.into_bytes().into();
                added.sh_type = elf::SHT_RELA;
                added.sh_flags = SectionFlags(flags);
                added.sh_link_section = Some(symtab);
                added.sh_info_section = Some(*target);
                added.sh_addralign = 8;
                added.sh_entsize = RELA_BYTES;
                added.data = SectionData::Relocation(relocations);
            }
        }
    }
    let mut out = Vec::new();
    builder.write(&mut out).map_err(wrong("layout"))?;
    Ok(out)
}

fn add_sections(builder: &mut Builder<'_>, object: &Object) -> Vec<Option<SectionId>> {
    let mut ids = Vec::with_capacity(object.sections.len());
    for (index, section) in object.sections.iter().enumerate() {
        if index == 0 {
            ids.push(None);
            continue;
        }
        let added = builder.sections.add();
        added.name = section.name.clone().into_bytes().into();
        added.sh_type = SectionType(section.kind);
        added.sh_flags = SectionFlags(section.flags);
        added.sh_addralign = section.align;
        added.sh_entsize = section.entry_size;
        added.data = if section.kind == elf::SHT_NOBITS.0 {
            SectionData::UninitializedData(section.size)
        } else {
            SectionData::Data(section.data.clone().into())
        };
        ids.push(Some(added.id()));
    }
    ids
}

/// The sections for symbols and names; returns the symbol table's.
fn add_tables(builder: &mut Builder<'_>) -> SectionId {
    let names = [
        (".shstrtab", elf::SHT_STRTAB, SectionData::SectionString),
        (".strtab", elf::SHT_STRTAB, SectionData::String),
    ];
    for (name, kind, data) in names {
        let added = builder.sections.add();
        added.name = name.as_bytes().into();
        added.sh_type = kind;
        added.sh_addralign = 1;
        added.data = data;
    }
    let added = builder.sections.add();
    added.name = b".symtab"[..].into();
    added.sh_type = elf::SHT_SYMTAB;
    added.sh_addralign = 8;
    added.sh_entsize = SYMBOL_BYTES;
    added.data = SectionData::Symbol;
    added.id()
}

fn add_symbols(builder: &mut Builder<'_>, object: &Object, sections: &[Option<SectionId>]) -> Vec<Option<SymbolId>> {
    let mut ids = Vec::with_capacity(object.symbols.len());
    for (index, symbol) in object.symbols.iter().enumerate() {
        if index == 0 {
            ids.push(None);
            continue;
        }
        let added = builder.symbols.add();
        added.name = symbol.name.clone().into_bytes().into();
        added.st_info = elf::SymbolInfo((symbol.binding << 4) | (symbol.kind & 0xf));
        added.st_size = symbol.size;
        match symbol.place {
            Place::In(at) => {
                added.section = sections.get(at.section).copied().flatten();
                added.st_value = at.offset;
            }
            Place::Absolute(value) => {
                added.st_shndx = elf::SHN_ABS;
                added.st_value = value;
            }
            Place::Common => added.st_shndx = elf::SHN_COMMON,
            Place::Livepatch => added.st_shndx = SymbolSection(SHN_LIVEPATCH),
            Place::Undefined => added.st_shndx = elf::SHN_UNDEF,
        }
        ids.push(Some(added.id()));
    }
    ids
}

/// The relocation sections of a section: name, flags and contents.
fn relocations(
    object: &Object,
    section: &Section,
    symbols: &[Option<SymbolId>],
) -> Vec<(String, u64, Vec<Relocation>)> {
    let mut ordinary = Vec::new();
    let mut livepatch: BTreeMap<&str, Vec<Relocation>> = BTreeMap::new();
    for relocation in &section.relocations {
        let made = Relocation {
            r_offset: relocation.offset,
            symbol: symbols.get(relocation.symbol).copied().flatten(),
            r_type: elf::RelocationType(relocation.kind),
            r_addend: relocation.addend,
        };
        let with = object.resolved_with.get(&relocation.symbol).map(String::as_str);
        match with.or_else(|| object.symbol(relocation).and_then(livepatch_object)) {
            Some(of) => livepatch.entry(of).or_default().push(made),
            None => ordinary.push(made),
        }
    }
    let mut sections = Vec::new();
    if !ordinary.is_empty() {
        sections.push((format!(".rela{}", section.name), elf::SHF_INFO_LINK.0, ordinary));
    }
    let flags = elf::SHF_ALLOC.0 | elf::SHF_INFO_LINK.0 | SHF_RELA_LIVEPATCH;
    sections.extend(
        livepatch
            .into_iter()
            .map(|(of, made)| (format!(".klp.rela.{of}.{}", section.name), flags, made)),
    );
    sections
}

/// The object that a livepatch symbol is in: `vmlinux` for `.klp.sym.vmlinux.NAME,0`.
fn livepatch_object(symbol: &super::Symbol) -> Option<&str> {
    if symbol.place != Place::Livepatch {
        return None;
    }
    symbol.name.strip_prefix(".klp.sym.")?.split_once('.').map(|(of, _)| of)
}

#[cfg(test)]
mod tests {
    use super::super::{At, Symbol};
    use super::*;

    fn symbol(name: &str, place: Place, binding: u8) -> Symbol {
        Symbol {
            name: name.to_owned(),
            place,
            size: 0,
            kind: 0,
            binding,
        }
    }

    fn object() -> Object {
        let relocation = |offset, symbol| super::super::Relocation {
            offset,
            kind: elf::R_X86_64_PC32.0,
            symbol,
            addend: -4,
        };
        let text = Section {
            name: ".text".to_owned(),
            kind: elf::SHT_PROGBITS.0,
            flags: (elf::SHF_ALLOC | elf::SHF_EXECINSTR).0,
            align: 16,
            entry_size: 0,
            size: 16,
            data: vec![0x90; 16],
            relocations: vec![relocation(1, 1), relocation(8, 2)],
        };
        let here = Place::In(At { section: 1, offset: 0 });
        Object {
            sections: vec![Section::default(), text],
            symbols: vec![
                symbol("", Place::Undefined, 0),
                symbol(".klp.sym.vmlinux.old,2", Place::Livepatch, elf::STB_GLOBAL.0),
                symbol("exported", Place::Undefined, elf::STB_GLOBAL.0),
                symbol("new", here, elf::STB_LOCAL.0),
            ],
            resolved_with: BTreeMap::new(),
        }
    }

    #[test]
    fn a_livepatch_relocation_gets_a_section_of_its_own() {
        let bytes = write(&object()).unwrap();
        let read = Object::parse(&bytes).unwrap();
        let names: Vec<&str> = read.sections.iter().map(|section| section.name.as_str()).collect();
        assert!(names.contains(&".klp.rela.vmlinux..text"), "{names:?}");
        let (_, text) = read.section_named(".text").unwrap();
        let named: Vec<_> = text
            .relocations
            .iter()
            .map(|relocation| (relocation.offset, read.symbol(relocation).unwrap().name.as_str()))
            .collect();
        assert_eq!(named, [(1, ".klp.sym.vmlinux.old,2"), (8, "exported")]);
    }

    #[test]
    fn the_same_object_gives_the_same_bytes() {
        assert_eq!(write(&object()).unwrap(), write(&object()).unwrap());
    }
}
