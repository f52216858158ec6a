//! A guest that vmpatch has reached and understood.

mod error;
mod vm;

pub use error::{BusyError, HostError, OpenError, PatchError};
pub use guest_core::guest::{Changed, PatchOptions};

use self::vm::LockedVm;
use crate::broker::divide;
use crate::chain::chain;
use crate::hypervisor::{Activity, Identity, ReachError};
use crate::lock::{DomainLock, LOCK_TIME_MAX, LockError};
use crate::module_file;
use crate::sandbox::Sandbox;
use crate::target::Target;
use guest_core::guest::{Guest, InTransition, PatchFile, Status, Vmm};
use guest_core::kernel::Live;
use guest_core::kernel::guard::Guard;
use guest_core::plan::{Plan, TransitionError};
use guest_core::registry::{Cave, Record, Registry};
use guest_core::{Kernel, PhysMemory, Registers};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// A guest, its kernel and its patches, locked and with a supervisor beside each change.
pub struct Session {
    guest: Guest<LockedVm>,
}

/// What a guest is opened for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// To change it.
    Change,
    /// To read it. Where the host has no place for locks, it goes without, with a warning: another vmpatch that changes the guest meanwhile
    /// can make what is read wrong, and nothing else.
    Read,
}

impl Access {
    fn lock(self, pid: i32) -> Result<Option<DomainLock>, LockError> {
        match DomainLock::acquire_within(pid, LOCK_TIME_MAX) {
            Err(error) if self == Self::Read && error.is_for_want_of_a_place() => {
                tracing::warn!("without a lock: {}", chain(&error).join(": "));
                Ok(None)
            }
            lock => lock.map(Some),
        }
    }
}

impl Session {
    /// Reaches the guest to change it, and understands it. Nothing is changed yet, and the guest is not paused.
    pub fn open(target: &Target) -> Result<Self, OpenError> {
        Ok(Self::open_divided(target, Access::Change, Sandbox::Off, |_| ())?.0)
    }

    /// The same for a command that only reads.
    pub fn open_to_read(target: &Target) -> Result<Self, OpenError> {
        Ok(Self::open_divided(target, Access::Read, Sandbox::Off, |_| ())?.0)
    }

    /// Reaches the guest, divides this process ([`Sandbox`]), and understands the guest. What returns is a new process without rights: it can
    /// open nothing and start nothing, and ends with the process that called, which has the rights and does not return.
    ///
    /// For a program with one thread, which opens all that it needs before; `before` is its last occasion. Where the process has more threads,
    /// or the host does not let it divide itself, it stays as it is, unless the sandbox is required.
    pub fn open_divided<T>(
        target: &Target,
        access: Access,
        sandbox: Sandbox,
        before: impl FnOnce(&Identity) -> T,
    ) -> Result<(Self, T), OpenError> {
        let lock = |pid| access.lock(pid);
        let shown = target.name.clone().unwrap_or_else(|| target.route.to_string());
        tracing::debug!(guest = shown, "connecting");
        // Where the process is known, the lock comes first: it tells of another vmpatch, where QEMU's socket is just unresponsive.
        let early = target.pid.map(&lock).transpose()?;
        let vm = target.route.open()?;
        let pid = vm.identity().pid;
        let lock = match early {
            Some(early) if target.pid == Some(pid) => early,
            Some(_) => {
                let (expected, found) = (target.pid.unwrap_or(0), pid);
                return Err(OpenError::OtherProcess {
                    route: target.route.clone(),
                    expected,
                    found,
                });
            }
            None => lock(pid)?,
        };
        let supervisor = std::env::current_exe().map_err(OpenError::Program)?;
        let name = target.name.clone().or_else(|| vm.identity().name.clone());
        let before = before(vm.identity());
        let divided = divide(vm, lock, access == Access::Change, &supervisor, sandbox)?;
        tracing::debug!(guest = shown, "finding the kernel");
        let guest = Guest::open(LockedVm::new(divided, supervisor, name))?;
        tracing::info!("{}", guest.kernel().banner);
        Ok((Self { guest }, before))
    }

    /// The guest's name, where it has one.
    pub fn name(&self) -> Option<&str> {
        self.guest.vmm().name.as_deref()
    }

    /// The guest's name, or its process.
    pub fn shown(&self) -> String {
        self.guest.vmm().shown()
    }

