//! Carrying out a plan: lay what nobody reaches yet, then stop the vCPUs, make sure, write, read back, and go on.
//!
//! Whatever fails, at whatever point: the old bytes are put back before the vCPUs run again.

use crate::change::{Change, ChangeError};
use crate::kernel::locks::{Held, Locks};
use crate::kernel::{KernelError, Live};
use crate::machine::{Journal, Machine, MachineError, PauseTimes, Paused};
use crate::memory::PhysMemory;
use crate::plan::Plan;
use crate::quiescence::{Blocker, Model, Quiescence, QuiescenceError, Verdict};
use std::time::{Duration, Instant};

/// First wait before a further try; it doubles.
const WAIT_FIRST: Duration = Duration::from_millis(1);
/// Longest wait between two tries.
const WAIT_MAX: Duration = Duration::from_millis(200);

/// What the operator chose.
#[derive(Debug, Clone, Copy)]
pub struct CommitOptions {
    /// When it is safe.
    pub model: Model,
    /// How long to try.
    pub timeout: Duration,
    /// Longest pause: past it nothing is written any more, and what was written is taken back.
    pub pause_max: Duration,
}

/// What was reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Committed {
    /// The pause in which it happened.
    pub pause: PauseTimes,
    /// Pauses, that one counted.
    pub tries: u32,
    /// Longest of all pauses, in microseconds.
    pub pause_us_max: u64,
}

/// Why the time ran out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NotSafe {
    /// Tasks inside the functions.
    Blocked(Vec<Blocker>),
    /// A stack could not be understood.
    NotUnwound(String),
    /// The guest was changing its own text or modules.
    Held(Held),
}

impl std::fmt::Display for NotSafe {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Blocked(blockers) => {
                let shown: Vec<_> = blockers.iter().take(4).map(ToString::to_string).collect();
                write!(f, "{}", shown.join("; "))?;
                match blockers.len().saturating_sub(shown.len()) {
                    0 => Ok(()),
                    more => write!(f, "; and {more} more"),
                }
            }
            Self::NotUnwound(why) => write!(f, "{why}"),
            Self::Held(held) => write!(f, "{held}"),
        }
    }
}

