//! The modules that the guest has loaded: their names, symbols and exports.
//!
//! `modules` → `struct module` (include/linux/module.h); symbols in `module.kallsyms`, a `struct mod_kallsyms` since 4.5:
//! ELF symbols, names, and since 5.2 a type letter for each.

use super::exports::{self, Export};
use super::list::Walker;
use super::{KernelError, Live};
use crate::addr::Gva;
use crate::memory::VirtMemory;
use crate::text::plain;

/// `MODULE_NAME_LEN`: 56 on 64-bit kernels up to 6.x.
const NAME_BYTES_MAX: usize = 64;
/// Longest symbol name (`KSYM_NAME_LEN`).
const SYMBOL_BYTES_MAX: usize = 512;
/// Most symbols of a module that are read.
const SYMBOLS_MAX: u64 = 1 << 18;
/// Most bytes of symbol names of a module that are read.
const STRINGS_BYTES_MAX: u64 = 4 << 20;
/// Bytes of an `Elf64_Sym`: name 4, info, other, section 2, value 8, size 8.
const ELF_SYMBOL_BYTES: usize = 24;
/// `SHN_UNDEF`: the symbol is another module's.
const UNDEFINED: u16 = 0;
/// `MOD_MEM_NUM_TYPES` is 7 up to 7.2.
const MEMORIES_MAX: usize = 16;
/// Most exports of a module that are read.
const EXPORTS_MAX: u64 = 1 << 16;

/// A loaded module.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuestModule {
    /// Name of the module.
    pub name: String,
    /// Guest-virtual address of its `struct module`.
    pub at: Gva,
}

/// A symbol of a loaded module.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModuleSymbol {
    /// Name of the symbol.
    pub name: String,
    /// Guest-virtual address.
    pub address: Gva,
    /// Size in bytes, from the module's file; 0 if the file has none.
    pub size: u64,
}

/// What the guest is doing when it changes its list of modules.
pub const CHANGING: &str = "loading or unloading modules";

/// Reads all modules of the guest, in the order of its list: the last loaded first.
///
/// # Errors
///
/// The list cannot be read.
pub fn all(live: &Live<'_>) -> Result<Vec<GuestModule>, KernelError> {
    let live = &live.that_changes_when(CHANGING);
    let Some(head) = live.kernel.symbol_of_feature("modules")? else {
        return Ok(Vec::new());
    };
    let node = live.kernel.btf.structure("module")?.offset("list")?;
    let elements = Walker::new(live).list("modules", head, node)?;
    let named = |at| {
        Ok(GuestModule {
            name: name(live, at)?,
            at,
        })
    };
    elements.into_iter().map(named).collect()
}

/// The name of the module whose `struct module` is at `at`.
pub fn name(live: &Live<'_>, at: Gva) -> Result<String, KernelError> {
    let offset = live.kernel.btf.structure("module")?.offset("name")?;
    let mut bytes = [0; NAME_BYTES_MAX];
    read(live, "module.name", at.wrapping_add(offset), &mut bytes)?;
    Ok(plain(&bytes))
}

/// The module whose memory holds `at`.
///
/// # Errors
///
/// The list of modules cannot be read.
pub fn containing(live: &Live<'_>, at: Gva) -> Result<Option<GuestModule>, KernelError> {
    let layout = live.kernel.btf.structure("module")?;
    // `mem[]` since 6.4, `core_layout` before. Parts that were freed after init are empty.
    let parts = (0..MEMORIES_MAX).map(|index| format!("mem[{index}]"));
    let parts = parts.chain(["core_layout".to_owned(), "init_layout".to_owned()]);
    let member = |part: &str, name| {
        layout
            .try_member(&format!("{part}.{name}"))
            .map(|member| member.offset())
    };
    let places: Vec<_> = parts
        .filter_map(|part| Some((member(&part, "base")?, member(&part, "size")?)))
        .collect();
    let modules = all(live)?;
    let live = &live.constant();
    for module in modules {
        for (base, size) in &places {
            let base = word(live, "module.mem", module.at.wrapping_add(*base))?;
            let size = word(live, "module.mem", module.at.wrapping_add(*size))? & 0xffff_ffff;
            if at.0.checked_sub(base).is_some_and(|offset| offset < size) {
                return Ok(Some(module));
            }
        }
    }
    Ok(None)
}

