//! What plans do about the module by which the guest knows a patch.

use super::{Refusal, RevertError};
use crate::addr::Gva;
use crate::change::Change;
use crate::guest_module::{self, Known, Layout};
use crate::kernel::{KernelError, Live, modules};
use crate::module::Area;
use crate::per_cpu::{self, Piece};

/// How this kernel keeps its modules, one of which the patch `id` is going to be.
pub(super) fn layout(live: &Live<'_>, id: &str) -> Result<Layout, Refusal> {
    if let Some(other) = modules::all(live)?.into_iter().find(|module| module.name == id) {
        return Err(Refusal::Loaded { id: other.name });
    }
    Layout::find(live)?.ok_or(Refusal::NoModules)
}

/// The per-CPU memory that a patch is to have whose module is going to be at `module`; none where it needs none.
pub(super) fn per_cpu(live: &Live<'_>, area: &Area, module: Gva) -> Result<Option<Piece>, Refusal> {
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

/// The changes that give back the patch's per-CPU memory.
pub(super) fn give_back(live: &Live<'_>, known: &Known) -> Result<Vec<Change>, KernelError> {
    known.per_cpu.map_or(Ok(Vec::new()), |piece| piece.give_back(live))
}

/// Puts `bytes` at `offset`, behind what is there, with zeroes between.
pub(super) fn append(area: &mut Vec<u8>, offset: u64, bytes: &[u8]) {
    area.resize(usize::try_from(offset).unwrap_or(area.len()), 0);
    area.extend_from_slice(bytes);
}

/// Demands that nobody uses the module.
pub(super) fn require_unused(live: &Live<'_>, id: &str, known: &Known) -> Result<(), RevertError> {
    match known.references(live)? {
        0 => Ok(()),
        references => Err(RevertError::InUse {
            id: id.to_owned(),
            references,
        }),
    }
}

/// Demands that ftrace can forget the patch's functions.
pub(super) fn require_untraced(live: &Live<'_>, known: &Known) -> Result<(), RevertError> {
    let traced = known.traced.map(|traced| traced.in_use(live)).transpose()?;
    match traced.flatten() {
        Some(site) => Err(RevertError::NewTraced {
            function: function_at(live, site)?,
        }),
        None => Ok(()),
    }
}

/// The name of a new function, as the guest has it.
fn function_at(live: &Live<'_>, at: Gva) -> Result<String, KernelError> {
    let Some(module) = modules::containing(live, at)? else {
        return Ok(format!("the function at {at}"));
    };
    let symbols = modules::symbols(live, &module)?;
    let before = symbols.into_iter().filter(|symbol| symbol.address <= at);
    let nearest = before.max_by_key(|symbol| symbol.address);
    Ok(nearest.map_or_else(|| format!("the function at {at}"), |symbol| symbol.name))
}

/// The changes that take the patch's branches from their static keys' lists.
pub(super) fn unlist(live: &Live<'_>, id: &str, known: &Known) -> Result<Vec<Change>, RevertError> {
    guest_module::unlist(live, &known.keys)?.map_err(|key| RevertError::KeyInUse {
        id: id.to_owned(),
        key: match live.kernel.symbols.containing(key) {
            Some((symbol, _)) => symbol.name.to_owned(),
            None => key.to_string(),
        },
    })
}

/// The changes that make the guest forget the patch's module.
pub(super) fn forget(live: &Live<'_>, known: &Known) -> Result<Vec<Change>, KernelError> {
    match Layout::find(live)? {
        Some(layout) => known.unregister(live, &layout),
        None => Ok(Vec::new()),
    }
}
