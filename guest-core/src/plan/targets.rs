//! Finds the functions that a patch replaces, in the kernel image and in modules that the guest has loaded.

use super::Refusal;
use crate::addr::Gva;
use crate::kernel::modules::{self, GuestModule, ModuleSymbol};
use crate::kernel::resolve::GuestSymbols;
use crate::kernel::{KernelError, Live};
use crate::memory::VirtMemory;
use crate::module::{LinkedFunction, Patch, ResolveError, ResolveSymbol, Undefined};
use crate::unwind::OldFunction;

/// Suffixes of the symbols that a compiler gives to parts of a function that it places elsewhere.
const SPLIT_OFF: [&str; 2] = [".cold", ".part."];

/// A function that a patch replaces.
#[derive(Debug)]
pub(super) struct Target {
    /// Guest-virtual address.
    pub at: Gva,
    /// Length in bytes.
    pub len: u64,
    /// The function and its split parts.
    pub parts: Vec<OldFunction>,
}

/// True where a module is neither being loaded nor unloaded.
pub(super) fn is_live(live: &Live<'_>, module: &GuestModule) -> Result<bool, KernelError> {
    let btf = &live.kernel.btf;
    let at = module.at.wrapping_add(btf.structure("module")?.offset("state")?);
    let live = live.that_changes_when(modules::CHANGING);
    let state = live.read_u32(at).map_err(|source| KernelError::Unreadable {
        what: "module.state",
        at,
        source,
    })?;
    Ok(i64::from(state) == btf.enumerator("MODULE_STATE_LIVE")?)
}

/// The guest's modules that a patch changes, or whose symbols it needs. Refuses where one of them is being loaded or unloaded.
pub(super) fn used(
    live: &Live<'_>,
    symbols: &GuestSymbols<'_>,
    patch: &Patch,
    undefined: &[Undefined],
) -> Result<Vec<GuestModule>, Refusal> {
    for object in patch.objects.iter().filter_map(|object| object.name.as_deref()) {
        if let Some(module) = symbols.module(object)? {
            symbols.uses(module);
        }
    }
    for symbol in undefined {
        // Linking reports a symbol that is not found, unless it is pending.
        let _ = match &symbol.object {
            Some((object, sympos)) => symbols.any(Some(object), &symbol.name, *sympos),
            None => symbols.exported(&symbol.name),
        };
    }
    let used = symbols.used();
    for module in &used {
        if !is_live(live, module)? {
            let module = module.name.clone();
            return Err(Refusal::ModuleInTransition { module });
        }
    }
    Ok(used)
}

/// Finds the function that `function` replaces.
pub(super) fn find(live: &Live<'_>, symbols: &GuestSymbols<'_>, function: &LinkedFunction) -> Result<Target, Refusal> {
    let name = &function.old_name;
    let missing = |cause| Refusal::Function {
        name: name.clone(),
        cause,
    };
    let at = symbols
        .any(function.object.as_deref(), name, function.sympos)
        .map_err(missing)?;
    let Some(object) = &function.object else {
        let next = live.kernel.symbols.containing(at).map_or(at, |(_, next)| next);
        let len = next.0.saturating_sub(at.0);
        return Ok(Target {
            at,
            len,
            parts: image_parts(live, name, at, len),
        });
    };
    let module = symbols
        .module(object)?
        .ok_or_else(|| missing(ResolveError::NotLoaded { object: object.clone() }))?;
    let all = symbols.of_module(module)?;
    let len = extent(&all, at);
    Ok(Target {
        at,
        len,
        parts: module_parts(&all, name, at, len),
    })
}

/// A function of the image and its split parts. Functions that share a name also share the names of their parts. All parts of that name
/// count, because nothing tells which function they belong to.
pub(super) fn image_parts(live: &Live<'_>, name: &str, at: Gva, len: u64) -> Vec<OldFunction> {
    let split = live.kernel.symbols.iter().filter(|symbol| is_part(name, symbol.name));
    let split = split.map(|symbol| {
        let end = live
            .kernel
            .symbols
            .containing(symbol.address)
            .map_or(symbol.address, |(_, next)| next);
        OldFunction {
            name: symbol.name.to_owned(),
            code: symbol.address..end,
        }
    });
    std::iter::once(whole(name, at, len)).chain(split).collect()
}

/// The same for a function of a module, whose symbols are `all`.
pub(super) fn module_parts(all: &[ModuleSymbol], name: &str, at: Gva, len: u64) -> Vec<OldFunction> {
    let split = all.iter().filter(|symbol| is_part(name, &symbol.name));
    let split = split.map(|symbol| whole(&symbol.name, symbol.address, extent(all, symbol.address)));
    std::iter::once(whole(name, at, len)).chain(split).collect()
}

fn whole(name: &str, at: Gva, len: u64) -> OldFunction {
    OldFunction {
        name: name.to_owned(),
        code: at..at.wrapping_add(len),
    }
}

fn is_part(name: &str, symbol: &str) -> bool {
    // One byte tells nearly all of a kernel's symbols from a part.
    if symbol.as_bytes().get(name.len()) != Some(&b'.') {
        return false;
    }
    let rest = symbol.strip_prefix(name);
    rest.is_some_and(|rest| SPLIT_OFF.iter().any(|suffix| rest.starts_with(suffix)))
}

/// Length of the function at `at` in bytes: the size in the module's symbol table, but not beyond the next symbol.
fn extent(all: &[ModuleSymbol], at: Gva) -> u64 {
    let here = all.iter().filter(|symbol| symbol.address == at);
    let size = here.map(|symbol| symbol.size).max().unwrap_or(0);
    let next = all.iter().map(|symbol| symbol.address).filter(|next| *next > at).min();
    next.map_or(size, |next| size.min(next.0.saturating_sub(at.0)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn symbol(name: &str, address: u64, size: u64) -> ModuleSymbol {
        ModuleSymbol {
            name: name.into(),
            address: Gva(address),
            size,
        }
    }

    #[test]
    fn a_function_of_a_module_ends_at_its_size_and_before_the_next_symbol() {
        let all = [
            symbol("f", 0x1000, 0x30),
            symbol("local_alias", 0x1000, 0),
            symbol("g", 0x1040, 0x80),
            symbol("h", 0x1080, 0x10),
        ];
        assert_eq!(
            [0x1000, 0x1040, 0x1080].map(|at| extent(&all, Gva(at))),
            [0x30, 0x40, 0x10]
        );
        assert_eq!(extent(&all, Gva(0x1010)), 0, "no symbol");
    }

    #[test]
    fn split_parts_of_a_function_of_a_module_belong_to_the_function() {
        let all = [
            symbol("f", 0x1000, 0x30),
            symbol("f.cold", 0x2000, 8),
            symbol("f2", 0x1030, 8),
            symbol("f.part.0", 0x3000, 16),
        ];
        let parts = module_parts(&all, "f", Gva(0x1000), 0x30);
        let found: Vec<_> = parts
            .iter()
            .map(|part| (part.name.as_str(), part.code.clone()))
            .collect();
        let expected = [
            ("f", Gva(0x1000)..Gva(0x1030)),
            ("f.cold", Gva(0x2000)..Gva(0x2008)),
            ("f.part.0", Gva(0x3000)..Gva(0x3010)),
        ];
        assert_eq!(found, expected);
    }
}
