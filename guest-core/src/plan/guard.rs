//! What the guest's own integrity guard means for a plan.

use crate::change::Change;
use crate::kernel::guard::{self, Armed};
use crate::kernel::{KernelError, Live};

/// Preconditions under which the guest survives a change of its text: that its guard, if it has one, stays as it is.
///
/// Error: [`Armed`] where the guard would stop the guest, or may.
pub(super) fn survived<E: From<Armed> + From<KernelError>>(live: &Live<'_>) -> Result<Vec<Change>, E> {
    let Some(guard) = guard::find(live)? else {
        return Ok(Vec::new());
    };
    guard.permits()?;
    Ok(guard.unchanged(live)?)
}
