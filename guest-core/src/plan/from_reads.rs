//! Makes a plan while the guest runs: all that the planner reads becomes a precondition of the commit.

use super::{Plan, Refusal, RevertError, TransitionError};
use crate::guest_module;
use crate::kernel::locks::Locks;
use crate::kernel::{KernelError, Live};
use crate::reads::Reads;
use crate::redirect::RedirectError;

/// An error of a planner. A guest that changes what is being read may be its cause.
pub(super) trait PlanError: From<KernelError> {
    /// True where the guest's structures cannot be read, or contradict one another.
    fn is_of_reading(&self) -> bool;
}

impl PlanError for KernelError {
    fn is_of_reading(&self) -> bool {
        true
    }
}

impl PlanError for TransitionError {
    fn is_of_reading(&self) -> bool {
        matches!(self, Self::Kernel(_))
    }
}

impl PlanError for RevertError {
    fn is_of_reading(&self) -> bool {
        matches!(self, Self::Kernel(_))
    }
}

impl PlanError for Refusal {
    fn is_of_reading(&self) -> bool {
        use crate::module::{LinkError, ResolveError};
        use crate::per_cpu::PerCpuError;
        matches!(
            self,
            Self::Kernel(_)
                | Self::Redirect(RedirectError::Kernel { .. })
                | Self::PerCpu(PerCpuError::Kernel(_))
                | Self::Function {
                    cause: ResolveError::Guest(_),
                    ..
                }
                | Self::Link(LinkError::Symbol {
                    cause: ResolveError::Guest(_),
                    ..
                })
        )
    }
}

/// Runs a planner, records its reads, and gives them to its plan as preconditions.
///
/// # Errors
///
/// Those of the planner. Where it failed and the bytes that it read have changed since, or the guest is changing them right now, the error
/// is [`KernelError::Changed`] or [`KernelError::Held`] instead: another attempt may succeed.
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::module::{LinkError, ResolveError};

    #[test]
    fn an_unreadable_symbol_table_is_an_error_of_reading_and_a_missing_symbol_is_not() {
        let unreadable = || ResolveError::Guest(KernelError::NoSymbol("modules"));
        let missing = || ResolveError::NotFound {
            object: "vmlinux".to_owned(),
        };
        for (cause, is_of_reading) in [(unreadable(), true), (missing(), false)] {
            let function = Refusal::Function {
                name: "f".to_owned(),
                cause: cause.clone(),
            };
            let symbol = Refusal::Link(LinkError::Symbol {
                symbol: "s".to_owned(),
                needed_by: ".text+0x8".to_owned(),
                cause,
            });
            assert_eq!(function.is_of_reading(), is_of_reading, "{function:?}");
            assert_eq!(symbol.is_of_reading(), is_of_reading, "{symbol:?}");
        }
    }
}