    /// Who the VM is.
    pub fn identity(&self) -> &Identity {
        self.guest.vmm().identity()
    }

    /// The guest's memory.
    pub fn memory(&self) -> &dyn PhysMemory {
        self.guest.vmm().memory()
    }

    /// What the hypervisor does with the guest's memory now.
    ///
    /// # Errors
    ///
    /// It was asked and did not answer.
    pub fn activity(&self) -> Result<Activity, ReachError> {
        self.guest.vmm().activity()
    }

    /// The program that is started as supervisor. It is this very one, unless an embedder that is not `vmpatch` says otherwise. A process
    /// that was divided has said it before.
    pub fn set_supervisor(&mut self, program: PathBuf) {
        self.guest.vmm_mut().set_supervisor(program);
    }

    /// The guest's integrity guard, as it was when the kernel was found. Each plan reads it again.
    pub fn guard(&self) -> Option<&Guard> {
        self.guest.guard()
    }

    /// The kernel.
    pub fn kernel(&self) -> &Kernel {
        self.guest.kernel()
    }

    /// The kernel with the guest's memory.
    pub fn live(&self) -> Live<'_> {
        self.guest.live()
    }

    /// Registers of the vCPUs as they were when the kernel was found.
    pub fn vcpus(&self) -> &[Registers] {
        self.guest.vcpus()
    }

    /// Text caves that are still free.
    pub fn caves(&self) -> &[Cave] {
        self.guest.caves()
    }

    /// The patches.
    pub fn registry(&self) -> &Registry {
        self.guest.registry()
    }

    /// What of each patch is in force, as the guest says now.
    pub fn status(&self) -> Status<'_> {
        self.guest.status()
    }

    /// Applies the module `file`, whose bytes are given.
    pub fn apply(&mut self, file: &Path, bytes: &[u8], options: &PatchOptions) -> Result<Changed, PatchError> {
        let name = &module_file::stem(file);
        let applied = self.guest.apply(PatchFile { name, bytes }, options);
        applied.map_err(PatchError::of(file))
    }

    /// Plans to apply the module `file`, whose bytes are given, where need be more than once: a guest that loads a module changes what
    /// a plan is made from.
    pub fn check(&self, file: &Path, bytes: &[u8], options: &PatchOptions) -> Result<Plan, PatchError> {
        let name = &module_file::stem(file);
        let planned = self.guest.check(PatchFile { name, bytes }, options);
        planned.map_err(PatchError::of(file))
    }

    /// The same for taking out the patch `id`.
    pub fn check_revert(&self, id: &str, options: &PatchOptions) -> Result<Plan, PatchError> {
        Ok(self.guest.check_revert(id, options)?)
    }

    /// Takes out the patch `id`, and wipes what is left of it. Whatever model was chosen: no task may be in the new code then,
    /// as that code is gone afterwards.
    pub fn revert(&mut self, id: &str, options: &PatchOptions) -> Result<Changed, PatchError> {
        Ok(self.guest.revert(id, options)?)
    }

    /// Ends the transition that is under way, as soon as no task runs the old code; `None` where none is.
    pub fn finish(&mut self, timeout: Duration) -> Result<Option<Changed>, PatchError> {
        Ok(self.guest.finish(timeout)?)
    }

    /// The patch that is in transition, and which tasks run the old code; `None` where none is.
    pub fn in_transition(&self) -> Result<Option<InTransition>, TransitionError> {
        self.guest.in_transition()
    }

    /// Takes out patches whose commit was cut off as vmpatch was killed, gives their records, and wipes what they and others have left.
    pub fn recover(&mut self) -> Result<Vec<Record>, PatchError> {
        let removed = self.guest.recover()?;
        for record in &removed {
            tracing::warn!(
                guest = self.shown(),
                "took out {}: vmpatch was killed while it changed that patch",
                record.id
            );
        }
        Ok(removed)
    }

    /// Leaves the guest, but not the right to change it.
    pub fn into_lock(self) -> Result<DomainLock, LockError> {
        self.guest.into_vmm().into_lock()
    }

    /// Refuses where the hypervisor does something that a change would not survive.
    pub fn refuse_if_busy(&self) -> Result<(), BusyError> {
        self.guest.vmm().refuse_if_busy()
    }
}
