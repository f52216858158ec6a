//! What a patch replaces, found in the guest: functions of the kernel image, and of modules that the guest has loaded.

use super::Refusal;
use crate::addr::Gva;
use crate::kernel::modules::{self, GuestModule, ModuleSymbol};
use crate::kernel::resolve::GuestSymbols;
use crate::kernel::{KernelError, Live};
use crate::memory::VirtMemory;
use crate::module::{LinkedFunction, Patch, ResolveError, ResolveSymbol, Undefined};
use crate::place::Registry;
use crate::unwind::OldFunction;

/// Parts that a compiler splits off a function: code that runs as part of it.
const SPLIT_OFF: [&str; 2] = [".cold", ".part."];

/// A function that is to be replaced.
#[derive(Debug)]
pub(super) struct Old {
    /// Its address.
    pub at: Gva,
    /// Its bytes.
    pub len: u64,
    /// The function and what the compiler split off it.
    pub parts: Vec<OldFunction>,
}

/// Whether a module is neither coming nor going.
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

/// The guest's modules that a patch is for, or whose symbols it needs, all of them neither coming nor going.
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
        // One that is not found is an error when it is linked, or pending.
        let _ = match &symbol.object {
            Some((object, sympos)) => symbols.any(Some(object), &symbol.name, *sympos),
            None => symbols.exported(&symbol.name),
        };
    }
    let used = symbols.used();
    for module in &used {
        if !is_live(live, module)? {
            let module = module.name.clone();
            return Err(Refusal::Unsettled { module });
        }
    }
    Ok(used)
}

/// Finds the function that `function` replaces; one that another patch holds is refused.
pub(super) fn find(
    live: &Live<'_>,
    symbols: &GuestSymbols<'_>,
    registry: &Registry,
    function: &LinkedFunction,
) -> Result<Old, Refusal> {
    let name = &function.old_name;
    let missing = |cause| Refusal::Function {
        name: name.clone(),
        cause,
    };
    let at = symbols
        .any(function.object.as_deref(), name, function.sympos)
        .map_err(missing)?;
    let mut records = registry.records();
    if let Some(other) = records.find(|record| record.functions.iter().any(|other| other.old == at.0)) {
        return Err(Refusal::Held {
            function: name.clone(),
            id: other.id.clone(),
        });
    }
    let Some(object) = &function.object else {
        let next = live.kernel.symbols.containing(at).map_or(at, |(_, next)| next);
        let len = next.0.saturating_sub(at.0);
        return Ok(Old {
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
    Ok(Old {
        at,
        len,
        parts: module_parts(&all, name, at, len),
    })
}

/// The function and what the compiler split off it. Several functions of one name have parts of one name, too: all of
/// those count, as nothing tells whose they are.
fn image_parts(live: &Live<'_>, name: &str, at: Gva, len: u64) -> Vec<OldFunction> {
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

/// Likewise, of a module.
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
    let rest = symbol.strip_prefix(name);
    rest.is_some_and(|rest| SPLIT_OFF.iter().any(|suffix| rest.starts_with(suffix)))
}

/// Bytes of the function at `at`: what the module's file said, but not into the next symbol.
fn extent(all: &[ModuleSymbol], at: Gva) -> u64 {
    let here = all.iter().filter(|symbol| symbol.address == at);
    let said = here.map(|symbol| symbol.size).max().unwrap_or(0);
    let next = all.iter().map(|symbol| symbol.address).filter(|next| *next > at).min();
    next.map_or(said, |next| said.min(next.0.saturating_sub(at.0)))
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
    fn a_modules_function_reaches_as_far_as_its_file_says_and_not_into_the_next() {
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
    fn parts_of_a_modules_function_count_as_the_function() {
        let all = [
            symbol("f", 0x1000, 0x30),
            symbol("f.cold", 0x2000, 8),
            symbol("f2", 0x1030, 8),
            symbol("f.part.0", 0x3000, 16),
        ];
        let parts = module_parts(&all, "f", Gva(0x1000), 0x30);
        let said: Vec<_> = parts
            .iter()
            .map(|part| (part.name.as_str(), part.code.clone()))
            .collect();
        let expected = [
            ("f", Gva(0x1000)..Gva(0x1030)),
            ("f.cold", Gva(0x2000)..Gva(0x2008)),
            ("f.part.0", Gva(0x3000)..Gva(0x3010)),
        ];
        assert_eq!(said, expected);
    }
}
