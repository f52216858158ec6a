//! Makes a plan from a guest that runs: all that the plan is made from becomes a precondition of its commit.

use super::{Plan, Refusal, RevertError};
use crate::guest_module;
use crate::kernel::locks::Locks;
use crate::kernel::{KernelError, Live};
use crate::reads::Reads;
use crate::redirect::RedirectError;

/// An error of a planner, which may be due to a guest that changed what was being read.
pub(super) trait PlanError: From<KernelError> {
    /// True where the guest's structures could not be read, or contradicted one another.
    fn is_of_reading(&self) -> bool;
}

impl PlanError for KernelError {
    fn is_of_reading(&self) -> bool {
        true
    }
}

impl PlanError for RevertError {
    fn is_of_reading(&self) -> bool {
        matches!(self, Self::Kernel(_))
    }
}

impl PlanError for Refusal {
    fn is_of_reading(&self) -> bool {
        use crate::per_cpu::PerCpuError;
        matches!(
            self,
            Self::Kernel(_) | Self::Redirect(RedirectError::Kernel { .. }) | Self::PerCpu(PerCpuError::Kernel(_))
        )
    }
}

/// Runs a planner whose reads are written down, and gives its plan the preconditions.
///
/// Where the planner fails and what it has read is not so any more, or the guest is just changing it, the error is
/// [`KernelError::Changed`] or [`KernelError::Held`]: another try may succeed.
pub(super) fn plan<E: PlanError>(
    live: &Live<'_>,
    planner: impl FnOnce(&Live<'_>) -> Result<Plan, E>,
) -> Result<Plan, E> {
    let reads = Reads::default();
    let recording = live.recording(&reads);
    let planned = guest_module::generation(&recording)
        .map_err(E::from)
        .and_then(|_| planner(&recording));
    match planned {
        Ok(plan) => Ok(Plan {
            requires: reads.preconditions(),
            ..plan
        }),
        Err(error) => reads
            .preconditions()
            .check(live.memory)
            .map_err(|changed| KernelError::Changed(changed).into())
            .and_then(|()| match Locks::find(live)?.held(live)? {
                Some(held) if error.is_of_reading() => Err(KernelError::Held(held).into()),
                _ => Err(error),
            }),
    }
}
