//! A guest that vmpatch has reached and understood.

use crate::attach::Attached;
use crate::cli::Options;
use crate::domains::{self, Domain};
use crate::error::{self, Failure};
use crate::lock::{DomainLock, LockError};
use crate::module_file;
use crate::progress::Progress;
use crate::report;
use crate::retry::Retry;
use crate::state::GuestState;
use crate::upgrade::{self, UpgradeError};
use guest_core::commit::{self, CommitError, CommitOptions, Committed, Effect, Model};
use guest_core::kernel::Live;
use guest_core::kernel::guard::{self, Guard};
use guest_core::machine::Machine;
use guest_core::place::{Cave, Entry, Record, Registry, State, cave};
use guest_core::plan::{self, ApplyOptions, Plan};
use guest_core::{Kernel, Registers};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Longest pause before vmpatch resumes the guest without having written, to try again. Far above what a pause takes, even on a host
/// whose processors are all busy; a guest that stands longer than this is noticed by whoever uses it.
const PAUSE_MAX: Duration = Duration::from_millis(250);
/// How long another vmpatch at work on the domain is waited for: its supervisor may just be taking something back.
pub(crate) const LOCK_TIME_MAX: Duration = Duration::from_secs(5);
/// How often a change is planned anew where taking it back failed.
const PLANS_MAX: usize = 8;
/// How long it is tried to take back what was cut off.
const RECOVERY_TIME_MAX: Duration = Duration::from_secs(10);
/// How long the kernel is looked for: what is read while the guest runs may belong to a process that just ends, or to a nested
/// guest that all vCPUs run, which leaves them for short moments only.
const FIND_TIME: Duration = Duration::from_secs(2);
/// Pause between two looks for it.
const FIND_WAIT: Duration = Duration::from_millis(2);

/// Which guest, and where its QMP socket is.
#[derive(Debug, Clone)]
pub struct Target {
    /// Its name, where it was found by name.
    pub name: Option<String>,
    /// Its process, where that is known before connecting.
    pub pid: Option<i32>,
    /// The QMP socket.
    pub socket: PathBuf,
}

impl Target {
    /// From `--domain` or `--qmp`. Where a move into another QEMU was cut off on that domain, it is brought to an end first, so that
    /// the guest is in one process.
    pub fn from_options(options: &Options) -> Result<Self, Failure> {
        let target = Self::find(options)?;
        let survey = domains::all()?;
        let old = survey.iter().find(|domain| Some(domain.pid) == target.pid);
        match old.and_then(|old| Some((old, survey.successor_of(old.pid)?))) {
            None => Ok(target),
            Some((old, successor)) => {
                upgrade::resume_cut_off(old, successor)?;
                Self::find(options)
            }
        }
    }

    fn find(options: &Options) -> Result<Self, Failure> {
        match (&options.domain, &options.qmp) {
            (_, Some(socket)) => {
                let survey = domains::all()?;
                if let Some(successor) = survey.successor_at(socket) {
                    return Err(UpgradeError::UnderWay {
                        old: successor.old,
                        new: successor.domain.pid,
                    }
                    .into());
                }
                let pid = survey.by_qmp(socket).map(|domain| domain.pid);
                Ok(Self {
                    name: None,
                    pid,
                    socket: socket.clone(),
                })
            }
            (Some(name), None) => Self::of_domain(&domains::find(name)?),
            (None, None) => Err(Failure::NoTarget),
        }
    }

    /// A domain that was found.
    pub fn of_domain(domain: &Domain) -> Result<Self, Failure> {
        Ok(Self {
            name: domain.name.clone(),
            pid: Some(domain.pid),
            socket: domain.qmp_socket()?,
        })
    }
}

/// A guest, its kernel and its patches.
pub struct Session {
    /// QEMU and the guest's memory.
    pub attached: Attached,
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
    /// None where the guest is only read, and the host has no place for locks.
    lock: Option<DomainLock>,
}

