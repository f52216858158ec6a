//! A guest that vmpatch has reached and understood.

mod change;
mod error;

pub use error::{BusyError, OpenError, PatchError};

use crate::chain::chain;
use crate::hypervisor::{Activity, GuardedMachine, Hypervisor};
use crate::lock::{DomainLock, LOCK_TIME_MAX, LockError};
use crate::module_file;
use crate::supervisor::Supervisor;
use crate::target::Target;
use guest_core::commit::{self, CommitError, CommitOptions, Committed, Effect, Model};
use guest_core::kernel::Live;
use guest_core::kernel::guard::{self, Guard};
use guest_core::plan::{self, ApplyOptions, Plan};
use guest_core::registry::{Cave, Record, Registry, cave};
use guest_core::transaction::Operation;
use guest_core::{Kernel, Registers};
use std::cell::Cell;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Longest pause before vmpatch resumes the guest without having written, to try again. Far above what a pause takes, even on a host
/// whose processors are all busy; a guest that stands longer than this is noticed by whoever uses it.
const PAUSE_MAX: Duration = Duration::from_millis(250);
/// How long it is tried to take back what was cut off.
const RECOVERY_TIME_MAX: Duration = Duration::from_secs(10);
/// How long the kernel is looked for: what is read while the guest runs may belong to a process that just ends, or to a nested
/// guest that all vCPUs run, which leaves them for short moments only.
const FIND_TIME: Duration = Duration::from_secs(2);
/// Pause between two looks for it.
const FIND_WAIT: Duration = Duration::from_millis(2);

/// How a patch is applied or reverted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PatchOptions {
    /// When it is safe to switch functions. A revert always waits for a clean cut.
    pub model: Model,
    /// How long a safe moment is waited for.
    pub timeout: Duration,
}

/// A guest, its kernel and its patches.
pub struct Session {
    /// The VM: its memory and vCPUs.
    pub vm: Box<dyn Hypervisor>,
    /// The kernel.
    pub kernel: Kernel,
    /// Registers of the vCPUs as they were when the kernel was found.
    pub vcpus: Vec<Registers>,
    /// Text caves that are still free.
    pub caves: Vec<Cave>,
    /// The patches.
    pub registry: Registry,
    /// The program that is started as supervisor: this very one, unless an embedder that is not `vmpatch` says otherwise.
    pub supervisor: PathBuf,
    name: Option<String>,
    /// The guest's integrity guard, as it was when the kernel was found. Each plan reads it again.
    guard: Option<Guard>,
    /// Whether it was said that nobody can be asked what the hypervisor does.
    is_told_unknown: Cell<bool>,
    /// None where the guest is only read, and the host has no place for locks.
    lock: Option<DomainLock>,
}

impl Session {
    /// Reaches the guest to change it, and understands it. Nothing is changed yet, and the guest is not paused.
    pub fn open(target: &Target) -> Result<Self, OpenError> {
        Self::open_with(target, |pid| DomainLock::acquire_within(pid, LOCK_TIME_MAX).map(Some))
    }

    /// The same for a command that only reads. Where the host has no place for locks, it goes without, with a warning: another vmpatch
    /// that changes the guest meanwhile can make what is read wrong, and nothing else.
    pub fn open_to_read(target: &Target) -> Result<Self, OpenError> {
        Self::open_with(target, |pid| match DomainLock::acquire_within(pid, LOCK_TIME_MAX) {
            Err(error) if error.is_for_want_of_a_place() => {
                tracing::warn!("without a lock: {}", chain(&error).join(": "));
                Ok(None)
            }
            lock => lock.map(Some),
        })
    }

    fn open_with(
        target: &Target,
        lock: impl Fn(i32) -> Result<Option<DomainLock>, LockError>,
    ) -> Result<Self, OpenError> {
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
        tracing::debug!(guest = shown, "finding the kernel");
        let (kernel, vcpus) = find_kernel(vm.as_ref())?;
        let live = kernel.live(vm.memory());
        let caves = cave::find(&live)?;
        let registry = Registry::find(&live, &caves)?;
        let guard = guard::find(&live)?;
        tracing::info!("{}", kernel.banner);
        let name = target.name.clone().or_else(|| vm.identity().name.clone());
        Ok(Self {
            vm,
            kernel,
            vcpus,
            caves,
            registry,
            supervisor: std::env::current_exe().map_err(OpenError::Program)?,
            name,
            guard,
            is_told_unknown: Cell::new(false),
            lock,
        })
    }

    /// The guest's name, where it has one.
    pub fn name(&self) -> Option<&str> {
        self.name.as_deref()
    }

    /// The guest's integrity guard, as it was when the kernel was found. Each plan reads it again.
    pub fn guard(&self) -> Option<&Guard> {
        self.guard.as_ref()
    }

    /// The guest's name, or its process.
    pub fn shown(&self) -> String {
        self.name
            .clone()
            .unwrap_or_else(|| format!("process {}", self.vm.identity().pid))
    }

