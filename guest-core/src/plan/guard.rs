//! Refuses a plan that the guest's own integrity guard would punish.

use crate::kernel::guard::{self, Armed};
use crate::kernel::{KernelError, Live};

/// Requires that the guest survives a change of its text.
///
/// # Errors
///
/// [`Armed`], where the guest's guard would or may stop the guest.
pub(super) fn require_survival<E: From<Armed> + From<KernelError>>(live: &Live<'_>) -> Result<(), E> {
    if let Some(guard) = guard::find(live)? {
        guard.permits()?;
    }
    Ok(())
}
