//! The entry for embedders: a guest that is opened once, and then patched.
//!
//! [`Guest`] keeps what was found in the guest, retries what the guest or its VMM disturbs, and recovers what was cut off. The
//! embedder gives memory and machine, as [`Embedded`] or as a [`Vmm`] of its own. `examples/embedder.rs` applies and reverts a patch so.

mod change;
mod error;
mod status;
mod transition;
mod vmm;

pub use error::{GuestState, OpenError, PatchError};
pub use status::{FunctionStatus, PatchStatus, Runs, Status};
pub use transition::InTransition;
pub use vmm::{Embedded, ForCommit, Supervised, Vmm};

use crate::commit::{self, CommitOptions, Committed, Model};
use crate::kernel::guard::{self, Guard};
use crate::kernel::{Kernel, Live};
use crate::plan::{self, ApplyOptions, Plan};
use crate::registry::{Cave, Record, Registry, SLOTS, cave};
use crate::text::chain;
use crate::transaction::Operation;
use crate::vcpu::Registers;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Longest pause before the guest is resumed without a write, to try again. Far above the length of a pause, even on a host whose
/// processors are all busy. Users of a guest notice a longer one.
const PAUSE_MAX: Duration = Duration::from_millis(250);
/// How long a safe moment for a recovery is waited for.
const RECOVERY_TIME_MAX: Duration = Duration::from_secs(10);
/// How long a safe moment is waited for to remove a patch that was replaced. Nobody can get into its code any more.
const REMOVAL_TIME_MAX: Duration = Duration::from_secs(1);
/// How long the kernel is searched for. What is read while the guest runs may belong to a process that just ends, or to a nested
/// guest that all vCPUs run, which leaves them for short moments only.
const FIND_TIME: Duration = Duration::from_secs(2);
/// Time between two searches.
const FIND_WAIT: Duration = Duration::from_millis(2);

/// How a patch is applied or reverted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PatchOptions {
    /// When it is safe to switch functions. A revert under [`Model::None`] waits for a clean cut, as its code is wiped.
    pub model: Model,
    /// How long a safe moment is waited for.
    pub timeout: Duration,
    /// With [`Model::Hybrid`]: how long an instant is waited for at which all tasks are clear, before a transition begins.
    pub grace: Duration,
}

/// A livepatch module to apply.
#[derive(Debug, Clone, Copy)]
pub struct PatchFile<'a> {
    /// How messages call it.
    pub name: &'a str,
    /// Its bytes.
    pub bytes: &'a [u8],
}

/// A change that was made.
#[derive(Debug, Clone)]
pub struct Changed {
    /// The record of the patch.
    pub record: Record,
    /// The pause, and the attempts.
    pub committed: Committed,
    /// True where it was made in a transition: tasks moved over one by one.
    pub by_task: bool,
    /// True where the patch was reverted.
    pub reverted: bool,
    /// Why the code of a patch that this one has replaced is still in the guest, where no function leads to it any more. The next
    /// [`Guest::recover`] tries to remove it again.
    pub left: Option<String>,
}

/// A guest: its kernel and its patches, as far as this process has read and changed them.
#[derive(Debug)]
pub struct Guest<V> {
    vmm: V,
    kernel: Kernel,
    vcpus: Vec<Registers>,
    caves: Vec<Cave>,
    registry: Registry,
    guard: Option<Guard>,
}

impl<V: Vmm> Guest<V> {
    /// Finds the kernel and the patches of the guest. Changes nothing.
    ///
    /// # Errors
    ///
    /// The VMM does not give the registers, or the guest is not understood.
    pub fn open(mut vmm: V) -> Result<Self, OpenError<V::Error>> {
        let (kernel, vcpus) = find_kernel(&mut vmm)?;
        let live = kernel.live(vmm.memory());
        let caves = cave::find(&live)?;
        let registry = Registry::find(&live, &caves)?;
        let guard = guard::find(&live)?;
        Ok(Self {
            vmm,
            kernel,
            vcpus,
            caves,
            registry,
            guard,
        })
    }

    /// The VMM.
    pub fn vmm(&self) -> &V {
        &self.vmm
    }

    /// The VMM, to change what a later operation asks of it.
    pub fn vmm_mut(&mut self) -> &mut V {
        &mut self.vmm
    }

    /// Leaves the guest, and gives the VMM back.
    pub fn into_vmm(self) -> V {
        self.vmm
    }

    /// The kernel.
    pub fn kernel(&self) -> &Kernel {
        &self.kernel
    }

