//! Applies and reverts in a loop, and counts how that ended.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::Parser;
use guest_core::commit::Committed;
use host_agent::cli::{Cli, Options};
use host_agent::error::Failure;
use host_agent::progress::Progress;
use host_agent::session::{Session, Target};

use super::{Result, Scene, Storm};
use crate::health;
use crate::vmpatch;

/// How long a patch may be in the way of its revert: a guest in a storm has a safe moment sooner or later.
const REVERT_LIMIT: Duration = Duration::from_secs(120);
/// Failures after which a storm ends.
const FAILURES_MAX: usize = 3;
/// The exit codes that leave the guest as it was, for which nobody is to blame.
const NOT_SAFE: u8 = 4;
const REFUSED: u8 = 3;

/// How often each thing happened.
#[derive(Clone, Debug, Default)]
pub struct Outcomes {
    /// Cycles: an apply that was tried, and the revert of what it applied.
    pub cycles: u64,
    /// Patches applied.
    pub applied: u64,
    /// Patches reverted.
    pub reverted: u64,
    /// Ends with exit 4: no safe moment in time.
    pub not_safe: u64,
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
    options: Options,
    supervisor: PathBuf,
    patches: Vec<(PathBuf, Vec<u8>)>,
    outcomes: Outcomes,
}

impl<'a> Cycles<'a> {
    /// Cycles with these patches, one after another; each apply and revert is tried for `timeout`.
    ///
    /// # Errors
    ///
    /// If vmpatch can't be built, or a patch can't be read.
    pub fn new(storm: &'a dyn Storm, scene: Scene<'a>, patches: &[String], timeout: Duration) -> Result<Self> {
        let timeout = timeout.as_secs_f64().to_string();
        let line = ["vmpatch", "--domain", scene.guest.name(), "--timeout", &timeout];
        let read = |path: &String| Ok((PathBuf::from(path), std::fs::read(path)?));
        Ok(Self {
            storm,
            scene,
            options: Cli::parse_from(line).options,
            supervisor: vmpatch::program()?.to_owned(),
            patches: patches.iter().map(read).collect::<Result<_>>()?,
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

    /// One patch is applied by one vmpatch and reverted by another, as an operator's two commands would.
    fn cycle(&mut self) -> Result<()> {
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
        let options = self.options.clone();
        let tried = self
            .session()
            .and_then(|mut session| session.apply(path, bytes, &options));
        match tried {
            Ok((record, committed)) => {
                self.outcomes.applied += 1;
                self.outcomes.committed(&committed);
                Ok(Some(record.id))
            }
            Err(failure) => self.judge(&failure, "apply").map(|()| None),
        }
    }

    fn revert(&mut self, id: &str) -> Result<bool> {
        let options = self.options.clone();
        let tried = self.session().and_then(|mut session| session.revert(id, &options));
        match tried {
            Ok((_, committed)) => {
                self.outcomes.reverted += 1;
                self.outcomes.committed(&committed);
                Ok(true)
            }
            Err(failure) => self.judge(&failure, "revert").map(|()| false),
        }
    }

    fn session(&self) -> std::result::Result<Session, Failure> {
        let mut session = Session::open(&Target::from_options(&self.options)?, &Progress::new(0))?;
        session.supervisor = self.supervisor.clone();
        session.tidy()?;
        Ok(session)
    }

    /// Counts what left the guest as it was; all else is an error.
    fn judge(&mut self, failure: &Failure, doing: &str) -> Result<()> {
        let said = failure.chain().join(": ");
        match failure.exit_code() {
            NOT_SAFE => self.outcomes.not_safe += 1,
            REFUSED if self.storm.expects(&said) => *self.outcomes.refused.entry(said).or_default() += 1,
            code => return Err(format!("{doing}: exit {code}: {said}").into()),
        }
        Ok(())
    }
}
