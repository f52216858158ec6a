//! What plans do about the module by which the guest knows a patch.

use super::{Refusal, RevertError};
use crate::change::Change;
use crate::guest_module::{self, Known, Layout};
use crate::kernel::{KernelError, Live, modules};

/// How this kernel keeps its modules, one of which the patch `id` is going to be.
pub(super) fn layout(live: &Live<'_>, id: &str) -> Result<Layout, Refusal> {
    if let Some(other) = modules::all(live)?.into_iter().find(|module| module.name == id) {
        return Err(Refusal::Loaded { id: other.name });
    }
    Layout::find(live)?.ok_or(Refusal::NoModules)
}

/// Puts `bytes` at `offset`, behind what is there, with zeroes between.
pub(super) fn append(area: &mut Vec<u8>, offset: u64, bytes: &[u8]) {
    area.resize(usize::try_from(offset).unwrap_or(area.len()), 0);
    area.extend_from_slice(bytes);
}

/// What must be as it is for nobody to use the module, as a change that changes nothing.
pub(super) fn unused(live: &Live<'_>, id: &str, known: &Known) -> Result<Option<Change>, RevertError> {
    match known.references(live)? {
        Some((0, same)) => Ok(Some(same)),
        Some((references, _)) => Err(RevertError::InUse {
            id: id.to_owned(),
            references,
        }),
        None => Ok(None),
    }
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
