//! The move itself.

use super::UpgradeOptions;
use super::binary;
use super::channels::ChannelFolder;
use super::compare;
use super::error::UpgradeError;
use super::files::{self, OpenFiles};
use super::finish::{self, Done, Upgraded};
use super::identity;
use super::launch::Spec;
use super::method;
use super::owner::Owner;
use super::prepare::{Prepared, is_same, prepare};
use super::recovery;
use super::rights;
use super::signals::Wish;
use super::successor::Successor;
use super::tap::Taps;
use super::watch::Watcher;
use crate::domains::process;
use crate::target::Target;
use guest_core::PhysMemory;
use qmp::RunState;
use qmp::migrate::{Arrival, Limits, Method, MigrateError, Pair, Status};
use std::os::unix::ffi::OsStringExt;
use std::path::Path;
use std::time::{Duration, Instant};

/// How long the new process may take to open its QMP socket, unless the whole move has less time: QEMU takes a tenth of a second, more where it allocates much memory
/// beforehand.
const START_TIME_MAX: Duration = Duration::from_secs(60);
/// How long giving up may take.
const CANCEL_TIME_MAX: Duration = Duration::from_secs(20);
/// How long a process that seems to have ended may take to be seen as ended.
const END_TIME_MAX: Duration = Duration::from_millis(300);
/// Between two looks for a socket of the new process.
const POLL: Duration = Duration::from_millis(2);

/// A move under way.
struct Move {
    prepared: Prepared,
    folder: ChannelFolder,
    taps: Taps,
    limits: Limits,
    was_running: bool,
    wish: Wish,
}

/// Moves the guest, or stops before that where it is only to be checked.
///
/// # Errors
///
/// See [`UpgradeError`]; [`UpgradeError::guest_state`] says what the guest is like.
pub fn run(target: &Target, wanted: &UpgradeOptions) -> Result<Upgraded, UpgradeError> {
    let wish = Wish::watch().map_err(UpgradeError::host("waiting for signals"))?;
    let prepared = prepare(target, wanted)?;
    let vmpatch = std::env::current_exe().map_err(UpgradeError::host("finding the program of this vmpatch"))?;
    let check = wanted.check;
    let mut journey = Move::new(prepared, wanted, wish)?;
    let Prepared {
        socket, lock, shown, ..
    } = &journey.prepared;
    let spec = journey.spec(check);
    tracing::debug!(guest = shown, "starting {}", spec.program.display());
    let mut new = Successor::start(&vmpatch, &spec)?;
    let mut watcher = match Watcher::start(&vmpatch, &spec, socket, journey.was_running, lock) {
        Ok(watcher) => watcher,
        Err(error) => {
            journey.discard(&mut new);
            return Err(UpgradeError::host("starting the process that watches over the move")(
                error,
            ));
        }
    };
    let result = match journey.go(&mut new, &mut watcher, check) {
        Ok(done) => {
            let has_moved = done.is_some();
            finish::finish(journey.prepared, &new, done).map_err(|error| match has_moved {
                true => UpgradeError::Moved {
                    source: Box::new(error),
                },
                false => error,
            })
        }
        Err(error) => Err(error),
    };
    watcher.over();
    result
}

impl Move {
    fn new(prepared: Prepared, wanted: &UpgradeOptions, wish: Wish) -> Result<Self, UpgradeError> {
        let was_running = prepared.pair.source_state()? == RunState::Running;
        Ok(Self {
            folder: ChannelFolder::make(&prepared)?,
            taps: Taps::of(prepared.old.pid, &prepared.line.descriptors)
                .map_err(UpgradeError::host("copying descriptors of the old process"))?,
            limits: Limits {
                downtime_ms: wanted.downtime_ms,
                bandwidth: wanted.bandwidth,
                paused_throughout: prepared.paused_throughout && was_running,
                time_max: wanted.time_max,
            },
            was_running,
            wish,
            prepared,
        })
    }

    /// Whether guest RAM is handed over before the new process opens its sockets. Not for `--check`: it begins a migration.
    fn hands_over(&self, check: bool) -> bool {
        self.prepared.method == Method::CprTransfer && !check
    }

    fn spec(&self, check: bool) -> Spec {
        let Prepared { line, old, .. } = &self.prepared;
        let mut arguments: Vec<Vec<u8>> = line.words.iter().map(|word| word.clone().into_vec()).collect();
        let mut add = |word: &str| arguments.push(word.as_bytes().to_vec());
        add("-S");
        if self.hands_over(check) {
            let address = serde_json::json!({"transport": "socket", "type": "unix", "path": self.folder.ram()});
            add("-incoming");
            add(&serde_json::json!({"channel-type": "cpr", "addr": address}).to_string());
        }
        add("-incoming");
        add("defer");
        Spec {
            program: self.prepared.program.clone(),
            arguments,
            folder: self.prepared.folder.clone(),
            process_context: self.prepared.process_context.clone(),
            old: old.pid,
            marker: process::marker(old.pid, old.start_time, self.was_running),
            descriptors: line.descriptors.clone(),
            taps: self.taps.spell(),
        }
    }