impl Session {
    /// Reaches the guest to change it, and understands it. Nothing is changed yet, and the guest is not paused.
    pub fn open(target: &Target, progress: &Progress) -> Result<Self, Failure> {
        Self::open_with(target, progress, |pid| {
            DomainLock::acquire_within(pid, LOCK_TIME_MAX).map(Some)
        })
    }

    /// The same for a command that only reads. Where the host has no place for locks, it goes without, with a warning: another vmpatch
    /// that changes the guest meanwhile can make what is read wrong, and nothing else.
    pub fn open_to_read(target: &Target, progress: &Progress) -> Result<Self, Failure> {
        Self::open_with(target, progress, |pid| {
            match DomainLock::acquire_within(pid, LOCK_TIME_MAX) {
                Err(error) if error.is_for_want_of_a_place() => {
                    progress.warning(&format!("without a lock: {}", Failure::from(error).chain().join(": ")));
                    Ok(None)
                }
                lock => lock.map(Some),
            }
        })
    }

    fn open_with(
        target: &Target,
        progress: &Progress,
        lock: impl Fn(i32) -> Result<Option<DomainLock>, LockError>,
    ) -> Result<Self, Failure> {
        let shown = target
            .name
            .clone()
            .unwrap_or_else(|| target.socket.display().to_string());
        progress.step(&format!("{shown}: connecting"));
        // Where the process is known, the lock comes first: it tells of another vmpatch, where QEMU's socket is just mute.
        let early = target.pid.map(&lock).transpose()?;
        let attached = Attached::open(&target.socket)?;
        let lock = match early {
            Some(early) if target.pid == Some(attached.pid()) => early,
            Some(_) => {
                let (expected, found) = (target.pid.unwrap_or(0), attached.pid());
                return Err(Failure::OtherProcess {
                    socket: target.socket.clone(),
                    expected,
                    found,
                });
            }
            None => lock(attached.pid())?,
        };
        progress.step(&format!("{shown}: finding the kernel"));
        let (kernel, vcpus) = find_kernel(&attached)?;
        let live = kernel.live(attached.memory());
        let caves = cave::find(&live)?;
        let registry = Registry::find(&live, &caves)?;
        let guard = guard::find(&live)?;
        progress.detail(&kernel.banner);
        let name = target.name.clone().or(attached.name());
        Ok(Self {
            attached,
            kernel,
            vcpus,
            caves,
            registry,
            supervisor: std::env::current_exe().map_err(Failure::Supervisor)?,
            name,
            guard,
            lock,
        })
    }

    /// The guest, for the report.
    pub fn guest(&self) -> report::Guest {
        report::Guest {
            domain: self.name.clone(),
            pid: self.attached.pid(),
            release: self.kernel.release.clone(),
            integrity_guard: self.guard.as_ref().map(report::IntegrityGuard::from),
        }
    }

    /// The guest's name, or its process.
    pub fn shown(&self) -> String {
        self.name
            .clone()
            .unwrap_or_else(|| format!("process {}", self.attached.pid()))
    }

