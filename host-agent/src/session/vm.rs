//! The host's side of a guest that is patched: its hypervisor, its lock, and the supervisor of each change.

use super::error::{BusyError, HostError};
use crate::broker::{BrokeredVm, Divided};
use crate::hypervisor::{Activity, GuardedMachine, Hypervisor, Identity, ReachError};
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
    reached: Reached,
    /// The guest's name, where it has one.
    pub(super) name: Option<String>,
    /// Whether it was said that nobody can be asked what the hypervisor does.
    is_told_unknown: Cell<bool>,
}

/// How it was reached.
enum Reached {
    /// By this process.
    Here {
        /// The VM: its memory and vCPUs.
        hypervisor: Box<dyn Hypervisor>,
        /// None where the guest is only read, and the host has no place for locks.
        lock: Option<DomainLock>,
        /// The program that is started as supervisor.
        supervisor: PathBuf,
    },
    /// By a broker, which has the lock.
    Brokered(BrokeredVm),
}

impl LockedVm {
    pub(super) fn new(divided: Divided, supervisor: PathBuf, name: Option<String>) -> Self {
        let reached = match divided {
            Divided::Worker(vm) => Reached::Brokered(vm),
            Divided::Whole { vm, lock } => Reached::Here {
                hypervisor: vm,
                lock,
                supervisor,
            },
        };
        Self {
            reached,
            name,
            is_told_unknown: Cell::new(false),
        }
    }

    /// Who the VM is.
    pub(super) fn identity(&self) -> &Identity {
        match &self.reached {
            Reached::Here { hypervisor, .. } => hypervisor.identity(),
            Reached::Brokered(vm) => vm.identity(),
        }
    }

    /// What the hypervisor does with the guest's memory now.
    pub(super) fn activity(&self) -> Result<Activity, ReachError> {
        match &self.reached {
            Reached::Here { hypervisor, .. } => hypervisor.activity(),
            Reached::Brokered(vm) => vm.activity(),
        }
    }

    /// The guest's name, or its process.
    pub(super) fn shown(&self) -> String {
        self.name
            .clone()
            .unwrap_or_else(|| format!("process {}", self.identity().pid))
    }

    /// Sets the program that is started as supervisor. A broker has been told.
    pub(super) fn set_supervisor(&mut self, program: PathBuf) {
        if let Reached::Here { supervisor, .. } = &mut self.reached {
            *supervisor = program;
        }
    }

    /// The lock, where there is one, and it is this process's.
    pub(super) fn into_lock(self) -> Result<DomainLock, LockError> {
        let pid = self.identity().pid;
        match self.reached {
            Reached::Here { lock: Some(lock), .. } => Ok(lock),
            Reached::Here { .. } | Reached::Brokered(_) => Err(LockError::NotTaken { pid }),
        }
    }

    /// Refuses where the hypervisor does something that a change would not survive.
    pub(super) fn refuse_if_busy(&self) -> Result<(), BusyError> {
        match self.activity()? {
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
        match &self.reached {
            Reached::Here { hypervisor, .. } => hypervisor.memory(),
            Reached::Brokered(vm) => vm.memory(),
        }
    }

    fn registers(&mut self) -> Result<Vec<Registers>, HostError> {
        Ok(match &self.reached {
            Reached::Here { hypervisor, .. } => hypervisor.registers_running(),
            Reached::Brokered(vm) => vm.registers_running(),
        }?)
    }

    fn require_idle(&self) -> Result<(), HostError> {
        Ok(self.refuse_if_busy()?)
    }

    fn remove_leftovers(&mut self) -> Result<(), HostError> {
        Ok(match &self.reached {
            Reached::Here { hypervisor, .. } => hypervisor.remove_leftovers(),
            Reached::Brokered(vm) => vm.remove_leftovers(),
        }?)
    }

    fn begin(&mut self) -> Result<ForCommit<'_>, HostError> {
        match &self.reached {
            Reached::Here {
                hypervisor,
                lock,
                supervisor,
            } => {
                let pid = hypervisor.identity().pid;
                let lock = lock.as_ref().ok_or(LockError::NotTaken { pid })?;
                let supervisor =
                    Supervisor::start(supervisor, &hypervisor.route(), lock).map_err(HostError::Supervisor)?;
                Ok(ForCommit {
                    memory: hypervisor.memory(),
                    machine: Box::new(SupervisedVcpus {
                        hypervisor: hypervisor.as_ref(),
                        machine: GuardedMachine::new(hypervisor.as_ref(), supervisor),
                    }),
                })
            }
            Reached::Brokered(vm) => Ok(ForCommit {
                memory: vm.memory(),
                machine: Box::new(vm.begin().map_err(HostError::Supervisor)?),
            }),
        }
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
