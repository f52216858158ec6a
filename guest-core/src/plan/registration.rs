//! The steps of plans that register a patch as a module of the guest, and unregister it.

use super::{Refusal, RevertError};
use crate::addr::Gva;
use crate::change::Change;
use crate::guest_module::{self, Layout, ModuleRegistration};
use crate::kernel::{KernelError, Live, modules};
use crate::module::Area;
use crate::per_cpu::{self, Allocation};
use std::ops::Range;

/// How this kernel keeps its modules. Refuses where it already has one named `id`, or was built without modules.
pub(super) fn layout(live: &Live<'_>, id: &str) -> Result<Layout, Refusal> {
    if let Some(other) = modules::all(live)?.into_iter().find(|module| module.name == id) {
        return Err(Refusal::Loaded { id: other.name });
    }
    Layout::find(live)?.ok_or(Refusal::NoModules)
}

/// Chooses the per-CPU memory of a patch whose `struct module` will be at `module`; `None` where the patch needs none.
pub(super) fn per_cpu(live: &Live<'_>, area: &Area, module: Gva) -> Result<Option<Allocation>, Refusal> {
    if area.size == 0 {
        return Ok(None);
    }
    let layout = live.kernel.btf.structure("module").map_err(KernelError::from)?;
    let mark = layout.offset("percpu_size").map_err(KernelError::from)?;
    Ok(Some(per_cpu::choose(
        live,
        area.size,
        area.align,
        module.wrapping_add(mark),
    )?))
}

/// Plans to free the patch's per-CPU memory.
pub(super) fn free_per_cpu(live: &Live<'_>, module: &ModuleRegistration) -> Result<Vec<Change>, KernelError> {
    module
        .per_cpu
        .map_or(Ok(Vec::new()), |allocation| allocation.free(live))
}

/// Puts `bytes` at `offset`, behind the bytes of `area`, with zeroes between.
pub(super) fn append(area: &mut Vec<u8>, offset: u64, bytes: &[u8]) {
    area.resize(usize::try_from(offset).unwrap_or(area.len()), 0);
    area.extend_from_slice(bytes);
}

/// Requires that the guest holds no reference to the module.
pub(super) fn require_unused(live: &Live<'_>, id: &str, module: &ModuleRegistration) -> Result<(), RevertError> {
    match module.references(live)? {
        0 => Ok(()),
        references => Err(RevertError::InUse {
            id: id.to_owned(),
            references,
        }),
    }
}

/// Requires that no tracer uses the patch's functions, so that their ftrace records can be removed.
pub(super) fn require_untraced(live: &Live<'_>, module: &ModuleRegistration) -> Result<(), RevertError> {
    let traced = module.traced.map(|traced| traced.in_use(live)).transpose()?;
    match traced.flatten() {
        Some(site) => Err(RevertError::NewTraced {
            function: function_at(live, site)?,
        }),
        None => Ok(()),
    }
}

/// The guest's name of the new function that holds `at`.
fn function_at(live: &Live<'_>, at: Gva) -> Result<String, KernelError> {
    let Some(module) = modules::containing(live, at)? else {
        return Ok(format!("the function at {at}"));
    };
    let symbols = modules::symbols(live, &module)?;
    let before = symbols.into_iter().filter(|symbol| symbol.address <= at);
    let nearest = before.max_by_key(|symbol| symbol.address);
    Ok(nearest.map_or_else(|| format!("the function at {at}"), |symbol| symbol.name))
}

/// Plans to remove the patch's branches from the lists of their static keys.
pub(super) fn unlist(live: &Live<'_>, id: &str, module: &ModuleRegistration) -> Result<Vec<Change>, RevertError> {
    guest_module::unlist(live, &module.keys)?.map_err(|key| RevertError::KeyInUse {
        id: id.to_owned(),
        key: match live.kernel.symbols.containing(key) {
            Some((symbol, _)) => symbol.name.to_owned(),
            None => key.to_string(),
        },
    })
}

/// Plans to unregister the patch's module from the guest. `doubtful`: the guest-virtual memory of the patch, where it may never have been
/// registered.
pub(super) fn unregister(
    live: &Live<'_>,
    module: &ModuleRegistration,
    doubtful: Option<Range<Gva>>,
) -> Result<Vec<Change>, KernelError> {
    match Layout::find(live)? {
        Some(layout) => module.unregister(live, &layout, doubtful),
        None => Ok(Vec::new()),
    }
}