    /// The kernel with the guest's memory.
    pub fn live(&self) -> Live<'_> {
        self.kernel.live(self.vmm.memory())
    }

    /// Registers of the vCPUs as they were when the kernel was found.
    pub fn vcpus(&self) -> &[Registers] {
        &self.vcpus
    }

    /// Text caves that are free.
    pub fn caves(&self) -> &[Cave] {
        &self.caves
    }

    /// The patches, as they were after the last operation.
    pub fn registry(&self) -> &Registry {
        &self.registry
    }

    /// The guest's integrity guard, as it was when the kernel was found. Each plan reads it again.
    pub fn guard(&self) -> Option<&Guard> {
        self.guard.as_ref()
    }

    /// Plans to apply `file`, and changes nothing. Plans again while the guest changes what the plan is made from.
    ///
    /// # Errors
    ///
    /// The module does not fit the guest, or the guest keeps changing.
    pub fn check(&self, file: PatchFile<'_>, options: &PatchOptions) -> Result<Plan, PatchError<V::Error>> {
        let plan = || self.plan(file, options, false);
        change::plan(Operation::Apply, file.name, options.timeout, plan)
    }

    /// Plans to revert the patch `id`, as [`check`](Self::check) does for an apply.
    ///
    /// # Errors
    ///
    /// The patch can't be reverted, or the guest keeps changing.
    pub fn check_revert(&self, id: &str, options: &PatchOptions) -> Result<Plan, PatchError<V::Error>> {
        let plan = || self.plan_revert(id);
        change::plan(Operation::Revert, id, options.timeout, plan)
    }

    /// Applies `file`. Where the module replaces all other patches, it takes their place in the same pause, and then they are removed. [`recover`](Self::recover) comes first, once after [`open`](Self::open).
    ///
    /// # Errors
    ///
    /// [`PatchError::guest_state`] tells what the guest is like.
    pub fn apply(&mut self, file: PatchFile<'_>, options: &PatchOptions) -> Result<Changed, PatchError<V::Error>> {
        if self.is_in_transition(file.bytes) {
            // The same again: what it waited for is waited for.
            if let Some(finished) = self.finish(options.timeout)? {
                return Ok(finished);
            }
        }
        self.finish_other()?;
        match options.model {
            Model::Hybrid => self.apply_hybrid(file, options),
            Model::CleanCut | Model::None => self.apply_at_once(file, options),
        }
    }

    /// Applies `file` at one instant.
    fn apply_at_once(&mut self, file: PatchFile<'_>, options: &PatchOptions) -> Result<Changed, PatchError<V::Error>> {
        let chosen = commit_options(options.model, options.timeout);
        let applied = self.change(Operation::Apply, file.name, chosen, |guest| {
            guest.plan(file, options, false)
        })?;
        if applied.record.replaces.is_empty() {
            return Ok(applied);
        }
        let (pause_us_max, left) = self.discard_replaced().map_err(PatchError::afterwards)?;
        self.wipe().map_err(PatchError::afterwards)?;
        let committed = Committed {
            pause_us_max: applied.committed.pause_us_max.max(pause_us_max),
            ..applied.committed
        };
        Ok(Changed {
            committed,
            left,
            ..applied
        })
    }

    /// Reverts the patch `id`, and wipes what is left of it. Its code is wiped when no task is in it any more.
    ///
    /// # Errors
    ///
    /// [`PatchError::guest_state`] tells what the guest is like.
    pub fn revert(&mut self, id: &str, options: &PatchOptions) -> Result<Changed, PatchError<V::Error>> {
        if self.is_being_reverted(id)
            && let Some(finished) = self.finish(options.timeout)?
        {
            return Ok(finished);
        }
        let reverted = match options.model {
            Model::Hybrid => self.revert_hybrid(id, options)?,
            Model::CleanCut | Model::None => self.revert_at_once(id, options.timeout)?,
        };
        self.recover().map_err(PatchError::afterwards)?;
        Ok(reverted)
    }

    /// Reverts the patch `id` at one instant.
    fn revert_at_once(&mut self, id: &str, timeout: Duration) -> Result<Changed, PatchError<V::Error>> {
        let chosen = commit_options(Model::CleanCut, timeout);
        self.change(Operation::Revert, id, chosen, |guest| guest.plan_revert(id))
    }

    /// Recovers what a process that was killed has left in guest and VMM: takes out patches whose commit was cut off, and wipes what is not in
    /// force. Gives the records of those that it took out.
    ///
    /// # Errors
    ///
    /// [`PatchError::guest_state`] tells what the guest is like.
    pub fn recover(&mut self) -> Result<Vec<Record>, PatchError<V::Error>> {
        self.ready()?;
        let removed = change::recover(self, commit_options(Model::CleanCut, RECOVERY_TIME_MAX))?;
        self.discard_replaced()?;
        change::unmark(self, commit_options(Model::CleanCut, RECOVERY_TIME_MAX))?;
        self.wipe()?;
        Ok(removed)
    }

    /// Removes patches that others have replaced, to which nothing leads. Gives the longest pause, and the reason where one has to stay.
    fn discard_replaced(&mut self) -> Result<(u64, Option<String>), PatchError<V::Error>> {
        let options = commit_options(Model::CleanCut, REMOVAL_TIME_MAX);
        let mut pause_us_max = 0;
        // A guest that changes the registry meanwhile does not keep vmpatch here.
        for _ in 0..SLOTS {
            match change::discard(self, options) {
                Ok(Some(removed)) => pause_us_max = pause_us_max.max(removed.pause_us_max),
                Ok(None) => break,
                Err(failure) if failure.guest_state() == GuestState::AsBefore => {
                    return Ok((pause_us_max, Some(chain(&failure))));
                }
                Err(failure) => return Err(failure),
            }
        }
        Ok((pause_us_max, None))
    }

    /// Wipes what is not in force.
    fn wipe(&mut self) -> Result<(), PatchError<V::Error>> {
        let live = self.live();
        let changes = plan::cleanup(&live, &self.registry)?;
        if changes.is_empty() {
            return Ok(());
        }
        if let Some(guard) = guard::find(&live)? {
            guard.permits()?;
        }
        let wiped = commit::stage(&live, &changes);
        self.reread()?;
        wiped.map_err(|source| PatchError::commit("reverted patches".to_owned(), Operation::Wipe, source))
    }

    /// Makes the VMM ready for changes of the guest.
    fn ready(&mut self) -> Result<(), PatchError<V::Error>> {
        self.vmm.require_idle().map_err(PatchError::Vmm)?;
        self.vmm.remove_leftovers().map_err(PatchError::Vmm)
    }

    fn plan(
        &self,
        file: PatchFile<'_>,
        options: &PatchOptions,
        in_transition: bool,
    ) -> Result<Plan, PatchError<V::Error>> {
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |since| since.as_secs());
        let chosen = ApplyOptions {
            model: options.model.name().to_owned(),
            now,
            in_transition,
        };
        plan::apply(&self.live(), &self.registry, file.bytes, &chosen).map_err(|source| PatchError::Refused {
            name: file.name.to_owned(),
            source: Box::new(source),
        })
    }

    fn plan_revert(&self, id: &str) -> Result<Plan, PatchError<V::Error>> {
        plan::revert(&self.live(), &self.registry, id).map_err(PatchError::revert(id))
    }

    /// Plans and commits, as the engine decides.
    fn change(
        &mut self,
        operation: Operation,
        id: &str,
        options: CommitOptions,
        mut plan: impl FnMut(&Self) -> Result<Plan, PatchError<V::Error>>,
    ) -> Result<Changed, PatchError<V::Error>> {
        let commit = &mut |guest: &mut Self, plan: Plan, timeout| {
            let committed = guest.commit(&plan, operation, CommitOptions { timeout, ..options })?;
            Ok(Changed {
                record: plan.record,
                committed,
                by_task: false,
                reverted: operation == Operation::Revert,
                left: None,
            })
        };
        change::run(self, operation, id, options.timeout, &mut plan, commit)
    }

    /// Commits a plan beside a supervisor, and reads the registry anew.
    fn commit(
        &mut self,
        plan: &Plan,
        operation: Operation,
        options: CommitOptions,
    ) -> Result<Committed, PatchError<V::Error>> {
        self.vmm.require_idle().map_err(PatchError::Vmm)?;
        let ForCommit { memory, mut machine } = self.vmm.begin().map_err(PatchError::Vmm)?;
        let live = self.kernel.live(memory);
        let result = commit::commit(&live, machine.as_mut(), plan, &options);
        let id = plan.record.id.clone();
        match result {
            Err(source) if source.left_paused() => {
                Err(PatchError::not_resumed(id, operation, machine.take_over(), source))
            }
            result => {
                drop(machine);
                let reread = self.reread();
                let committed = result.map_err(|source| PatchError::commit(id, operation, source))?;
                reread.map_err(PatchError::afterwards)?;
                Ok(committed)
            }
        }
    }

    fn reread(&mut self) -> Result<(), PatchError<V::Error>> {
        let live = self.live();
        let caves = cave::find(&live)?;
        self.registry = Registry::find(&live, &caves)?;
        self.caves = caves;
        Ok(())
    }
}

fn commit_options(model: Model, timeout: Duration) -> CommitOptions {
    CommitOptions {
        model,
        timeout,
        pause_max: PAUSE_MAX,
    }
}

fn find_kernel<V: Vmm>(vmm: &mut V) -> Result<(Kernel, Vec<Registers>), OpenError<V::Error>> {
    let start = Instant::now();
    loop {
        let vcpus = vmm.registers().map_err(OpenError::Vmm)?;
        match Kernel::find(vmm.memory(), &vcpus) {
            Ok(kernel) => return Ok((kernel, vcpus)),
            Err(error) if start.elapsed() > FIND_TIME => return Err(error.into()),
            Err(_) => std::thread::sleep(FIND_WAIT),
        }
    }
}
