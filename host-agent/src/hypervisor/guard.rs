//! Who rolls a change back should this process die.

use super::stops::{HeldBack, StopsHeldBack};
use super::{Hypervisor, Vcpus};
use guest_core::machine::{Journal, Machine, MachineError, Paused};
use std::io;

/// Who rolls a change back should this process die.
pub trait ChangeGuard {
    /// From here on, should this process die, `journal` is rolled back, and the guest runs if it was `running`.
    ///
    /// # Errors
    ///
    /// It will not be.
    fn watch(&mut self, journal: &Journal, running: bool) -> io::Result<()>;

    /// Nothing is to be rolled back any more.
    ///
    /// # Errors
    ///
    /// The guard does not know that.
    fn release(&mut self) -> io::Result<()>;
}

/// A guest whose changes are guarded, for the core to change.
pub struct GuardedMachine<'a, G> {
    vcpus: Box<dyn Vcpus + 'a>,
    guard: G,
}

impl<'a, G> GuardedMachine<'a, G> {
    /// The guard must know how to reach that VM.
    pub fn new(vm: &'a dyn Hypervisor, guard: G) -> Self {
        let vcpus = vm.vcpus();
        Self { vcpus, guard }
    }

    /// Releases the vCPUs and returns the guard, which may still hold a journal.
    pub fn into_guard(self) -> G {
        self.guard
    }
}

impl<G: ChangeGuard> Machine for GuardedMachine<'_, G> {
    fn guard(&mut self, journal: Option<&Journal>) -> Result<(), MachineError> {
        let telling = |error| MachineError::new("telling the supervisor", error);
        match journal {
            None => self.guard.release().map_err(telling),
            Some(journal) => {
                let running = self.vcpus.prepare()?;
                self.guard.watch(journal, running).map_err(telling)
            }
        }
    }

    fn pause(&mut self) -> Result<Box<dyn Paused + '_>, MachineError> {
        let stops = StopsHeldBack::begin();
        let guest = self.vcpus.pause()?;
        Ok(Box::new(HeldBack::new(guest, stops)))
    }
}
