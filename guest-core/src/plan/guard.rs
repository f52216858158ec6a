//! What the guest's own integrity guard means for a plan.

use crate::kernel::guard::{self, Armed};
use crate::kernel::{KernelError, Live};

/// Demands that the guest survives a change of its text: [`Armed`] where its guard would stop the guest, or may.
pub(super) fn require_survival<E: From<Armed> + From<KernelError>>(live: &Live<'_>) -> Result<(), E> {
    if let Some(guard) = guard::find(live)? {
        guard.permits()?;
    }
    Ok(())
}
