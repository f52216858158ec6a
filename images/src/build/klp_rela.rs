//! Marks the relocations of a linked module that only the livepatch loader can resolve.
//!
//! The format (Documentation/livepatch/module-elf-format.rst, Linux 4.7): an undefined symbol named
//! `.klp.sym.OBJECT.NAME,POSITION` gets the section index `SHN_LIVEPATCH`, and the relocations of a section that use such
//! symbols stand in a section of their own, `.klp.rela.OBJECT.SECTION`, with the flag `SHF_RELA_LIVEPATCH`. Compiler and
//! linker know neither; kpatch-build makes both afterwards, as is done here.

use std::fs;
use std::path::Path;

use object::build::elf::{Builder, Relocation, SectionData, SectionId, SymbolId};
use object::elf::{SHF_ALLOC, SHF_INFO_LINK, SectionFlags, SymbolSection};

use super::Error;
use crate::cache;

/// `SHN_LIVEPATCH` (include/uapi/linux/elf.h).
const SHN_LIVEPATCH: u16 = 0xff20;
/// `SHF_RELA_LIVEPATCH` (include/uapi/linux/elf.h).
const SHF_RELA_LIVEPATCH: u64 = 0x0010_0000;
const SYMBOL_PREFIX: &str = ".klp.sym.";
/// What sources write in front of the position: older assemblers take no comma in a name.
const BEFORE_POSITION: char = '$';

/// Names what [`mark`] does to a module; changed whenever that changes, so that kept modules are made anew.
pub(super) const RULES: &str = "klp-rela 2";

/// Rewrites the module in place, if it has such symbols.
pub(super) fn mark(path: &Path) -> Result<(), Error> {
    let bytes = fs::read(path).map_err(cache::Error::io("read", path))?;
    let wrong = |what: String| Error::Relocations {
        path: path.to_owned(),
        what,
    };
    if let Some(marked) = marked(&bytes).map_err(wrong)? {
        fs::write(path, marked).map_err(cache::Error::io("write", path))?;
    }
    Ok(())
}

/// The module with its livepatch relocations marked, or nothing where it has none.
fn marked(bytes: &[u8]) -> Result<Option<Vec<u8>>, String> {
    let mut builder = Builder::read(bytes).map_err(|error| error.to_string())?;
    let objects = mark_symbols(&mut builder)?;
    if objects.is_empty() {
        return Ok(None);
    }
    for moved in take_relocations(&mut builder, &objects) {
        add_section(&mut builder, moved)?;
    }
    let mut out = Vec::new();
    builder.write(&mut out).map_err(|error| error.to_string())?;
    Ok(Some(out))
}

/// Gives the symbols their section index; returns each with the object that it is in.
fn mark_symbols(builder: &mut Builder<'_>) -> Result<Vec<(SymbolId, String)>, String> {
    let mut objects = Vec::new();
    for symbol in &mut builder.symbols {
        let name = String::from_utf8_lossy(&symbol.name).into_owned();
        let Some(rest) = name.strip_prefix(SYMBOL_PREFIX) else {
            continue;
        };
        let (object, symbol_name) = rest.split_once('.').ok_or(format!("{name} names no symbol"))?;
        let parts = symbol_name.rsplit_once(BEFORE_POSITION);
        let Some((symbol_name, position)) = parts.filter(|(_, position)| position.parse::<u32>().is_ok()) else {
            return Err(format!("{name} has no position"));
        };
        symbol.name = format!("{SYMBOL_PREFIX}{object}.{symbol_name},{position}")
            .into_bytes()
            .into();
        symbol.st_shndx = SymbolSection(SHN_LIVEPATCH);
        objects.push((symbol.id(), object.to_owned()));
    }
    Ok(objects)
}

/// The relocations of one section that refer to one object.
struct Moved {
    target: SectionId,
    object: String,
    relocations: Vec<Relocation>,
}

/// Takes the relocations of such symbols out of their sections.
fn take_relocations(builder: &mut Builder<'_>, objects: &[(SymbolId, String)]) -> Vec<Moved> {
    let mut moved: Vec<Moved> = Vec::new();
    for section in &mut builder.sections {
        let target = section.sh_info_section;
        let (SectionData::Relocation(relocations), Some(target)) = (&mut section.data, target) else {
            continue;
        };
        for (id, object) in objects {
            let taken = |relocation: &mut Relocation| relocation.symbol == Some(*id);
            let taken: Vec<Relocation> = relocations.extract_if(.., taken).collect();
            match moved
                .iter_mut()
                .find(|moved| moved.target == target && moved.object == *object)
            {
                Some(moved) => moved.relocations.extend(taken),
                None if taken.is_empty() => {}
                None => moved.push(Moved {
                    target,
                    object: object.clone(),
                    relocations: taken,
                }),
            }
        }
    }
    moved
}