/// Reads the symbols that a module defines, in the order of its table.
///
/// # Errors
///
/// The module's tables cannot be read.
pub fn symbols(live: &Live<'_>, module: &GuestModule) -> Result<Vec<ModuleSymbol>, KernelError> {
    let what = "module.kallsyms";
    let live = &live.constant();
    let btf = &live.kernel.btf;
    let (layout, tables) = (btf.structure("module")?, btf.structure("mod_kallsyms")?);
    let kallsyms = Gva(word(live, what, module.at.wrapping_add(layout.offset("kallsyms")?))?);
    if kallsyms.0 == 0 {
        return Ok(Vec::new());
    }
    let symtab = Gva(word(live, what, kallsyms.wrapping_add(tables.offset("symtab")?))?);
    let strtab = Gva(word(live, what, kallsyms.wrapping_add(tables.offset("strtab")?))?);
    let count = word(live, what, kallsyms.wrapping_add(tables.offset("num_symtab")?))? & 0xffff_ffff;
    let len = usize::try_from(count.min(SYMBOLS_MAX)).unwrap_or(0) * ELF_SYMBOL_BYTES;
    let mut bytes = vec![0; len];
    read(live, what, symtab, &mut bytes)?;
    let entries: Vec<_> = bytes
        .chunks_exact(ELF_SYMBOL_BYTES)
        .filter_map(elf_symbol)
        .filter(|(name, section, ..)| *section != UNDEFINED && u64::from(*name) <= STRINGS_BYTES_MAX)
        .collect();
    let last = entries.iter().map(|(name, ..)| *name).max().unwrap_or(0);
    let strings = strings(live, strtab, u64::from(last))?;
    let symbol = |(name, _, address, size): (u32, u16, u64, u64)| {
        let text = strings.get(usize::try_from(name).ok()?..)?;
        let end = text.iter().take(SYMBOL_BYTES_MAX).position(|byte| *byte == 0)?;
        Some(ModuleSymbol {
            name: plain(text.get(..end)?),
            address: Gva(address),
            size,
        })
    };
    Ok(entries.into_iter().filter_map(symbol).collect())
}

/// Finds a module's export `name`.
///
/// # Errors
///
/// The module's tables cannot be read.
pub fn export(live: &Live<'_>, module: &GuestModule, name: &str) -> Result<Option<Export>, KernelError> {
    let live = &live.constant();
    let layout = live.kernel.btf.structure("module")?;
    // Up to 6.x there are two tables, since 7.0 one.
    for (table, count, crcs) in [("syms", "num_syms", "crcs"), ("gpl_syms", "num_gpl_syms", "gpl_crcs")] {
        let (Some(table), Some(count)) = (layout.try_member(table), layout.try_member(count)) else {
            continue;
        };
        let at = |offset: u64| module.at.wrapping_add(offset);
        let count = word(live, "module.num_syms", at(count.offset()))? & 0xffff_ffff;
        let start = Gva(word(live, "module.syms", at(table.offset()))?);
        let Some((index, address)) = exports::search(live, start, count.min(EXPORTS_MAX), name)? else {
            continue;
        };
        let crcs = match layout.try_member(crcs) {
            Some(crcs) => word(live, "module.crcs", at(crcs.offset()))?,
            None => 0,
        };
        let crc = (crcs != 0).then(|| exports::crc(live, Gva(crcs), index));
        return Ok(Some(Export {
            address,
            crc: crc.transpose()?,
        }));
    }
    Ok(None)
}

/// Finds the export `name` of the first of `modules` that has it, and that module.
///
/// # Errors
///
/// A module's tables cannot be read.
pub fn exporting<'m>(
    live: &Live<'_>,
    modules: &'m [GuestModule],
    name: &str,
) -> Result<Option<(&'m GuestModule, Export)>, KernelError> {
    for module in modules {
        if let Some(export) = export(live, module, name)? {
            return Ok(Some((module, export)));
        }
    }
    Ok(None)
}

/// A symbol's name, section, value and size.
fn elf_symbol(bytes: &[u8]) -> Option<(u32, u16, u64, u64)> {
    let name = u32::from_le_bytes(*bytes.first_chunk()?);
    let section = u16::from_le_bytes(bytes.get(6..8)?.try_into().ok()?);
    let value = u64::from_le_bytes(bytes.get(8..16)?.try_into().ok()?);
    let size = u64::from_le_bytes(bytes.get(16..24)?.try_into().ok()?);
    Some((name, section, value, size))
}

/// Reads the table of names up to the name at `last`, whose end is not known beforehand.
fn strings(live: &Live<'_>, strtab: Gva, last: u64) -> Result<Vec<u8>, KernelError> {
    let what = "module.kallsyms";
    let mut bytes = vec![0; usize::try_from(last).unwrap_or(0)];
    read(live, what, strtab, &mut bytes)?;
    for offset in 0..SYMBOL_BYTES_MAX as u64 {
        let mut byte = [0];
        read(live, what, strtab.wrapping_add(last.saturating_add(offset)), &mut byte)?;
        bytes.extend(byte);
        if byte == [0] {
            break;
        }
    }
    Ok(bytes)
}

fn word(live: &Live<'_>, what: &'static str, at: Gva) -> Result<u64, KernelError> {
    live.read_u64(at)
        .map_err(|source| KernelError::Unreadable { what, at, source })
}

fn read(live: &Live<'_>, what: &'static str, at: Gva, buf: &mut [u8]) -> Result<(), KernelError> {
    live.read(at, buf)
        .map_err(|source| KernelError::Unreadable { what, at, source })
}
