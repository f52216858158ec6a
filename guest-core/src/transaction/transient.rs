//! Failures that end by themselves: the guest was changing what was read, or the VMM was changing the machine.

use crate::change::ChangeError;
use crate::commit::CommitError;
use crate::kernel::KernelError;
use crate::plan::{Refusal, RevertError, TransitionError};

/// An error that a guest or VMM may have caused by changing something at that moment.
pub trait Transient {
    /// What the guest or its VMM keeps doing, as a sentence, where that is the cause. Nothing was changed then, and another attempt may
    /// succeed.
    fn transient(&self) -> Option<String>;
}

fn guest_keeps(doing: &str) -> String {
    format!("the guest keeps {doing}")
}

impl Transient for ChangeError {
    fn transient(&self) -> Option<String> {
        Some(match self {
            Self::Changing { doing, .. } => guest_keeps(doing),
            Self::Unexpected { what, .. } | Self::Memory { what, .. } => guest_keeps(&format!("changing {what}")),
        })
    }
}

impl Transient for KernelError {
    fn transient(&self) -> Option<String> {
        match self {
            Self::Changed(change) => change.transient(),
            Self::Held(held) => Some(guest_keeps(held.doing)),
            _ => None,
        }
    }
}

impl Transient for CommitError {
    fn transient(&self) -> Option<String> {
        match self {
            Self::Changed(change) => change.transient(),
            Self::Kernel(error) => error.transient(),
            Self::Machine(error) => error.transient.map(|doing| format!("the VMM keeps {doing}")),
            _ => None,
        }
    }
}

impl Transient for Refusal {
    fn transient(&self) -> Option<String> {
        match self {
            Self::Kernel(error) => error.transient(),
            Self::ModuleInTransition { module } => {
                Some(guest_keeps(&format!("loading or unloading the module {module}")))
            }
            _ => None,
        }
    }
}

impl Transient for TransitionError {
    fn transient(&self) -> Option<String> {
        match self {
            Self::Kernel(error) => error.transient(),
            Self::Revert(error) => error.transient(),
            Self::NoFields(_) | Self::NotOwner | Self::Guard(_) | Self::Tasks(_) => None,
        }
    }
}

impl Transient for RevertError {
    fn transient(&self) -> Option<String> {
        match self {
            Self::Kernel(error) => error.transient(),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::MachineError;

    #[test]
    fn plugging_a_vcpu_is_transient_and_another_failure_of_the_vmm_is_not() {
        let pausing = || MachineError::new("pausing the guest", "other vCPUs than asked for");
        let plugging = pausing().transient(Some("plugging vCPUs in or out"));
        let keeps = CommitError::from(plugging).transient();
        assert_eq!(keeps.as_deref(), Some("the VMM keeps plugging vCPUs in or out"));
        assert_eq!(CommitError::from(pausing()).transient(), None);
    }
}
