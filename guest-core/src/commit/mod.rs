//! Commits a plan: stages changes while the guest runs, pauses the vCPUs, checks quiescence and preconditions, writes the atomic changes,
//! reads them back, and resumes.
//!
//! After any failure, the commit restores the old bytes before the vCPUs run again.

mod describe;
mod effect;
mod marks;
mod pacing;
mod preview;
mod roll_back;
mod write;

pub use effect::Effect;
pub use roll_back::roll_back;

use self::describe::describe;
use self::marks::{Decision, Marking};
use self::pacing::{Pacing, Seen};
use self::preview::preview;
use self::roll_back::is_complete;
use self::write::write;
use crate::change::{Change, ChangeError};
use crate::kernel::locks::{Held, Locks};
use crate::kernel::{KernelError, Live};
use crate::machine::{Journal, Machine, MachineError, PauseTimes, Paused};
use crate::memory::{PhysMemory, VirtMemory};
use crate::plan::{Marks, Plan};
use crate::task::{Quiescence, Snapshot, Verdict};
use crate::text::chain;
use crate::unwind::{OldCode, SetupError};
use crate::vcpu::Registers;
use std::time::{Duration, Instant};

/// The consistency model: what must hold when the atomic changes are made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Model {
    /// Nothing: stacks are not checked (as in upstream livepatch of Linux 4.0).
    None,
    /// All tasks are clear of all old functions at one instant (as in kpatch).
    CleanCut,
    /// As [`Model::CleanCut`], if that is so soon. Else each task is moved over by itself (as in upstream livepatch): those inside an old function run
    /// the old code until they have left it, all others the new.
    Hybrid,
}

impl Model {
    /// Its name, in records and options.
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::CleanCut => "clean-cut",
            Self::Hybrid => "hybrid",
        }
    }
}

/// How the operator wants the plan to be committed.
#[derive(Debug, Clone, Copy)]
pub struct CommitOptions {
    /// Consistency model.
    pub model: Model,
    /// How long attempts are repeated while it is not safe.
    pub timeout: Duration,
    /// Longest pause before the writes: after it, the attempt ends without a write.
    pub pause_max: Duration,
}

/// A plan that was committed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Committed {
    /// The pause in which the plan was committed.
    pub pause: PauseTimes,
    /// Number of attempts, the successful one counted.
    pub tries: u32,
    /// Longest pause of all attempts, in microseconds.
    pub pause_us_max: u64,
}

/// Why an attempt made no change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NotSafe {
    /// Tasks are inside the functions, or their stacks cannot be understood.
    Stacks(Verdict),
    /// The guest held a lock: it was changing its own text or modules.
    Held(Held),
    /// The guest changes what the plan was made from faster than vmpatch can plan and commit.
    Changing,
    /// The pause was too long before the first write: the host is busy.
    TooLong {
        /// Length of the pause when the attempt was given up, in microseconds.
        took_us: u64,
        /// Longest pause allowed, in microseconds.
        allowed_us: u64,
    },
}

