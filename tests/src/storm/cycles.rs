//! Applies and reverts in a loop, and counts how that ended.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use clap::ValueEnum;
use guest_core::commit::{CommitError, Committed, NotSafe};
use guest_core::guest;
use host_agent::chain::chain;
use host_agent::outcome::{GuestState, Reason};
use host_agent::session::{Changed, PatchError, PatchOptions, Session};

use super::{Result, Scene, Storm};
use crate::health;
use crate::monitor::Monitor;
use crate::session;

/// How long a patch may be in the way of its revert: a guest in a storm has a safe moment sooner or later.
const REVERT_LIMIT: Duration = Duration::from_secs(120);
/// Failures after which a storm ends.
const FAILURES_MAX: usize = 3;

/// How long a cycle without vmpatch is.
const WITHOUT: Duration = Duration::from_millis(100);

/// What a cycle is made of. What fails without vmpatch, too, is not vmpatch's fault.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Cycle {
    /// A patch is applied and reverted
    #[default]
    Patch,
    /// The guest is paused and resumed over QMP, without vmpatch
    Pause,
    /// Nothing is done to the guest
    Nothing,
}

/// How often each thing happened.
#[derive(Clone, Debug, Default)]
pub struct Outcomes {
    /// Cycles: an apply that was tried, and the revert of what it applied.
    pub cycles: u64,
    /// Patches applied.
    pub applied: u64,
    /// Patches reverted.
    pub reverted: u64,
    /// Ends with exit 4, by what stood in the way at the last try.
    pub not_safe: BTreeMap<String, u64>,
    /// Ends with exit 3 that the storm expects, by what vmpatch said.
    pub refused: BTreeMap<String, u64>,
    /// All else, in words.
    pub failures: Vec<String>,
    /// Pauses of the guest, and the longest of them, in microseconds.
    pub pauses: u64,
    /// The longest of them, in microseconds.
    pub pause_us_max: u64,
}

impl Outcomes {
    fn committed(&mut self, committed: &Committed) {
        self.pauses += u64::from(committed.tries);
        self.pause_us_max = self.pause_us_max.max(committed.pause_us_max);
    }

    /// Ends with exit 4: no safe moment in time.
    pub fn not_safe_in_all(&self) -> u64 {
        self.not_safe.values().sum()
    }

    /// Refusals of all kinds.
    pub fn refused_in_all(&self) -> u64 {
        self.refused.values().sum()
    }
}

/// How long a storm lasts: until one of both is reached.
#[derive(Clone, Copy, Debug)]
pub struct Length {
    /// Cycles.
    pub cycles: u64,
    /// Time.
    pub time: Duration,
}

/// The cycles of one storm.
pub struct Cycles<'a> {
    storm: &'a dyn Storm,
    scene: Scene<'a>,
    options: PatchOptions,
    patches: Vec<(PathBuf, Vec<u8>)>,
    cycle: Cycle,
    outcomes: Outcomes,
}

impl<'a> Cycles<'a> {
    /// Cycles with these patches, one after another; each apply and revert is tried for `timeout`.
    ///
    /// # Errors
    ///
    /// If vmpatch can't be built, or a patch can't be read.
    pub fn new(
        storm: &'a dyn Storm,
        scene: Scene<'a>,
        patches: &[String],
        cycle: Cycle,
        timeout: Duration,
    ) -> Result<Self> {
        let read = |path: &String| Ok((PathBuf::from(path), std::fs::read(path)?));
        Ok(Self {
            storm,
            scene,
            options: session::options(timeout),
            patches: patches.iter().map(read).collect::<Result<_>>()?,
            cycle,
            outcomes: Outcomes::default(),
        })
    }

    /// Runs them, and tells `progress` after each. Ends early where the guest complains, or vmpatch fails again and again.
    pub fn run(mut self, length: Length, progress: &mut dyn FnMut(&Outcomes)) -> Outcomes {
        let start = Instant::now();
        while self.outcomes.cycles < length.cycles && start.elapsed() < length.time {
            if let Err(error) = self.cycle() {
                let failure = format!("cycle {}: {error}", self.outcomes.cycles);
                self.outcomes.failures.push(failure);
            }
            self.outcomes.cycles += 1;
            progress(&self.outcomes);
            if self.outcomes.failures.len() >= FAILURES_MAX || self.guest_complains() {
                break;
            }
        }
        self.outcomes
    }

