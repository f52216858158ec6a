//! Who rolls a change back should this process die.

use super::stops::{HeldBack, StopsHeldBack};
use super::{Hypervisor, Prepared, Vcpus};
use guest_core::machine::{Journal, Machine, MachineError, Paused};
use std::io;

/// Who rolls a change back should this process die.
pub trait ChangeGuard {
    /// From here on, should this process die, what `journal` tells of is ended, and the guest runs if it ran when it was `prepared`.
    ///
    /// # Errors
    ///
    /// It will not be.
    fn watch(&mut self, journal: &Journal, prepared: &Prepared) -> io::Result<()>;

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
    /// What the guard was told: the journal, and how the guest is paused.
    told: Option<(Journal, Prepared)>,
}

impl<'a, G> GuardedMachine<'a, G> {
    /// The guard must know how to reach that VM.
    pub fn new(vm: &'a dyn Hypervisor, guard: G) -> Self {
        let vcpus = vm.vcpus();
        let told = None;
        Self { vcpus, guard, told }
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
            None => {
                self.told = None;
                self.guard.release().map_err(telling)
            }
            Some(journal) => {
                let prepared = self.vcpus.prepare()?;
                self.guard.watch(journal, &prepared).map_err(telling)?;
                self.told = Some((journal.clone(), prepared));
                Ok(())
            }
        }
    }

    /// Many pauses may be tried, and an operator may pause the guest between two of them, or let it run.
    fn pause(&mut self) -> Result<Box<dyn Paused + '_>, MachineError> {
        if let Some((journal, told)) = &mut self.told {
            let prepared = self.vcpus.prepare()?;
            if prepared != *told {
                let telling = |error| MachineError::new("telling the supervisor", error);
                self.guard.watch(journal, &prepared).map_err(telling)?;
                *told = prepared;
            }
        }
        let stops = StopsHeldBack::begin();
        let guest = self.vcpus.pause()?;
        Ok(Box::new(HeldBack::new(guest, stops)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::{Cell, RefCell};

    /// vCPUs of which is known alone whether they run.
    struct Known<'a>(&'a Cell<bool>);

    impl Vcpus for Known<'_> {
        fn prepare(&mut self) -> Result<Prepared, MachineError> {
            Ok(Prepared {
                running: self.0.get(),
                threads: None,
            })
        }

        fn pause(&mut self) -> Result<Box<dyn Paused + '_>, MachineError> {
            Err(MachineError::new("pausing the guest", "it can't be paused"))
        }
    }

    /// Keeps what it is told.
    struct Told<'a>(&'a RefCell<Vec<Option<bool>>>);

    impl ChangeGuard for Told<'_> {
        fn watch(&mut self, _: &Journal, prepared: &Prepared) -> io::Result<()> {
            self.0.borrow_mut().push(Some(prepared.running));
            Ok(())
        }

        fn release(&mut self) -> io::Result<()> {
            self.0.borrow_mut().push(None);
            Ok(())
        }
    }

    /// Killed in the pause, vmpatch would otherwise leave a guest paused that ran, or have one run that its operator has paused.
    #[test]
    fn the_guard_knows_before_each_pause_whether_the_guest_runs() {
        let (running, told) = (Cell::new(false), RefCell::default());
        let mut machine = GuardedMachine {
            vcpus: Box::new(Known(&running)),
            guard: Told(&told),
            told: None,
        };
        machine.guard(Some(&Journal::default())).unwrap();
        for runs in [false, true, true, false] {
            running.set(runs);
            assert!(machine.pause().is_err());
        }
        machine.guard(None).unwrap();
        assert_eq!(*told.borrow(), [Some(false), Some(true), Some(false), None]);
    }
}
