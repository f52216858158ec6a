//! Symbols for a module that is about to be linked against the guest's kernel.

use super::{Kernel, KernelError, Live, exports, modules};
use crate::addr::Gva;
use crate::module::{ResolveError, ResolveSymbol};

/// What `klp_find_object_symbol` calls the kernel image.
pub const VMLINUX: &str = "vmlinux";

impl ResolveSymbol for Live<'_> {
    fn exported(&self, name: &str) -> Result<Gva, ResolveError> {
        match exports::find(self, name) {
            Ok(Some(export)) => Ok(export.address),
            Ok(None) if self.kernel.symbols.named(name).next().is_some() => Err(ResolveError::NotExported),
            Ok(None) => Err(ResolveError::NotFound {
                object: VMLINUX.to_owned(),
            }),
            Err(error) => Err(ResolveError::Guest(error.to_string())),
        }
    }

    fn any(&self, object: Option<&str>, name: &str, sympos: u64) -> Result<Gva, ResolveError> {
        match object {
            None | Some(VMLINUX) => of_image(self.kernel, name, sympos),
            Some(object) => of_module(self, object, name, sympos),
        }
    }
}

fn of_module(live: &Live<'_>, object: &str, name: &str, sympos: u64) -> Result<Gva, ResolveError> {
    let guest = |error: KernelError| ResolveError::Guest(error.to_string());
    let module = modules::all(live)
        .map_err(guest)?
        .into_iter()
        .find(|module| module.name == object);
    let module = module.ok_or_else(|| ResolveError::NotLoaded {
        object: object.to_owned(),
    })?;
    nth(
        object,
        modules::symbols_named(live, &module, name).map_err(guest)?,
        sympos,
    )
}

fn of_image(kernel: &Kernel, name: &str, sympos: u64) -> Result<Gva, ResolveError> {
    nth(
        VMLINUX,
        kernel.symbols.named(name).map(|symbol| symbol.address).collect(),
        sympos,
    )
}

/// As `klp_find_object_symbol` (kernel/livepatch/core.c) does it: position 0 wants exactly one symbol of that name,
/// position n the n-th in the order of the table.
fn nth(object: &str, found: Vec<Gva>, sympos: u64) -> Result<Gva, ResolveError> {
    let object = object.to_owned();
    match (found.as_slice(), sympos) {
        ([], _) => Err(ResolveError::NotFound { object }),
        ([only], 0) => Ok(*only),
        (_, 0) => Err(ResolveError::Ambiguous {
            object,
            addresses: found,
        }),
        (all, _) => {
            let nth = usize::try_from(sympos - 1).ok().and_then(|nth| all.get(nth));
            nth.copied().ok_or(ResolveError::Position {
                object,
                sympos,
                found: all.len(),
            })
        }
    }
}