    /// From a new process that has just begun to a guest that runs there; or to everything as it was before.
    fn go(&mut self, new: &mut Successor, watcher: &mut Watcher, check: bool) -> Result<Option<Done>, UpgradeError> {
        let begun = Instant::now();
        let arrived = match self.arrive(new, check) {
            Ok(Some(arrived)) => arrived,
            Ok(None) => {
                self.abandon(new)?;
                return Ok(None);
            }
            Err(error) => {
                let error = self.explain(error, new);
                self.abandon(new)?;
                return Err(error);
            }
        };
        match self.let_run(&arrived, watcher) {
            Ok(resumed_at_us) => {
                let total = begun.elapsed();
                tracing::debug!(guest = self.prepared.shown, "taking over the names");
                recovery::take_over(new.pid, &self.owner(), &self.prepared.names)?;
                Ok(Some(Done {
                    resumed_at_us,
                    total,
                    transferred: self.prepared.pair.sent().map_or(0, |sent| sent.transferred),
                    arrival: arrived,
                }))
            }
            Err(error) => {
                let error = self.explain(error, new);
                self.abandon_unless_it_ran(new, error)
            }
        }
    }

    /// Migrates the guest: afterwards it is paused in both processes, and the same in both. `None` where it is only to be checked.
    fn arrive(&mut self, new: &mut Successor, check: bool) -> Result<Option<Arrival>, UpgradeError> {
        let hands_over = self.hands_over(check);
        let Self {
            prepared,
            folder,
            taps,
            limits,
            wish,
            ..
        } = self;
        let shown = prepared.shown.clone();
        let socket = prepared
            .names
            .last()
            .filter(|name| is_same(&name.own, &prepared.socket))
            .ok_or_else(|| UpgradeError::NoSocket {
                pid: new.pid,
                path: prepared.socket.clone(),
            })?;
        let pair = &mut prepared.pair;
        let main = folder.main();
        let start_time_max = START_TIME_MAX.min(limits.time_max);
        taps.kept(|| {
            if hands_over {
                hand_over(pair, new, &folder.ram(), &main, start_time_max)?;
            }
            pair.connect(&socket.temporary, start_time_max, || new.is_alive() && !wish.is_there())?;
            Ok::<_, UpgradeError>(())
        })?;
        if pair.destination_pid() != Some(new.pid) {
            return Err(UpgradeError::unfit(
                format!("{} started another process", prepared.program.display()),
                "it must become QEMU itself (exec)",
            ));
        }
        rights::check_same(prepared.old.pid, new.pid)?;
        pair.carry_settings_over(&prepared.facts, &pair.destination_facts()?)?;
        compare::same_machine(&prepared.facts, &pair.destination_facts()?)?;
        let ram = pair.destination_ram(new.pid)?;
        method::check_memory(prepared.method, &ram)?;
        let alone = files::temporary(&prepared.names);
        prepared.files.check_same(&OpenFiles::of(new.pid, &ram, alone)?)?;
        let memory = identity::memory_of(&ram)?;
        if check {
            return Ok(None);
        }
        pair.start(prepared.method, limits, &main)?;
        let observe = |sent: &qmp::migrate::Progress| {
            tell(&shown, sent);
            !wish.is_there()
        };
        let arrival = pair.wait(limits, observe, || new.is_alive())?;
        prepared.identity.verify(memory.as_ref() as &dyn PhysMemory)?;
        Ok(Some(arrival))
    }

    /// Resumes the guest in the new process. After an error it may have run there, see [`Pair::has_run`].
    fn let_run(&mut self, arrival: &Arrival, watcher: &mut Watcher) -> Result<Option<u64>, UpgradeError> {
        watcher
            .committing()
            .map_err(UpgradeError::host("telling the process that watches over the move"))?;
        if arrival.was_running {
            Ok(self.prepared.pair.resume()?)
        } else {
            Ok(None)
        }
    }

    /// Ends the new process; the guest goes on in the old one, or stays paused there if it was paused before the move. The guest must not have
    /// run in the new process.
    fn abandon(&mut self, new: &mut Successor) -> Result<(), UpgradeError> {
        let sent = self.prepared.pair.cancel(CANCEL_TIME_MAX);
        self.discard(new);
        self.taps.set_back();
        let pair = &mut self.prepared.pair;
        // If the old process does not say that the guest runs, it may be paused there.
        let stranded = |source| UpgradeError::Stranded {
            old: self.prepared.old.pid,
            new: new.pid,
            source,
        };
        let is_paused = sent.map_err(stranded)? == Status::Completed
            || (self.limits.paused_throughout && pair.source_state().map_err(stranded)? == RunState::Paused);
        if is_paused && self.was_running {
            pair.resume_source(recovery::RESUME_TIME_MAX).map_err(stranded)?;
        }
        Ok(())
    }