/// Why a plan was not committed. [`CommitError::effect`] tells what is in the guest.
#[derive(Debug, thiserror::Error)]
pub enum CommitError {
    /// No attempt within the time was safe.
    #[error("not safe within {} ms, {tries} attempts: {why_text}", waited.as_millis())]
    NotSafe {
        /// Why the last attempt made no change.
        why: NotSafe,
        /// The same as text, with the names of tasks and functions.
        why_text: String,
        /// Number of attempts.
        tries: u32,
        /// Time from the first attempt to the last.
        waited: Duration,
    },
    /// The guest has changed bytes that the plan was made from or replaces.
    #[error("the guest has changed since the plan was made")]
    Changed(#[from] ChangeError),
    /// The VMM did not do what the commit asked for.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// The guest's kernel cannot be read.
    #[error("reading the guest's kernel")]
    Kernel(#[from] KernelError),
    /// The stacks of this kernel's tasks cannot be checked.
    #[error("finding the guest's tasks")]
    Tasks(#[from] SetupError),
    /// The rollback failed, too: the guest may be half patched. [`recovery`](crate::plan::recovery) plans the rest from the registry.
    #[error("the rollback failed ({undo}) after: {first}")]
    HalfDone {
        /// What failed first.
        first: String,
        /// What failed in the rollback.
        undo: String,
    },
    /// The VMM did not end the pause as it should.
    #[error("the pause did not end{}", after(first.as_deref()))]
    NotResumed {
        /// How much of the change is in the guest.
        effect: Effect,
        /// What failed in the pause before.
        first: Option<String>,
        /// The VMM's failure. It tells whether the guest was left paused.
        source: MachineError,
    },
}

fn after(first: Option<&str>) -> String {
    first.map_or(String::new(), |first| format!(" after: {first}"))
}

/// Commits `plan`.
///
/// # Errors
///
/// [`CommitError::effect`] tells what is in the guest. After an error with [`CommitError::left_paused`], the supervisor keeps the journal,
/// and must resume the guest.
pub fn commit(
    live: &Live<'_>,
    machine: &mut dyn Machine,
    plan: &Plan,
    options: &CommitOptions,
) -> Result<Committed, CommitError> {
    let locks = locks(live, plan)?;
    let finder = match options.model {
        Model::CleanCut | Model::Hybrid => Some(Quiescence::find(live)?),
        Model::None => None,
    };
    let mut marks = Marking::of(live, &plan.marks)?;
    let mut stacks = match &finder {
        Some(finder) => {
            let old = OldCode::new(plan.must_be_quiescent.clone()).with_data(&plan.unreferenced);
            Some(finder.snapshot(live, old, plan.patch_code.clone())?)
        }
        None => None,
    };
    machine.guard(Some(&journal_with(live, plan, &locks, marks.as_ref())?))?;
    let result = stage(live, &plan.staged).and_then(|()| {
        let attempts = Attempts {
            live,
            plan,
            options,
            locks: &locks,
            stacks: &mut stacks,
            marks: marks.as_mut(),
        };
        attempts.until_safe(machine).or_else(|error| {
            // Staged changes stay where old functions may lead to the new code, and where the supervisor rolls the commit back.
            let is_left = matches!(error, CommitError::HalfDone { .. } | CommitError::NotResumed { .. });
            let is_left = is_left || has_begun(live, &plan.marks);
            match is_left || is_complete(live.memory, &plan.atomic) {
                true => Err(error),
                false => roll_back_after(live.memory, &plan.staged, error),
            }
        })
    });
    // A failure to reach the supervisor is ignored: then it has died, or it rolls back an incomplete commit, and the result tells already
    // what is in the guest. The supervisor is needed only for a guest that may still be paused.
    if !result.as_ref().is_err_and(CommitError::left_paused) {
        let _ = machine.guard(None);
    }
    result
}

/// True where a begin may have left marks, which the next vmpatch finds by the patch's record.
fn has_begun(live: &Live<'_>, marks: &Marks) -> bool {
    match marks {
        Marks::Set { fields, .. } => live.read_u64(fields.owner) != Ok(0),
        Marks::Leave | Marks::Clear { .. } => false,
    }
}

/// What a supervisor is told of the commit of `plan`.
///
/// # Errors
///
/// The guest's locks cannot be found.
pub fn journal(live: &Live<'_>, plan: &Plan) -> Result<Journal, CommitError> {
    let marks = Marking::of(live, &plan.marks)?;
    Ok(journal_with(live, plan, &locks(live, plan)?, marks.as_ref())?)
}

fn journal_with(live: &Live<'_>, plan: &Plan, locks: &Locks, marks: Option<&Marking>) -> Result<Journal, KernelError> {
    Ok(Journal {
        staged: plan.staged.clone(),
        atomic: plan.atomic.clone(),
        sites: plan.sites.clone(),
        locks: locks.words(live)?,
        marks: marks.map(Marking::journal).unwrap_or_default(),
    })
}

/// The locks that must be free in the pause.
fn locks(live: &Live<'_>, plan: &Plan) -> Result<Locks, KernelError> {
    let locks = Locks::find(live)?;
    match &plan.record.registration {
        Some(module) if module.per_cpu.is_some() => locks.with_per_cpu(live),
        _ => Ok(locks),
    }
}

/// Makes changes one by one while the guest runs. Undoes them where one fails.
///
/// # Errors
///
/// A change failed, or [`CommitError::HalfDone`] where undoing failed, too.
pub fn stage(live: &Live<'_>, changes: &[Change]) -> Result<(), CommitError> {
    for (index, change) in changes.iter().enumerate() {
        if let Err(error) = change.make(live.memory) {
            return roll_back_after(live.memory, changes.get(..=index).unwrap_or(changes), error.into());
        }
    }
    Ok(())
}

/// Restores the old bytes of `changes`, last first, and gives the error `first` that made it necessary.
fn roll_back_after<T>(memory: &dyn PhysMemory, changes: &[Change], first: CommitError) -> Result<T, CommitError> {
    for change in changes.iter().rev() {
        if let Err(undo) = change.restore(memory) {
            return Err(CommitError::HalfDone {
                first: chain(&first),
                undo: chain(&undo),
            });
        }
    }
    Err(first)
}

/// The attempts to commit one plan.
struct Attempts<'a, 's> {
    live: &'a Live<'a>,
    plan: &'a Plan,
    options: &'a CommitOptions,
    locks: &'a Locks,
    stacks: &'a mut Option<Snapshot<'s>>,
    marks: Option<&'a mut Marking>,
}

/// Result of an attempt.
enum Attempt {
    Committed(PauseTimes),
    NotSafe(NotSafe, PauseTimes),
}

/// Result of a pause.
struct InPause {
    /// Why nothing was written; `None` where all changes were.
    not_safe: Option<NotSafe>,
    /// Time of the checks, in microseconds.
    check_us: u64,
    /// Time of the writes, in microseconds.
    write_us: u64,
}

impl Attempts<'_, '_> {
    /// Repeats attempts until one is safe, or the time is over.
    fn until_safe(mut self, machine: &mut dyn Machine) -> Result<Committed, CommitError> {
        let start = Instant::now();
        let (mut tries, mut pause_us_max, mut pacing) = (0, 0, Pacing::default());
        loop {
            tries += 1;
            let (why, seen) = match self.preview()? {
                Some(why) => {
                    let seen = if matches!(why, NotSafe::Held(_)) {
                        Seen::Held
                    } else {
                        Seen::Asleep
                    };
                    (why, seen)
                }
                None => match self.attempt(machine)? {
                    Attempt::Committed(pause) => {
                        pause_us_max = pause.total_us.max(pause_us_max);
                        return Ok(Committed {
                            pause,
                            tries,
                            pause_us_max,
                        });
                    }
                    Attempt::NotSafe(why, pause) => {
                        pause_us_max = pause.total_us.max(pause_us_max);
                        let (pause, is_too_long) = (
                            Duration::from_micros(pause.total_us),
                            matches!(why, NotSafe::TooLong { .. }),
                        );
                        (why, Seen::InPause { pause, is_too_long })
                    }
                },
            };
            let waited = start.elapsed();
            let wait = pacing.next(seen);
            if waited + wait > self.options.timeout {
                let why_text = describe(self.live, &why);
                return Err(CommitError::NotSafe {
                    why,
                    why_text,
                    tries,
                    waited,
                });
            }
            std::thread::sleep(wait);
        }
    }

    /// Looks for what blocks while the guest runs.
    fn preview(&mut self) -> Result<Option<NotSafe>, CommitError> {
        preview(self.live, self.locks, self.stacks, self.marks.as_deref_mut())
    }

    /// Pauses the guest once, and resumes it, also after a failure.
    fn attempt(&mut self, machine: &mut dyn Machine) -> Result<Attempt, CommitError> {
        if self.marks.as_mut().is_some_and(|marks| marks.take_journal_old()) {
            let journal = journal_with(self.live, self.plan, self.locks, self.marks.as_deref())?;
            machine.guard(Some(&journal))?;
        }
        let mut paused = machine.pause().map_err(|source| match source.left_paused {
            true => not_resumed(Effect::AsBefore, None, source),
            false => source.into(),
        })?;
        let done = self.in_pause(paused.as_mut());
        let resumed = paused.resume();
        match (done, resumed) {
            (Ok(done), Ok(times)) => {
                let times = PauseTimes {
                    check_us: done.check_us,
                    write_us: done.write_us,
                    ..times
                };
                Ok(match done.not_safe {
                    None => Attempt::Committed(times),
                    Some(why) => Attempt::NotSafe(why, times),
                })
            }
            (Ok(done), Err(source)) => {
                let effect = done.not_safe.map_or(Effect::InForce, |_| Effect::AsBefore);
                Err(not_resumed(effect, None, source))
            }
            (Err(first), Ok(_)) => Err(first),
            (Err(first), Err(source)) => Err(not_resumed(first.effect(), Some(chain(&first)), source)),
        }
    }

    /// Checks locks, preconditions and stacks, and writes marks and atomic changes where they allow it.
    fn in_pause(&mut self, paused: &mut dyn Paused) -> Result<InPause, CommitError> {
        let registers = paused.registers()?;
        let at_check = Instant::now();
        let pause_max = self.options.pause_max;
        let is_over = || paused.elapsed() > pause_max;
        let mut decision = self.decide(&registers, &is_over)?;
        if is_over() {
            decision = Decision::of(Some(too_long(paused.elapsed(), self.options)));
        }
        let at_write = Instant::now();
        let written = decision.write(self.live).and_then(|()| match decision.not_safe {
            Some(_) => Ok(()),
            None => write(self.live, paused, &self.plan.atomic),
        });
        match written {
            // Trampolines may be there: without its mark, a task in the old code would be led to the new.
            Err(error @ CommitError::HalfDone { .. }) => return Err(error),
            Err(error) => {
                if matches!(self.plan.marks, Marks::Set { .. }) {
                    decision.unset(self.live);
                }
                return Err(error);
            }
            Ok(()) => {}
        }
        Ok(InPause {
            not_safe: decision.not_safe,
            check_us: micros(at_write - at_check),
            write_us: micros(at_write.elapsed()),
        })
    }

    fn decide(&mut self, registers: &[Registers], is_over: &dyn Fn() -> bool) -> Result<Decision, CommitError> {
        let live = self.live;
        if let Some(held) = self.locks.held(live)? {
            return Ok(Decision::of(Some(NotSafe::Held(held))));
        }
        self.plan.requires.check(live.memory)?;
        let Some(snapshot) = self.stacks else {
            return Ok(Decision::of(None));
        };
        let Some(verdict) = snapshot.recheck(live, registers, is_over)? else {
            // The caller says how long it took.
            return Ok(Decision::of(Some(NotSafe::Changing)));
        };
        match &mut self.marks {
            Some(marks) => marks.decide(live, snapshot, verdict),
            None if verdict.is_safe() => Ok(Decision::of(None)),
            None => Ok(Decision::of(Some(NotSafe::Stacks(verdict)))),
        }
    }
}

fn not_resumed(effect: Effect, first: Option<String>, source: MachineError) -> CommitError {
    CommitError::NotResumed { effect, first, source }
}

fn too_long(took: Duration, options: &CommitOptions) -> NotSafe {
    NotSafe::TooLong {
        took_us: micros(took),
        allowed_us: micros(options.pause_max),
    }
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}