    /// The kernel with the guest's memory.
    pub fn live(&self) -> Live<'_> {
        self.kernel.live(self.attached.memory())
    }

    /// Plans to apply the module `file`, whose bytes are given. The guest is not touched.
    pub fn plan(&self, file: &Path, bytes: &[u8], options: &Options) -> Result<Plan, Failure> {
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |since| since.as_secs());
        let chosen = ApplyOptions {
            model: options.model.name().to_owned(),
            now,
        };
        plan::apply(&self.live(), &self.registry, bytes, &chosen).map_err(|source| Failure::Refused {
            path: file.to_owned(),
            source: Box::new(source),
        })
    }

    /// Applies the module `file`, whose bytes are given.
    pub fn apply(&mut self, file: &Path, bytes: &[u8], options: &Options) -> Result<(Record, Committed), Failure> {
        let chosen = commit_options(options.model.model(), options.timeout());
        let id = module_file::stem(file);
        self.carry_out(error::APPLYING, &id, chosen, |session| {
            session.plan(file, bytes, options)
        })
    }

    /// Plans to apply the module `file`, whose bytes are given, where need be more than once: a guest that loads a module changes what
    /// a plan is made from.
    pub fn check(&self, file: &Path, bytes: &[u8], options: &Options) -> Result<Plan, Failure> {
        let retry = Retry::new(error::APPLYING, &module_file::stem(file), options.timeout());
        retry.run(|| self.plan(file, bytes, options))
    }

    /// The same for taking out the patch `id`.
    pub fn check_revert(&self, id: &str, options: &Options) -> Result<Plan, Failure> {
        let retry = Retry::new(error::REVERTING, id, options.timeout());
        retry.run(|| Ok(plan::revert(&self.live(), &self.registry, id)?))
    }

    /// Takes out the patch `id`, and wipes what is left of it. Whatever model was chosen: no task may be in the new code then,
    /// as that code is gone afterwards.
    pub fn revert(&mut self, id: &str, options: &Options) -> Result<(Record, Committed), Failure> {
        let chosen = commit_options(Model::CleanCut, options.timeout());
        let reverted = self.carry_out(error::REVERTING, id, chosen, |session| {
            Ok(plan::revert(&session.live(), &session.registry, id)?)
        })?;
        self.tidy().map_err(|failure| failure.after(GuestState::InForce))?;
        Ok(reverted)
    }

    /// Plans and commits; where the guest is not any more as it was planned for, again. So where taking back failed: what was cut off
    /// is taken back by a commit of its own, of a revert the rest is done.
    fn carry_out(
        &mut self,
        doing: &'static str,
        id: &str,
        options: CommitOptions,
        plan: impl Fn(&Self) -> Result<Plan, Failure>,
    ) -> Result<(Record, Committed), Failure> {
        let (mut plans, mut half) = (0, None);
        let mut retry = Retry::new(doing, id, options.timeout);
        loop {
            let timeout = retry.left();
            let done = plan(self).and_then(|plan| {
                let committed = self.commit(&plan, doing, CommitOptions { timeout, ..options })?;
                Ok((plan.record, committed))
            });
            let failure = match done {
                Ok(done) => return Ok(done),
                Err(failure) => failure,
            };
            match failure {
                Failure::Commit { source, id, .. }
                    if matches!(*source, CommitError::HalfDone { .. }) && plans < PLANS_MAX =>
                {
                    plans += 1;
                    half = Some((source.to_string(), id.clone()));
                    self.mend(id, doing, *source)?;
                }
                failure => {
                    let Err(failure) = retry.after(failure) else { continue };
                    // The guest is as the earlier failure left it, not as before.
                    let undo = failure.chain().join(": ");
                    return Err(match half {
                        Some((first, id)) => failed(id, doing, CommitError::HalfDone { first, undo }),
                        None => failure,
                    });
                }
            }
        }
    }

    /// Where taking back failed, in the pause: takes back what was cut off by a commit of its own.
    ///
    /// Ok where the change is to be planned anew: a revert, of which the rest is to be done.
    fn mend(&mut self, id: String, doing: &'static str, half: CommitError) -> Result<(), Failure> {
        let mended = self.reread().and_then(|()| self.tidy());
        if let Err(failure @ Failure::NotResumed { .. }) = mended {
            return Err(failure);
        }
        let mended = mended.is_ok();
        let is_it = |entry: &&Entry| entry.state != State::Kept && entry.record().is_some_and(|record| record.id == id);
        let state = self.registry.entries.iter().find(is_it).map(|entry| entry.state);
        match (half, state) {
            (_, Some(State::Applied)) if mended && doing == error::REVERTING => Ok(()),
            (CommitError::HalfDone { first, .. }, None) if mended => Err(Failure::TakenBack { doing, id, first }),
            (half, _) => Err(failed(id, doing, half)),
        }
    }

    /// Carries out a plan, with a supervisor beside it, and reads the registry anew.
    fn commit(&mut self, plan: &Plan, doing: &'static str, options: CommitOptions) -> Result<Committed, Failure> {
        self.refuse_if_busy()?;
        let live = self.kernel.live(self.attached.memory());
        let pid = self.attached.pid();
        let lock = self.lock.as_ref().ok_or(LockError::NotTaken { pid })?;
        let mut machine = self
            .attached
            .machine(&self.supervisor, lock)
            .map_err(Failure::Supervisor)?;
        let result = commit::commit(&live, &mut machine as &mut dyn Machine, plan, &options);
        let supervisor = machine.into_supervisor();
        let id = plan.record.id.clone();
        match result {
            Err(source) if source.left_paused() => {
                self.attached.disconnect();
                Err(not_resumed(id, doing, supervisor.take_over(), source))
            }
            result => {
                // It ends before anything else is asked of the guest.
                drop(supervisor);
                let reread = self.reread();
                let committed = result.map_err(|source| failed(id, doing, source))?;
                reread.map_err(|failure| failure.after(GuestState::InForce))?;
                Ok(committed)
            }
        }
    }

    /// Wipes what a revert, or a vmpatch that was killed, has left; takes back what was half committed.
    pub fn tidy(&mut self) -> Result<(), Failure> {
        self.refuse_if_busy()?;
        self.attached.close_left_stub()?;
        let recovering = Retry::new(error::TAKING_BACK, "what was cut off", RECOVERY_TIME_MAX);
        recovering.run(|| {
            while let Some(plan) = plan::recovery(&self.live(), &self.registry)? {
                let options = commit_options(Model::CleanCut, RECOVERY_TIME_MAX);
                self.commit(&plan, error::TAKING_BACK, options)?;
            }
            Ok(())
        })?;
        let live = self.kernel.live(self.attached.memory());
        let changes = plan::cleanup(&live, &self.registry)?;
        if let Some(guard) = guard::find(&live)?.filter(|_| !changes.is_empty()) {
            guard.permits()?;
        }
        let wiped = commit::lay(&live, &changes);
        self.reread()?;
        wiped.map_err(|source| Failure::Commit {
            doing: "wiping what is left of",
            id: "reverted patches".to_owned(),
            source: Box::new(source),
        })
    }

    /// Leaves the guest, but not the right to change it.
    pub fn into_lock(self) -> Result<DomainLock, LockError> {
        let pid = self.attached.pid();
        self.lock.ok_or(LockError::NotTaken { pid })
    }

    /// Refuses where QEMU does something that a change would not survive.
    pub fn refuse_if_busy(&self) -> Result<(), Failure> {
        match self.attached.busy_with()? {
            Some(what) => Err(Failure::Busy(what.to_string())),
            None => Ok(()),
        }
    }

    fn reread(&mut self) -> Result<(), Failure> {
        let live = self.kernel.live(self.attached.memory());
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

fn failed(id: String, doing: &'static str, source: CommitError) -> Failure {
    Failure::Commit {
        doing,
        id,
        source: Box::new(source),
    }
}

/// A commit after which the guest did not run again; `settled` is what the supervisor that resumed it says of the commit.
fn not_resumed(id: String, doing: &'static str, settled: Option<Effect>, source: CommitError) -> Failure {
    let change = match settled.unwrap_or_else(|| source.effect()) {
        // What is in force then is that the patch's change is not.
        Effect::InForce if doing == error::TAKING_BACK => Effect::AsBefore,
        Effect::AsBefore if doing == error::TAKING_BACK => Effect::HalfPatched,
        effect => effect,
    };
    Failure::NotResumed {
        doing,
        id,
        runs: settled.is_some(),
        change,
        source: Box::new(source),
    }
}

fn find_kernel(attached: &Attached) -> Result<(Kernel, Vec<Registers>), Failure> {
    let start = Instant::now();
    loop {
        let vcpus = attached.registers_running()?;
        match Kernel::find(attached.memory(), &vcpus) {
            Ok(kernel) => return Ok((kernel, vcpus)),
            Err(error) if start.elapsed() > FIND_TIME => return Err(error.into()),
            Err(_) => std::thread::sleep(FIND_WAIT),
        }
    }
}
