//! What the entry for embedders needs of a VMM.

use crate::commit::Effect;
use crate::machine::{Journal, Machine, MachineError, Paused};
use crate::memory::PhysMemory;
use crate::vcpu::Registers;
use std::error::Error;

/// The VMM of one guest: all that [`Guest`](super::Guest) needs of it. One that has memory and machine at hand need not implement this:
/// see [`Embedded`].
pub trait Vmm {
    /// Why it did not do what was asked.
    type Error: Error + 'static;

    /// The guest's memory.
    fn memory(&self) -> &dyn PhysMemory;

    /// Registers of all vCPUs, to find the kernel. The vCPUs may run meanwhile: see [`Registers`].
    ///
    /// # Errors
    ///
    /// The VMM does not tell them.
    fn registers(&mut self) -> Result<Vec<Registers>, Self::Error>;

    /// Requires that the VMM does nothing with the guest that a change would not survive. A migration, a snapshot or a dump could hold half
    /// of the change.
    ///
    /// # Errors
    ///
    /// It does, or it does not tell.
    fn require_idle(&self) -> Result<(), Self::Error>;

    /// Removes from the VMM what a process that was killed while it changed the guest has left there.
    ///
    /// # Errors
    ///
    /// It may still be there.
    fn remove_leftovers(&mut self) -> Result<(), Self::Error>;

    /// The guest for one commit, with a supervisor that rolls the commit back should this process die.
    ///
    /// # Errors
    ///
    /// The guest cannot be changed now.
    fn begin(&mut self) -> Result<ForCommit<'_>, Self::Error>;
}

/// A guest's memory and machine for one commit.
pub struct ForCommit<'a> {
    /// The memory.
    pub memory: &'a dyn PhysMemory,
    /// The machine.
    pub machine: Box<dyn Supervised + 'a>,
}

/// A machine whose journal a supervisor keeps. The supervisor ends when this is dropped, before anything else is asked of the VMM.
pub trait Supervised: Machine {
    /// Ends the use of the machine, which has left the guest paused, and has the supervisor do what it would do had this process died:
    /// see [`Machine::guard`]. Gives how much of the commit is in the guest, which runs if it ran before; `None` where that is not known.
    fn take_over(self: Box<Self>) -> Option<Effect>;
}

/// A VMM in the same process: memory and machine at hand, and nothing else that changes the guest's whole memory.
///
/// A process that dies in a pause takes its guest with it, and so needs no supervisor. A VMM that lives on without the process that patches
/// its guests implements [`Vmm`].
#[derive(Debug)]
pub struct Embedded<M, V> {
    /// The guest's memory.
    pub memory: M,
    /// The guest's vCPUs.
    pub machine: V,
}

impl<M: PhysMemory, V: Machine> Vmm for Embedded<M, V> {
    type Error = MachineError;

    fn memory(&self) -> &dyn PhysMemory {
        &self.memory
    }

    /// Pauses the guest for a moment.
    fn registers(&mut self) -> Result<Vec<Registers>, MachineError> {
        let mut paused = self.machine.pause()?;
        let registers = paused.registers();
        paused.resume()?;
        registers
    }

    fn require_idle(&self) -> Result<(), MachineError> {
        Ok(())
    }

    fn remove_leftovers(&mut self) -> Result<(), MachineError> {
        Ok(())
    }

    fn begin(&mut self) -> Result<ForCommit<'_>, MachineError> {
        Ok(ForCommit {
            memory: &self.memory,
            machine: Box::new(Unsupervised(&mut self.machine)),
        })
    }
}

/// A machine without a supervisor that could take it over.
struct Unsupervised<'a, V>(&'a mut V);

impl<V: Machine> Machine for Unsupervised<'_, V> {
    fn guard(&mut self, journal: Option<&Journal>) -> Result<(), MachineError> {
        self.0.guard(journal)
    }

    fn pause(&mut self) -> Result<Box<dyn Paused + '_>, MachineError> {
        self.0.pause()
    }
}

impl<V: Machine> Supervised for Unsupervised<'_, V> {
    fn take_over(self: Box<Self>) -> Option<Effect> {
        None
    }
}
