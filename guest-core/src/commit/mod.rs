//! Carrying out a plan: lay what nobody reaches yet, then stop the vCPUs, make sure, write, read back, and go on.
//!
//! Whatever fails, at whatever point: the old bytes are put back before the vCPUs run again.

mod effect;
mod write;

pub use effect::Effect;

use self::write::{restore, write};
use crate::addr::Gva;
use crate::change::{Change, ChangeError};
use crate::kernel::locks::{Held, Locks};
use crate::kernel::{KernelError, Live};
use crate::machine::{Journal, Machine, MachineError, PauseTimes, Paused};
use crate::memory::PhysMemory;
use crate::plan::Plan;
use crate::task::{Quiescence, Survey, Verdict};
use crate::unwind::{OldCode, SetupError};
use std::time::{Duration, Instant};

/// First wait before a further try; it doubles.
const WAIT_FIRST: Duration = Duration::from_millis(1);
/// Longest wait where a task sleeps inside a function, which is seen without a pause.
const WAIT_MAX: Duration = Duration::from_millis(50);
/// Longest wait between two pauses, in lengths of the last one: where running tasks are in the way, the next moment is as good
/// as any later one, but the guest is to stand for a tenth of the time at the most.
const WAIT_PAUSES_MAX: u64 = 10;
/// Tasks that a message names.
const SAID_TASKS_MAX: usize = 4;
/// Frames of each that it shows.
const SAID_FRAMES_MAX: usize = 8;

/// When a commit may happen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Model {
    /// At once, whatever the stacks hold (upstream livepatch of Linux 4.0).
    None,
    /// When every task's stack is clear of every old function at one instant (kpatch).
    CleanCut,
}

/// What the operator chose.
#[derive(Debug, Clone, Copy)]
pub struct CommitOptions {
    /// When it is safe.
    pub model: Model,
    /// How long to try.
    pub timeout: Duration,
    /// Longest pause: past it nothing is written any more.
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

/// What stood in the way at the last try.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NotSafe {
    /// Tasks inside the functions, or stacks that are not understood.
    Stacks(Verdict),
    /// The guest was changing its own text or modules.
    Held(Held),
    /// The guest changes what a plan was made from faster than a plan can be made and committed.
    Changing,
    /// The pause had become too long before anything was written: the host is busy.
    TooLong {
        /// Microseconds up to the point where it was given up.
        took_us: u64,
        /// Microseconds allowed.
        allowed_us: u64,
    },
}

