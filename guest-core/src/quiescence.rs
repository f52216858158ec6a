//! When it is safe to change functions: the consistency models.

use crate::kernel::{KernelError, Live};
use crate::plan::Occupied;
use crate::vcpu::Registers;
use std::fmt;

/// When a commit may happen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Model {
    /// At once, whatever the stacks hold (upstream livepatch of Linux 4.0).
    None,
    /// When every task's stack is clear of every old function at one instant (kpatch).
    CleanCut,
}

/// A task that stands in the way.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Blocker {
    /// Its pid in the initial namespace; 0 for an idle task.
    pub pid: i32,
    /// Its command name.
    pub comm: String,
    /// The function that it is inside.
    pub function: String,
    /// Its stack, innermost first, as symbols.
    pub stack: Vec<String>,
}

impl fmt::Display for Blocker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "pid {} ({}) is inside {}", self.pid, self.comm, self.function)
    }
}

/// What was found in a pause.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// Nobody is inside.
    Safe,
    /// These are.
    Blocked(Vec<Blocker>),
    /// A stack was not understood, and why.
    NotUnwound(String),
}

/// Why stacks can't be judged in this kernel at all.
#[derive(Debug, thiserror::Error)]
pub enum QuiescenceError {
    /// The kernel's tables could not be read.
    #[error("reading the guest's tasks")]
    Kernel(#[from] KernelError),
}

/// Watches the guest's stacks for a plan.
pub struct Quiescence<'a> {
    model: Model,
    _p: std::marker::PhantomData<&'a ()>,
}

impl<'a> Quiescence<'a> {
    /// For one plan.
    pub fn new(_live: &'a Live<'_>, model: Model, _occupied: &'a [Occupied]) -> Result<Self, QuiescenceError> {
        Ok(Self {
            model,
            _p: std::marker::PhantomData,
        })
    }

    /// Looks at all stacks while the guest runs.
    pub fn survey(&mut self, _live: &Live<'_>) -> Result<(), QuiescenceError> {
        Ok(())
    }

    /// Looks again, in the pause, at what may have changed.
    pub fn recheck(&mut self, _live: &Live<'_>, _registers: &[Registers]) -> Result<Verdict, QuiescenceError> {
        Ok(match self.model {
            Model::None => Verdict::Safe,
            Model::CleanCut => Verdict::NotUnwound("not built yet".to_owned()),
        })
    }
}