    /// Ends the new process, with its temporary names.
    fn discard(&self, new: &mut Successor) {
        new.end();
        recovery::remove_temporary(&self.owner(), &self.prepared.names);
    }

    /// The user who owns the guest's files.
    fn owner(&self) -> Owner {
        Owner::from(&self.prepared.process_context)
    }

    /// After `cont` failed in the new process. Disks and network may have seen a guest that ran, so the old one must not go on
    /// then.
    fn abandon_unless_it_ran<T>(&mut self, new: &mut Successor, error: UpgradeError) -> Result<T, UpgradeError> {
        self.discard(new);
        if self.prepared.pair.has_run(CANCEL_TIME_MAX) {
            return Err(UpgradeError::Lost {
                old: self.prepared.old.pid,
                new: new.pid,
                source: Box::new(error),
            });
        }
        self.abandon(new)?;
        Err(error)
    }

    /// That the new program does not know the guest's machine type, where that is so: QEMU ends without saying which it does know.
    fn lacking_machine(&self) -> Option<UpgradeError> {
        let Prepared { program, facts, .. } = &self.prepared;
        let all = binary::machines(program);
        if all.is_empty() || all.contains(&facts.machine) {
            return None;
        }
        let of_the_kind = binary::of_the_kind(&facts.machine, &all).join(", ");
        Some(UpgradeError::unfit(
            format!("the machine type `{}`", facts.machine),
            format!(
                "{} does not know it; of that kind it has {}",
                program.display(),
                if of_the_kind.is_empty() { "none" } else { &of_the_kind }
            ),
        ))
    }

    /// The reason behind an error, where the new process's end is one.
    fn explain(&self, error: UpgradeError, new: &mut Successor) -> UpgradeError {
        if matches!(error, UpgradeError::Migrate(MigrateError::Cancelled)) || self.wish.is_there() {
            return MigrateError::Cancelled.into();
        }
        match (new.end_within(END_TIME_MAX), error) {
            (Some(end), _) => self.lacking_machine().unwrap_or(end),
            (None, UpgradeError::Migrate(source @ MigrateError::Destination(_))) => UpgradeError::Unresponsive {
                pid: new.pid,
                messages: new.messages(),
                source,
            },
            (None, error) => error,
        }
    }
}

/// Has the old QEMU hand guest RAM over, as soon as the new one listens for it.
fn hand_over(
    pair: &mut Pair,
    new: &mut Successor,
    ram: &Path,
    main: &Path,
    within: Duration,
) -> Result<(), UpgradeError> {
    let end = Instant::now() + within;
    loop {
        if ram.exists() {
            match pair.hand_over_ram(ram, main) {
                // Its name is there a moment before it listens.
                Err(MigrateError::Command { .. }) if Instant::now() < end && new.is_alive() => {}
                result => return Ok(result?),
            }
        }
        if !new.is_alive() || Instant::now() >= end {
            return Err(MigrateError::DestinationGone.into());
        }
        std::thread::sleep(POLL);
    }
}

/// Tells how far a migration is.
fn tell(shown: &str, sent: &qmp::migrate::Progress) {
    let (percent, left) = how_far(sent);
    tracing::debug!(guest = shown, percent, "{left}");
}

/// How much of the memory is there, and what is left at which rate.
fn how_far(sent: &qmp::migrate::Progress) -> (u64, String) {
    let mib = |bytes: u64| bytes >> 20;
    let done = sent.total.saturating_sub(sent.remaining);
    let percent = (done.saturating_mul(100)).checked_div(sent.total).unwrap_or(0);
    let seconds = sent.remaining.checked_div(sent.rate).unwrap_or(0);
    let left = format!(
        "{} MiB left, {} MiB/s, {seconds} s, round {}",
        mib(sent.remaining),
        mib(sent.rate),
        sent.rounds
    );
    (percent, left)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_migration_tells_what_is_left_at_which_rate() {
        let sent = qmp::migrate::Progress {
            status: Status::UnderWay,
            state: "active".to_owned(),
            reason: None,
            total: 400 << 20,
            remaining: 100 << 20,
            transferred: 0,
            rate: 50 << 20,
            rounds: 2,
            downtime_expected_ms: None,
            downtime_ms: None,
            blockers: Vec::new(),
        };
        assert_eq!(how_far(&sent), (75, "100 MiB left, 50 MiB/s, 2 s, round 2".to_owned()));
    }
}