/// Why a plan was not carried out. The guest runs on as before, unless said otherwise.
#[derive(Debug, thiserror::Error)]
pub enum CommitError {
    /// Never safe within the time.
    #[error("not safe within {} ms, looked {tries} times: {said}", waited.as_millis())]
    NotSafe {
        /// What stood in the way at the last try.
        why: NotSafe,
        /// The same for a person.
        said: String,
        /// How often it was looked.
        tries: u32,
        /// How long it was tried.
        waited: Duration,
    },
    /// The guest changed what was to be replaced, or something else wrote there.
    #[error("the guest is not as it was planned for")]
    Changed(#[from] ChangeError),
    /// The VMM failed.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// The guest's tables could not be read.
    #[error("reading the guest's kernel")]
    Kernel(#[from] KernelError),
    /// Stacks can't be judged in this kernel at all.
    #[error("finding the guest's tasks")]
    Tasks(#[from] SetupError),
    /// Taking back failed as well: the guest may be half patched. The registry tells what is left to do: see
    /// [`recovery`](crate::plan::recovery).
    #[error("taking back failed ({undo}) after: {first}")]
    HalfDone {
        /// What failed first.
        first: String,
        /// What failed in taking it back.
        undo: String,
    },
    /// The VMM did not end the pause as it should.
    #[error("the pause did not end{}", after(first.as_deref()))]
    NotResumed {
        /// How much of the change is in the guest.
        effect: Effect,
        /// What had failed before, in the pause.
        first: Option<String>,
        /// What failed; it says whether the guest was left paused.
        source: MachineError,
    },
}

fn after(first: Option<&str>) -> String {
    first.map_or(String::new(), |first| format!(" after: {first}"))
}

/// Carries out `plan`. On an error [`CommitError::effect`] tells what the guest is like; where [`CommitError::left_paused`], the
/// journal stays outstanding: the guard of the change must resume the guest.
pub fn commit(
    live: &Live<'_>,
    machine: &mut dyn Machine,
    plan: &Plan,
    options: &CommitOptions,
) -> Result<Committed, CommitError> {
    let mut locks = Locks::find(live)?;
    if plan.record.known.as_ref().is_some_and(|known| known.per_cpu.is_some()) {
        locks = locks.with_per_cpu(live)?;
    }
    let finder = match options.model {
        Model::CleanCut => Some(Quiescence::find(live)?),
        Model::None => None,
    };
    let mut stacks = match &finder {
        Some(finder) => {
            let old = OldCode::new(plan.occupied.clone()).with_data(&plan.unread);
            Some(finder.survey(live, old, plan.laid.clone())?)
        }
        None => None,
    };
    let journal = Journal {
        before: plan.before.clone(),
        paused: plan.paused.clone(),
    };
    machine.guard(Some(&journal))?;
    let result = lay(live, &plan.before).and_then(|()| {
        try_until(live, machine, plan, options, &locks, &mut stacks).or_else(|error| {
            // Functions may lead into the new code, or somebody else takes all of it back.
            let is_left = matches!(error, CommitError::HalfDone { .. } | CommitError::NotResumed { .. });
            match is_left || is_complete(live.memory, &plan.paused) {
                true => Err(error),
                false => put_back(live.memory, &plan.before, error),
            }
        })
    });
    // The result says what the guest is like. A supervisor that can't be told has died, or takes back what was not complete:
    // nothing, or what could not be taken back here. It is needed where the guest is not known to run.
    if !result.as_ref().is_err_and(CommitError::left_paused) {
        let _ = machine.guard(None);
    }
    result
}

/// Takes back what a vmpatch that died has left, with all vCPUs stopped. A commit that was complete stays.
///
/// Gives true where it stayed.
pub fn take_back(memory: &dyn PhysMemory, paused: &mut dyn Paused, journal: &Journal) -> Result<bool, CommitError> {
    let complete = is_complete(memory, &journal.paused);
    if !complete {
        restore(memory, paused, &journal.paused)?;
        for change in journal.before.iter().rev() {
            change.restore(memory)?;
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
        if let Err(undo) = change.restore(memory) {
            return Err(CommitError::HalfDone {
                first: chain(&first),
                undo: chain(&undo),
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
    stacks: &mut Option<Survey<'_>>,
) -> Result<Committed, CommitError> {
    let start = Instant::now();
    let (mut tries, mut pause_us_max, mut wait) = (0, 0, WAIT_FIRST);
    loop {
        tries += 1;
        let (why, wait_max) = match without_pause(live, stacks)? {
            Some(why) => (why, WAIT_MAX),
            None => match attempt(live, machine, plan, options, locks, stacks)? {
                Attempt::Done(pause) => {
                    pause_us_max = pause.total_us.max(pause_us_max);
                    return Ok(Committed {
                        pause,
                        tries,
                        pause_us_max,
                    });
                }
                Attempt::NotSafe(why, pause) => {
                    pause_us_max = pause.total_us.max(pause_us_max);
                    let wait_us_max = pause.total_us.saturating_mul(WAIT_PAUSES_MAX);
                    (why, Duration::from_micros(wait_us_max).max(WAIT_FIRST))
                }
            },
        };
        let waited = start.elapsed();
        wait = match why {
            NotSafe::TooLong { .. } => wait_max,
            _ => wait.min(wait_max),
        };
        if waited + wait > options.timeout {
            let said = say(live, &why);
            return Err(CommitError::NotSafe {
                why,
                said,
                tries,
                waited,
            });
        }
        std::thread::sleep(wait);
        wait *= 2;
    }
}

/// What stands in the way already while the guest runs: a task that sleeps inside a function. No pause is of use then.
fn without_pause(live: &Live<'_>, stacks: &mut Option<Survey<'_>>) -> Result<Option<NotSafe>, CommitError> {
    let Some(survey) = stacks else { return Ok(None) };
    survey.settle(live)?;
    let outlook = survey.outlook(live);
    Ok((!outlook.blockers.is_empty()).then_some(NotSafe::Stacks(outlook)))
}

/// For a person: who is where.
fn say(live: &Live<'_>, why: &NotSafe) -> String {
    match why {
        NotSafe::Held(held) => held.to_string(),
        NotSafe::Changing => "the guest keeps changing what is to be changed".to_owned(),
        NotSafe::TooLong { took_us, allowed_us } => {
            format!("the pause took {took_us} µs, allowed are {allowed_us}: the host is too busy")
        }
        NotSafe::Stacks(verdict) => {
            let symbol = |at: Gva| match live.kernel.symbols.containing(at) {
                Some((symbol, _)) => format!("{}+{:#x}", symbol.name, at.0.wrapping_sub(symbol.address.0)),
                None => at.to_string(),
            };
            let blockers = verdict.blockers.iter().map(|blocker| {
                let stack: Vec<_> = blocker
                    .stack
                    .iter()
                    .take(SAID_FRAMES_MAX)
                    .map(|frame| symbol(frame.ip))
                    .collect();
                format!(
                    "{} is inside {} ({})",
                    blocker.task,
                    blocker.function,
                    stack.join(" < ")
                )
            });
            let unsure = verdict.unsure.iter().map(|unsure| {
                let who = unsure
                    .task
                    .as_ref()
                    .map_or_else(|| "the guest".to_owned(), ToString::to_string);
                format!("{who}: {}", chain(&unsure.why))
            });
            let all: Vec<_> = blockers.chain(unsure).collect();
            let more = all.len().saturating_sub(SAID_TASKS_MAX);
            let shown = all.into_iter().take(SAID_TASKS_MAX).collect::<Vec<_>>().join("; ");
            if more == 0 {
                shown
            } else {
                format!("{shown}; and {more} more")
            }
        }
    }
}

fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

enum Attempt {
    Done(PauseTimes),
    NotSafe(NotSafe, PauseTimes),
}

/// One pause, which ends also where something in it fails.
fn attempt(
    live: &Live<'_>,
    machine: &mut dyn Machine,
    plan: &Plan,
    options: &CommitOptions,
    locks: &Locks,
    stacks: &mut Option<Survey<'_>>,
) -> Result<Attempt, CommitError> {
    let mut paused = machine.pause().map_err(|source| match source.left_paused {
        true => not_resumed(Effect::AsBefore, None, source),
        false => source.into(),
    })?;
    let done = in_pause(live, paused.as_mut(), plan, options, locks, stacks);
    let resumed = paused.resume();
    match (done, resumed) {
        (Ok(done), Ok(times)) => {
            let times = PauseTimes {
                check_us: done.check_us,
                write_us: done.write_us,
                ..times
            };
            Ok(match done.verdict {
                None => Attempt::Done(times),
                Some(why) => Attempt::NotSafe(why, times),
            })
        }
        (Ok(done), Err(source)) => {
            let effect = done.verdict.map_or(Effect::InForce, |_| Effect::AsBefore);
            Err(not_resumed(effect, None, source))
        }
        (Err(first), Ok(_)) => Err(first),
        (Err(first), Err(source)) => Err(not_resumed(first.effect(), Some(chain(&first)), source)),
    }
}

fn not_resumed(effect: Effect, first: Option<String>, source: MachineError) -> CommitError {
    CommitError::NotResumed { effect, first, source }
}

/// What was done in a pause.
struct Done {
    /// Why nothing was written; none where all was.
    verdict: Option<NotSafe>,
    check_us: u64,
    write_us: u64,
}

/// Checks, and writes where it is safe.
fn in_pause(
    live: &Live<'_>,
    paused: &mut dyn Paused,
    plan: &Plan,
    options: &CommitOptions,
    locks: &Locks,
    stacks: &mut Option<Survey<'_>>,
) -> Result<Done, CommitError> {
    let registers = paused.registers()?;
    let at_check = Instant::now();
    let is_over = || paused.elapsed() > options.pause_max;
    let held = locks.held(live)?;
    if held.is_none() {
        plan.requires.check(live.memory)?;
    }
    let verdict = match (held, stacks) {
        (Some(held), _) => Some(NotSafe::Held(held)),
        (None, None) => None,
        (None, Some(survey)) => match survey.recheck(live, &registers, &is_over)? {
            Some(verdict) if verdict.is_safe() => None,
            Some(verdict) => Some(NotSafe::Stacks(verdict)),
            None => Some(too_long(paused.elapsed(), options)),
        },
    };
    let verdict = verdict.or_else(|| is_over().then(|| too_long(paused.elapsed(), options)));
    let at_write = Instant::now();
    if verdict.is_none() {
        write(live, paused, &plan.paused)?;
    }
    Ok(Done {
        verdict,
        check_us: micros(at_write - at_check),
        write_us: micros(at_write.elapsed()),
    })
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