/// Why a plan was not carried out. The guest runs on as before, unless said otherwise.
#[derive(Debug, thiserror::Error)]
pub enum CommitError {
    /// Never safe within the time.
    #[error("not safe within {} ms, {tries} tries: {why}", waited.as_millis())]
    NotSafe {
        /// What stood in the way at the last try.
        why: NotSafe,
        /// Pauses.
        tries: u32,
        /// How long it was tried.
        waited: Duration,
    },
    /// The guest changed what was to be replaced, or something else wrote there.
    #[error("the guest is not as it was planned for")]
    Changed(#[from] ChangeError),
    /// The pause became too long.
    #[error("the pause took {took_us} µs, allowed are {allowed_us}: nothing was changed")]
    TooLong {
        /// Microseconds up to the point where it was given up.
        took_us: u64,
        /// Microseconds allowed.
        allowed_us: u64,
    },
    /// The VMM failed.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// The guest's tables could not be read.
    #[error("reading the guest's kernel")]
    Kernel(#[from] KernelError),
    /// Stacks can't be judged in this kernel at all.
    #[error(transparent)]
    Quiescence(#[from] QuiescenceError),
    /// Taking back failed as well: the guest may be half patched. Nothing worse can happen.
    #[error("taking back failed ({undo}) after: {first}")]
    HalfDone {
        /// What failed first.
        first: String,
        /// What failed in taking it back.
        undo: String,
    },
}

/// Carries out `plan`. On any error the guest is as before.
pub fn commit(
    live: &Live<'_>,
    machine: &mut dyn Machine,
    plan: &Plan,
    options: &CommitOptions,
) -> Result<Committed, CommitError> {
    let locks = Locks::find(live)?;
    let mut stacks = Quiescence::new(live, options.model, &plan.occupied)?;
    let journal = Journal {
        before: plan.before.clone(),
        paused: plan.paused.clone(),
    };
    machine.guard(Some(&journal))?;
    let result = lay(live, &plan.before).and_then(|()| {
        try_until(live, machine, plan, options, &locks, &mut stacks).or_else(|error| {
            match is_complete(live.memory, &plan.paused) || matches!(error, CommitError::HalfDone { .. }) {
                // Functions lead into the new code: it must stay.
                true => Err(error),
                false => put_back(live.memory, &plan.before, error),
            }
        })
    });
    // The result says what the guest is like; a supervisor that can't be told has nothing to take back any more.
    let told = machine.guard(None);
    let committed = result?;
    told?;
    Ok(committed)
}

/// Takes back what a vmpatch that died has left, with all vCPUs stopped. A commit that was complete stays.
///
/// Gives true where it stayed.
pub fn take_back(memory: &dyn PhysMemory, paused: &mut dyn Paused, journal: &Journal) -> Result<bool, CommitError> {
    let complete = is_complete(memory, &journal.paused);
    if !complete {
        restore(memory, paused, &journal.paused)?;
        for change in journal.before.iter().rev() {
            let bytes = change.restored(memory)?;
            change.overwrite(memory, &bytes)?;
        }
    }
    Ok(complete)
}

/// True where all changes of a pause were made: the last one is the state in the registry.
fn is_complete(memory: &dyn PhysMemory, paused: &[Change]) -> bool {
    paused.last().is_some_and(|state| state.verify(memory).is_ok())
}

/// Makes changes one by one while the guest runs; all or none.
pub fn lay(live: &Live<'_>, changes: &[Change]) -> Result<(), CommitError> {
    for (index, change) in changes.iter().enumerate() {
        if let Err(error) = change.make(live.memory) {
            return put_back(live.memory, changes.get(..=index).unwrap_or(changes), error.into());
        }
    }
    Ok(())
}

/// Puts back the old bytes of `changes`, last first, and gives the error that made it necessary.
fn put_back<T>(memory: &dyn PhysMemory, changes: &[Change], first: CommitError) -> Result<T, CommitError> {
    for change in changes.iter().rev() {
        let undo = change
            .restored(memory)
            .and_then(|bytes| change.overwrite(memory, &bytes));
        if let Err(undo) = undo {
            return Err(CommitError::HalfDone {
                first: first.to_string(),
                undo: undo.to_string(),
            });
        }
    }
    Err(first)
}

fn try_until(
    live: &Live<'_>,
    machine: &mut dyn Machine,
    plan: &Plan,
    options: &CommitOptions,
    locks: &Locks,
    stacks: &mut Quiescence<'_>,
) -> Result<Committed, CommitError> {
    let start = Instant::now();
    let (mut tries, mut pause_us_max, mut wait) = (0, 0, WAIT_FIRST);
    loop {
        stacks.survey(live)?;
        tries += 1;
        let (why, pause) = match attempt(live, machine, plan, options, locks, stacks)? {
            Attempt::Done(pause) => {
                pause_us_max = pause.total_us.max(pause_us_max);
                return Ok(Committed {
                    pause,
                    tries,
                    pause_us_max,
                });
            }
            Attempt::NotSafe(why, pause) => (why, pause),
        };
        pause_us_max = pause.total_us.max(pause_us_max);
        let waited = start.elapsed();
        if waited + wait > options.timeout {
            return Err(CommitError::NotSafe { why, tries, waited });
        }
        std::thread::sleep(wait);
        wait = (wait * 2).min(WAIT_MAX);
    }
}

enum Attempt {
    Done(PauseTimes),
    NotSafe(NotSafe, PauseTimes),
}

/// One pause. Returning an error drops the guard, which resumes.
fn attempt(
    live: &Live<'_>,
    machine: &mut dyn Machine,
    plan: &Plan,
    options: &CommitOptions,
    locks: &Locks,
    stacks: &mut Quiescence<'_>,
) -> Result<Attempt, CommitError> {
    let asked = Instant::now();
    let mut paused = machine.pause()?;
    let at_registers = Instant::now();
    let registers = paused.registers()?;
    let at_check = Instant::now();
    let verdict = match locks.held(live)? {
        Some(held) => Some(NotSafe::Held(held)),
        None => match stacks.recheck(live, &registers)? {
            Verdict::Safe => None,
            Verdict::Blocked(blockers) => Some(NotSafe::Blocked(blockers)),
            Verdict::NotUnwound(why) => Some(NotSafe::NotUnwound(why)),
        },
    };
    let at_write = Instant::now();
    if verdict.is_none() {
        let took = asked.elapsed();
        if took > options.pause_max {
            let (took_us, allowed_us) = (micros(took), micros(options.pause_max));
            return Err(CommitError::TooLong { took_us, allowed_us });
        }
        write(live, paused.as_mut(), &plan.paused)?;
    }
    let at_resume = Instant::now();
    let machine_times = paused.resume()?;
    let times = PauseTimes {
        stop_us: micros(at_registers - asked),
        registers_us: micros(at_check - at_registers),
        check_us: micros(at_write - at_check),
        write_us: micros(at_resume - at_write),
        resume_us: machine_times.resume_us,
        total_us: machine_times.total_us,
    };
    Ok(match verdict {
        None => Attempt::Done(times),
        Some(why) => Attempt::NotSafe(why, times),
    })
}

/// Writes all changes in the pause and reads them back; on any failure puts the old bytes back, still in the pause.
fn write(live: &Live<'_>, paused: &mut dyn Paused, changes: &[Change]) -> Result<(), CommitError> {
    let mut writes = Vec::with_capacity(changes.len());
    for change in changes {
        writes.push((change.gpa(), change.prepare(live.memory)?));
    }
    let written = paused.write(&writes).map_err(CommitError::from);
    let verified = written.and_then(|()| Ok(changes.iter().try_for_each(|change| change.verify(live.memory))?));
    let Err(first) = verified else { return Ok(()) };
    match restore(live.memory, paused, changes) {
        Ok(()) => Err(first),
        Err(undo) => Err(CommitError::HalfDone {
            first: first.to_string(),
            undo: undo.to_string(),
        }),
    }
}

/// Puts back the old bytes of `changes`, however much of them was made, last first.
fn restore(memory: &dyn PhysMemory, paused: &mut dyn Paused, changes: &[Change]) -> Result<(), CommitError> {
    let mut writes = Vec::with_capacity(changes.len());
    for change in changes.iter().rev() {
        let bytes = change.restored(memory)?;
        if bytes != change.current(memory)? {
            writes.push((change.gpa(), bytes));
        }
    }
    Ok(paused.write(&writes)?)
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}