    /// The kernel with the guest's memory.
    pub fn live(&self) -> Live<'_> {
        self.kernel.live(self.vm.memory())
    }

    /// Plans to apply the module `file`, whose bytes are given. The guest is not touched.
    pub fn plan(&self, file: &Path, bytes: &[u8], options: &PatchOptions) -> Result<Plan, PatchError> {
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |since| since.as_secs());
        let chosen = ApplyOptions {
            model: options.model.name().to_owned(),
            now,
        };
        plan::apply(&self.live(), &self.registry, bytes, &chosen).map_err(|source| PatchError::Refused {
            path: file.to_owned(),
            source: Box::new(source),
        })
    }

    /// Applies the module `file`, whose bytes are given.
    pub fn apply(
        &mut self,
        file: &Path,
        bytes: &[u8],
        options: &PatchOptions,
    ) -> Result<(Record, Committed), PatchError> {
        let chosen = commit_options(options.model, options.timeout);
        let id = module_file::stem(file);
        change::carry_out(self, Operation::Apply, &id, chosen, |session| {
            session.plan(file, bytes, options)
        })
    }

    /// Plans to apply the module `file`, whose bytes are given, where need be more than once: a guest that loads a module changes what
    /// a plan is made from.
    pub fn check(&self, file: &Path, bytes: &[u8], options: &PatchOptions) -> Result<Plan, PatchError> {
        let id = module_file::stem(file);
        change::plan(Operation::Apply, &id, options.timeout, || {
            self.plan(file, bytes, options)
        })
    }

    /// The same for taking out the patch `id`.
    pub fn check_revert(&self, id: &str, options: &PatchOptions) -> Result<Plan, PatchError> {
        change::plan(Operation::Revert, id, options.timeout, || {
            plan::revert(&self.live(), &self.registry, id).map_err(PatchError::revert(id))
        })
    }

    /// Takes out the patch `id`, and wipes what is left of it. Whatever model was chosen: no task may be in the new code then,
    /// as that code is gone afterwards.
    pub fn revert(&mut self, id: &str, options: &PatchOptions) -> Result<(Record, Committed), PatchError> {
        let chosen = commit_options(Model::CleanCut, options.timeout);
        let reverted = change::carry_out(self, Operation::Revert, id, chosen, |session| {
            plan::revert(&session.live(), &session.registry, id).map_err(PatchError::revert(id))
        })?;
        self.tidy().map_err(PatchError::afterwards)?;
        Ok(reverted)
    }

    /// Carries out a plan, with a supervisor beside it, and reads the registry anew.
    fn commit(&mut self, plan: &Plan, operation: Operation, options: CommitOptions) -> Result<Committed, PatchError> {
        self.refuse_if_busy()?;
        let live = self.kernel.live(self.vm.memory());
        let pid = self.vm.identity().pid;
        let lock = self.lock.as_ref().ok_or(LockError::NotTaken { pid })?;
        let supervisor = Supervisor::start(&self.supervisor, &self.vm.route(), lock).map_err(PatchError::Supervisor)?;
        let mut machine = GuardedMachine::new(self.vm.as_ref(), supervisor);
        let result = commit::commit(&live, &mut machine, plan, &options);
        let supervisor = machine.into_guard();
        let id = plan.record.id.clone();
        match result {
            Err(source) if source.left_paused() => {
                self.vm.disconnect();
                Err(not_resumed(id, operation, supervisor.take_over(), source))
            }
            result => {
                // It ends before anything else is asked of the guest.
                drop(supervisor);
                let reread = self.reread();
                let committed = result.map_err(|source| change::failed(id, operation, source))?;
                reread.map_err(PatchError::afterwards)?;
                Ok(committed)
            }
        }
    }

    /// Wipes what a revert, or a vmpatch that was killed, has left; takes back what was half committed.
    pub fn tidy(&mut self) -> Result<(), PatchError> {
        self.refuse_if_busy()?;
        self.vm.remove_leftovers()?;
        change::recover(self, commit_options(Model::CleanCut, RECOVERY_TIME_MAX))?;
        let live = self.kernel.live(self.vm.memory());
        let changes = plan::cleanup(&live, &self.registry)?;
        if changes.is_empty() {
            return Ok(());
        }
        if let Some(guard) = guard::find(&live)? {
            guard.permits()?;
        }
        let wiped = commit::stage(&live, &changes);
        self.reread()?;
        wiped.map_err(|source| change::failed("reverted patches".to_owned(), Operation::Wipe, source))
    }

    /// Leaves the guest, but not the right to change it.
    pub fn into_lock(self) -> Result<DomainLock, LockError> {
        let pid = self.vm.identity().pid;
        self.lock.ok_or(LockError::NotTaken { pid })
    }

    /// Refuses where the hypervisor does something that a change would not survive.
    pub fn refuse_if_busy(&self) -> Result<(), BusyError> {
        match self.vm.activity()? {
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

    fn reread(&mut self) -> Result<(), PatchError> {
        let live = self.kernel.live(self.vm.memory());
        let caves = cave::find(&live)?;
        self.registry = Registry::find(&live, &caves)?;
        self.caves = caves;
        Ok(())
    }
}

/// The core's options, with the bound on the pause.
fn commit_options(model: Model, timeout: Duration) -> CommitOptions {
    CommitOptions {
        model,
        timeout,
        pause_max: PAUSE_MAX,
    }
}

/// A commit after which the guest did not run again; `settled` is what the supervisor that resumed it says of the commit.
fn not_resumed(id: String, operation: Operation, settled: Option<Effect>, source: CommitError) -> PatchError {
    let change = match settled.unwrap_or_else(|| source.effect()) {
        // What is in force then is that the patch's change is not.
        Effect::InForce if operation == Operation::Recover => Effect::AsBefore,
        Effect::AsBefore if operation == Operation::Recover => Effect::HalfPatched,
        effect => effect,
    };
    PatchError::NotResumed {
        operation,
        id,
        runs: settled.is_some(),
        change,
        source: Box::new(source),
    }
}

fn find_kernel(vm: &dyn Hypervisor) -> Result<(Kernel, Vec<Registers>), OpenError> {
    let start = Instant::now();
    loop {
        let vcpus = vm.registers_running()?;
        match Kernel::find(vm.memory(), &vcpus) {
            Ok(kernel) => return Ok((kernel, vcpus)),
            Err(error) if start.elapsed() > FIND_TIME => return Err(error.into()),
            Err(_) => std::thread::sleep(FIND_WAIT),
        }
    }
}