    fn guest_complains(&mut self) -> bool {
        match self.scene.guest.console() {
            Ok(console) => !health::complaints(&console).is_empty(),
            Err(_) => true,
        }
    }

    fn cycle(&mut self) -> Result<()> {
        match self.cycle {
            Cycle::Patch => return self.patch(),
            Cycle::Pause => {
                let mut monitor = Monitor::second(self.scene.guest);
                monitor.stop();
                monitor.cont();
            }
            Cycle::Nothing => {}
        }
        thread::sleep(WITHOUT);
        Ok(())
    }

    /// One patch is applied by one vmpatch and reverted by another, as an operator's two commands would.
    fn patch(&mut self) -> Result<()> {
        let turn = usize::try_from(self.outcomes.cycles)? % self.patches.len().max(1);
        let (path, bytes) = self.patches.get(turn).cloned().ok_or("there is no patch")?;
        let Some(id) = self.apply(&path, &bytes)? else {
            return Ok(());
        };
        self.storm.between(&self.scene, Some(&id))?;
        let start = Instant::now();
        while !self.revert(&id)? {
            if start.elapsed() > REVERT_LIMIT {
                return Err(format!("{id} could not be reverted in {} s", REVERT_LIMIT.as_secs()).into());
            }
        }
        self.storm.between(&self.scene, None)
    }

    fn apply(&mut self, path: &Path, bytes: &[u8]) -> Result<Option<String>> {
        let tried = self
            .session()
            .and_then(|mut session| Ok(session.apply(path, bytes, &self.options)?));
        match tried {
            Ok(Changed { record, committed, .. }) => {
                self.outcomes.applied += 1;
                self.outcomes.committed(&committed);
                Ok(Some(record.id))
            }
            Err(failed) => self.judge(failed, "apply").map(|()| None),
        }
    }

    fn revert(&mut self, id: &str) -> Result<bool> {
        let tried = self
            .session()
            .and_then(|mut session| Ok(session.revert(id, &self.options)?));
        match tried {
            Ok(Changed { committed, .. }) => {
                self.outcomes.reverted += 1;
                self.outcomes.committed(&committed);
                Ok(true)
            }
            Err(failed) => self.judge(failed, "revert").map(|()| false),
        }
    }

    fn session(&self) -> std::result::Result<Session, Failed> {
        let mut session = session::open(self.scene.guest)?;
        session.recover()?;
        Ok(session)
    }

    /// Counts what left the guest as it was; all else is an error.
    fn judge(&mut self, failed: Failed, doing: &str) -> Result<()> {
        let Failed {
            reason, state, said, ..
        } = failed;
        match (state, reason) {
            (GuestState::AsBefore, Reason::NotSafe) => {
                *self.outcomes.not_safe.entry(failed.in_the_way).or_default() += 1
            }
            (GuestState::AsBefore, Reason::Refused) if self.storm.expects(&said) => {
                *self.outcomes.refused.entry(said).or_default() += 1;
            }
            (state, reason) => return Err(format!("{doing}: {reason:?}, guest {state:?}: {said}").into()),
        }
        Ok(())
    }
}

/// A failed apply or revert.
struct Failed {
    reason: Reason,
    state: GuestState,
    said: String,
    in_the_way: String,
}

impl From<session::Error> for Failed {
    fn from(error: session::Error) -> Self {
        Self {
            reason: error.reason(),
            state: GuestState::AsBefore,
            said: chain(&error).join(": "),
            in_the_way: error.to_string(),
        }
    }
}

impl From<PatchError> for Failed {
    fn from(error: PatchError) -> Self {
        Self {
            reason: error.reason(),
            state: error.guest_state(),
            said: chain(&error).join(": "),
            in_the_way: in_the_way(&error),
        }
    }
}

/// What stood in the way, such that alike ends have one text.
fn in_the_way(error: &PatchError) -> String {
    let PatchError::Guest(guest::PatchError::Commit { source, .. }) = error else {
        return error.to_string();
    };
    match &**source {
        CommitError::NotSafe { why, why_text, .. } => match why {
            NotSafe::Stacks(verdict) if verdict.blockers.is_empty() => "a stack is not understood".to_owned(),
            NotSafe::Stacks(_) => "a task is inside a function".to_owned(),
            NotSafe::TooLong { .. } => "the pause took too long".to_owned(),
            NotSafe::Held(_) | NotSafe::Changing => why_text.clone(),
        },
        other => other.to_string(),
    }
}