fn add_section(builder: &mut Builder<'_>, moved: Moved) -> Result<(), String> {
    let target = builder.sections.get(moved.target).name.clone();
    let name = format!(".klp.rela.{}.{}", moved.object, String::from_utf8_lossy(&target));
    let is_symbols = |data: &SectionData<'_>| matches!(data, SectionData::Symbol);
    let symbols = builder.sections.iter().find(|section| is_symbols(&section.data));
    let symbols = symbols.ok_or("it has no symbol table")?.id();
    let section = builder.sections.add();
    section.name = name.into_bytes().into();
    section.sh_type = object::elf::SHT_RELA;
    section.sh_flags = SHF_ALLOC | SHF_INFO_LINK | SectionFlags(SHF_RELA_LIVEPATCH);
    section.sh_link_section = Some(symbols);
    section.sh_info_section = Some(moved.target);
    section.sh_addralign = 8;
    section.sh_entsize = 24;
    section.data = SectionData::Relocation(moved.relocations);
    Ok(())
}

#[cfg(test)]
mod tests {
    use object::Object as _;
    use object::elf::Rela64;
    use object::read::elf::{Rela as _, SectionHeader as _, Sym as _};

    use super::*;
    use crate::command;

    type ElfFile64<'data> = object::read::elf::ElfFile64<'data>;

    /// What the real compiler makes of a declaration with [`livepatch.h`](../../modules/livepatch.h)'s names.
    fn compiled(test: &str, source: &str) -> Vec<u8> {
        let folder = std::env::temp_dir().join(format!("vmpatch-klp-rela-{}-{test}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join("x.c"), source).unwrap();
        let args = ["-O1", "-mcmodel=kernel", "-fno-pic", "-c", "-o", "x.o", "x.c"];
        command::output("gcc-12", &args, &folder).unwrap();
        let bytes = fs::read(folder.join("x.o")).unwrap();
        fs::remove_dir_all(&folder).unwrap();
        bytes
    }

    /// The relocations' symbols of the section `name`, with the symbols' section indices, and the section's flags.
    fn relocated(file: &ElfFile64, name: &str) -> (Vec<(String, u16)>, u64) {
        let endian = file.endian();
        let section = file.section_by_name(name).unwrap().elf_section_header();
        let (relocations, _) = section.rela(endian, file.data()).unwrap().unwrap();
        let symbol = |relocation: &Rela64<_>| {
            let symbols = file.elf_symbol_table();
            let symbol = symbols.symbol(relocation.symbol(endian, false).unwrap()).unwrap();
            let name = symbol.name(endian, symbols.strings()).unwrap();
            (String::from_utf8_lossy(name).into_owned(), symbol.st_shndx(endian).0)
        };
        (relocations.iter().map(symbol).collect(), section.sh_flags(endian).0)
    }

    #[test]
    fn only_relocations_of_livepatch_symbols_move_and_still_name_them() {
        let bytes = compiled(
            "moves",
            "extern int a __asm__(\".klp.sym.vmlinux.nr_threads$0\"); extern int b; int f(void) { return a + b; }",
        );
        let marked = marked(&bytes).unwrap().unwrap();
        let file = ElfFile64::parse(&*marked).unwrap();
        let (stayed, _) = relocated(&file, ".rela.text");
        assert_eq!(stayed, [("b".to_owned(), 0)]);
        let (moved, flags) = relocated(&file, ".klp.rela.vmlinux..text");
        assert_eq!(moved, [(".klp.sym.vmlinux.nr_threads,0".to_owned(), 0xff20)]);
        assert_eq!(flags, 0x0010_0042);
    }

    #[test]
    fn a_module_without_such_symbols_stays_as_it_is() {
        let bytes = compiled("stays", "extern int b; int f(void) { return b; }");
        assert_eq!(marked(&bytes), Ok(None));
    }

    #[test]
    fn a_symbol_without_position_is_refused() {
        let source = "extern int a __asm__(\".klp.sym.vmlinux.x\"); int f(void) { return a; }";
        let refused = marked(&compiled("refused", source));
        assert_eq!(refused, Err(".klp.sym.vmlinux.x has no position".to_owned()));
    }
}
