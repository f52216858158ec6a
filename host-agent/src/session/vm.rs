//! The host's side of a guest that is patched: its hypervisor, its lock, and the supervisor of each change.

use super::error::{BusyError, HostError};
use crate::hypervisor::{Activity, GuardedMachine, Hypervisor};
use crate::lock::{DomainLock, LockError};
use crate::supervisor::Supervisor;
use guest_core::commit::Effect;
use guest_core::guest::{ForCommit, Supervised, Vmm};
use guest_core::machine::{Journal, Machine, MachineError, Paused};
use guest_core::{PhysMemory, Registers};
use std::cell::Cell;
use std::path::PathBuf;

/// A VM that was reached, and the right to change it.
pub(super) struct LockedVm {
    /// The VM: its memory and vCPUs.
    pub(super) hypervisor: Box<dyn Hypervisor>,
    /// The program that is started as supervisor.
    pub(super) supervisor: PathBuf,
    /// The guest's name, where it has one.
    pub(super) name: Option<String>,
    /// Whether it was said that nobody can be asked what the hypervisor does.
    is_told_unknown: Cell<bool>,
    /// None where the guest is only read, and the host has no place for locks.
    lock: Option<DomainLock>,
}

impl LockedVm {
    pub(super) fn new(
        hypervisor: Box<dyn Hypervisor>,
        supervisor: PathBuf,
        name: Option<String>,
        lock: Option<DomainLock>,
    ) -> Self {
        Self {
            hypervisor,
            supervisor,
            name,
            is_told_unknown: Cell::new(false),
            lock,
        }
    }

    /// The guest's name, or its process.
    pub(super) fn shown(&self) -> String {
        self.name
            .clone()
            .unwrap_or_else(|| format!("process {}", self.hypervisor.identity().pid))
    }

    /// The lock, where there is one.
    pub(super) fn into_lock(self) -> Result<DomainLock, LockError> {
        let pid = self.hypervisor.identity().pid;
        self.lock.ok_or(LockError::NotTaken { pid })
    }

    /// Refuses where the hypervisor does something that a change would not survive.
    pub(super) fn refuse_if_busy(&self) -> Result<(), BusyError> {
        match self.hypervisor.activity()? {
            Activity::Busy(what) => Err(BusyError::Busy(what)),
            Activity::Idle => Ok(()),
            Activity::Unknown if self.is_told_unknown.replace(true) => Ok(()),
            Activity::Unknown => {
                tracing::warn!(
                    guest = self.shown(),
                    "nobody can be asked whether its memory is being migrated, saved or dumped: what that makes may hold half of a change"
                );
                Ok(())
            }
        }
    }
}

impl Vmm for LockedVm {
    type Error = HostError;

    fn memory(&self) -> &dyn PhysMemory {
        self.hypervisor.memory()
    }

    fn registers(&mut self) -> Result<Vec<Registers>, HostError> {
        Ok(self.hypervisor.registers_running()?)
    }

    fn require_idle(&self) -> Result<(), HostError> {
        Ok(self.refuse_if_busy()?)
    }

    fn remove_leftovers(&mut self) -> Result<(), HostError> {
        Ok(self.hypervisor.remove_leftovers()?)
    }

    fn begin(&mut self) -> Result<ForCommit<'_>, HostError> {
        let pid = self.hypervisor.identity().pid;
        let lock = self.lock.as_ref().ok_or(LockError::NotTaken { pid })?;
        let supervisor =
            Supervisor::start(&self.supervisor, &self.hypervisor.route(), lock).map_err(HostError::Supervisor)?;
        Ok(ForCommit {
            memory: self.hypervisor.memory(),
            machine: Box::new(SupervisedVcpus {
                hypervisor: self.hypervisor.as_ref(),
                machine: GuardedMachine::new(self.hypervisor.as_ref(), supervisor),
            }),
        })
    }
}

/// The vCPUs for one commit, and the supervisor beside them.
struct SupervisedVcpus<'a> {
    hypervisor: &'a dyn Hypervisor,
    machine: GuardedMachine<'a, Supervisor>,
}

impl Machine for SupervisedVcpus<'_> {
    fn guard(&mut self, journal: Option<&Journal>) -> Result<(), MachineError> {
        self.machine.guard(journal)
    }

    fn pause(&mut self) -> Result<Box<dyn Paused + '_>, MachineError> {
        self.machine.pause()
    }
}

impl Supervised for SupervisedVcpus<'_> {
    fn take_over(self: Box<Self>) -> Option<Effect> {
        let supervisor = self.machine.into_guard();
        self.hypervisor.disconnect();
        supervisor.take_over()
    }
}
