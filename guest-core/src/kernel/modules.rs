//! Modules that the guest has loaded: their names and symbols.
//!
//! `modules` → `struct module` (include/linux/module.h); symbols in `module.kallsyms`, a `struct mod_kallsyms` since 4.5:
//! ELF symbols, names, and since 5.2 a type letter for each.

use super::list::Walker;
use super::{KernelError, Live};
use crate::addr::Gva;
use crate::memory::VirtMemory;
use crate::text::plain;

/// `MODULE_NAME_LEN`: 56 on 64-bit kernels up to 6.x.
const NAME_BYTES_MAX: usize = 64;
/// Longest symbol name (`KSYM_NAME_LEN`).
const SYMBOL_BYTES_MAX: usize = 512;
/// More symbols than a module has; bounds memory and time.
const SYMBOLS_MAX: u64 = 1 << 18;
/// More bytes of names than a module has.
const STRINGS_BYTES_MAX: u64 = 16 << 20;
/// Bytes of an `Elf64_Sym`: name 4, info, other, section 2, value 8, size 8.
const ELF_SYMBOL_BYTES: usize = 24;
/// `SHN_UNDEF`: the symbol is another module's.
const UNDEFINED: u16 = 0;

/// A loaded module.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuestModule {
    /// Its name.
    pub name: String,
    /// Address of its `struct module`.
    pub at: Gva,
}

/// All modules on the guest's list, in its order: the last loaded first.
pub fn all(live: &Live<'_>) -> Result<Vec<GuestModule>, KernelError> {
    let Some(head) = live.kernel.symbols.unique("modules") else {
        return Ok(Vec::new());
    };
    let module = live.kernel.btf.structure("module")?;
    let (node, name) = (module.offset("list")?, module.offset("name")?);
    let elements = Walker::new(live).list("modules", head, node)?;
    elements
        .into_iter()
        .map(|at| {
            let mut bytes = [0; NAME_BYTES_MAX];
            read(live, "module.name", at.wrapping_add(name), &mut bytes)?;
            Ok(GuestModule {
                name: plain(&bytes),
                at,
            })
        })
        .collect()
}

/// The addresses of all symbols called `name` in a module, in the order of its table.
pub fn symbols_named(live: &Live<'_>, module: &GuestModule, name: &str) -> Result<Vec<Gva>, KernelError> {
    let what = "module.kallsyms";
    let btf = &live.kernel.btf;
    let (layout, tables) = (btf.structure("module")?, btf.structure("mod_kallsyms")?);
    let word = |at: Gva| {
        live.read_u64(at)
            .map_err(|source| KernelError::Unreadable { what, at, source })
    };
    let kallsyms = Gva(word(module.at.wrapping_add(layout.offset("kallsyms")?))?);
    if kallsyms.0 == 0 {
        return Ok(Vec::new());
    }
    let symtab = Gva(word(kallsyms.wrapping_add(tables.offset("symtab")?))?);
    let strtab = Gva(word(kallsyms.wrapping_add(tables.offset("strtab")?))?);
    let count = word(kallsyms.wrapping_add(tables.offset("num_symtab")?))? & 0xffff_ffff;
    let len = usize::try_from(count.min(SYMBOLS_MAX)).unwrap_or(0) * ELF_SYMBOL_BYTES;
    let mut bytes = vec![0; len];
    read(live, what, symtab, &mut bytes)?;
    let mut found = Vec::new();
    for symbol in bytes.chunks_exact(ELF_SYMBOL_BYTES) {
        let (Some(offset), Some(section), Some(value)) = (
            symbol.first_chunk::<4>().map(|bytes| u32::from_le_bytes(*bytes)),
            symbol
                .get(6..8)
                .and_then(|bytes| Some(u16::from_le_bytes(bytes.try_into().ok()?))),
            symbol
                .get(8..16)
                .and_then(|bytes| Some(u64::from_le_bytes(bytes.try_into().ok()?))),
        ) else {
            continue;
        };
        if section == UNDEFINED || u64::from(offset) > STRINGS_BYTES_MAX {
            continue;
        }
        // One more byte than the name, for its end.
        let mut bytes = vec![0; name.len().min(SYMBOL_BYTES_MAX) + 1];
        if read(live, what, strtab.wrapping_add(u64::from(offset)), &mut bytes).is_ok()
            && bytes.strip_suffix(&[0]) == Some(name.as_bytes())
        {
            found.push(Gva(value));
        }
    }
    Ok(found)
}

fn read(live: &Live<'_>, what: &'static str, at: Gva, buf: &mut [u8]) -> Result<(), KernelError> {
    live.read(at, buf)
        .map_err(|source| KernelError::Unreadable { what, at, source })
}
