//! The two QEMUs of a move, driven together.

use super::arrival::{Arrival, FIRST_DOWNTIME_MS, Watch};
use super::{Facts, Limits, MigrateError, Progress, Status, Way, settings, stream};
use crate::client::{Client, CommandError, ConnectError, Event};
use crate::machine::RunState;
use crate::memory::{RamMap, RamMapError};
use serde_json::{Value, json};
use std::path::Path;
use std::time::{Duration, Instant};
use tokio::runtime::{Builder, Runtime};
use tokio::sync::broadcast::Receiver;
use tokio::sync::broadcast::error::RecvError;
use tokio::time::{sleep, timeout};

/// Between two tries at a socket that a process which just began has not opened yet, in milliseconds.
const OPEN_RETRY_MS: u64 = 3;
/// Between two looks at a migration that is being cancelled, in milliseconds.
const CANCEL_POLL_MS: u64 = 10;
/// Between two tries to let a guest run in its old QEMU, in milliseconds.
const TAKE_BACK_RETRY_MS: u64 = 100;
/// The most bytes a second, where there is no limit: QEMU's own default is one gigabit.
const NO_LIMIT: u64 = 1 << 40;

/// An old QEMU, which has the guest, and a new one, which is to get it. Every method blocks.
#[derive(Debug)]
pub struct Pair {
    // Declared before the runtime that their tasks live on.
    destination: Option<New>,
    source: Client,
    source_events: Receiver<Event>,
    was_running: bool,
    runtime: Runtime,
}

/// The new QEMU, once it is connected.
#[derive(Debug)]
struct New {
    client: Client,
    events: Receiver<Event>,
}

impl Pair {
    /// Connects to the old QEMU.
    pub fn new(source: &Path, within: Duration) -> Result<Self, MigrateError> {
        let runtime = Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(MigrateError::EventLoop)?;
        let source = runtime
            .block_on(Client::connect(source, within))
            .map_err(MigrateError::Source)?;
        Ok(Self {
            destination: None,
            source_events: source.events(),
            source,
            was_running: false,
            runtime,
        })
    }

    /// Connects to the new QEMU, which may not have opened its socket yet: tries for as long as `within`, and while it is `alive`.
    pub fn connect(
        &mut self,
        destination: &Path,
        within: Duration,
        mut alive: impl FnMut() -> bool,
    ) -> Result<(), MigrateError> {
        let end = Instant::now() + within;
        let client = self.runtime.block_on(async {
            loop {
                let left = end.saturating_duration_since(Instant::now());
                match Client::connect(destination, left).await {
                    Err(ConnectError::NoSocket { .. } | ConnectError::Refused { .. }) if !left.is_zero() => {}
                    other => return other.map_err(MigrateError::Destination),
                }
                if !alive() {
                    return Err(MigrateError::DestinationGone);
                }
                sleep(Duration::from_millis(OPEN_RETRY_MS)).await;
            }
        })?;
        let events = client.events();
        self.destination = Some(New { client, events });
        Ok(())
    }

    /// The old QEMU's process.
    pub fn source_pid(&self) -> Option<i32> {
        self.source.peer_pid()
    }

    /// The new QEMU's process.
    pub fn destination_pid(&self) -> Option<i32> {
        self.destination.as_ref()?.client.peer_pid()
    }

    /// What the old QEMU says of its machine.
    pub fn source_facts(&self) -> Result<Facts, MigrateError> {
        self.runtime
            .block_on(Facts::read(&self.source))
            .map_err(MigrateError::old)
    }

    /// What the new QEMU says of its machine.
    pub fn destination_facts(&self) -> Result<Facts, MigrateError> {
        self.runtime
            .block_on(Facts::read(self.target()?))
            .map_err(MigrateError::new)
    }

    /// Sets in the new QEMU what was set in the old one since it began, as far as it can be set. [`Pair::destination_facts`] tells what
    /// came of it.
    pub fn carry_settings_over(&self, old: &Facts, new: &Facts) -> Result<(), MigrateError> {
        let set = settings::carry_over(self.target()?, &old.settings, &new.settings);
        self.runtime.block_on(set).map_err(MigrateError::new)
    }

    /// What the old QEMU does with the guest.
    pub fn source_state(&self) -> Result<RunState, MigrateError> {
        self.runtime
            .block_on(RunState::query(&self.source))
            .map_err(MigrateError::old)
    }

    /// What the new QEMU does with the guest.
    pub fn destination_state(&self) -> Result<RunState, MigrateError> {
        self.runtime
            .block_on(RunState::query(self.target()?))
            .map_err(MigrateError::new)
    }

    /// How far the old QEMU's migration is.
    pub fn sent(&self) -> Result<Progress, MigrateError> {
        self.runtime.block_on(query(&self.source)).map_err(MigrateError::old)
    }

    /// How far the new QEMU's is.
    pub fn arrived(&self) -> Result<Progress, MigrateError> {
        self.runtime.block_on(query(self.target()?)).map_err(MigrateError::new)
    }

    /// Where the guest's RAM is in the old process `pid`.
    pub fn source_ram(&self, pid: i32) -> Result<RamMap, RamMapError> {
        self.runtime.block_on(RamMap::read(&self.source, pid))
    }

    /// Where the guest's RAM is in the new process `pid`.
    pub fn destination_ram(&self, pid: i32) -> Result<RamMap, RamMapError> {
        match &self.destination {
            Some(new) => self.runtime.block_on(RamMap::read(&new.client, pid)),
            None => Err(RamMapError::NoRam),
        }
    }

    /// What forbids the old QEMU to send its guest that way, in its own words. Nothing is changed for good.
    pub fn blockers(&self, way: Way) -> Result<Vec<String>, MigrateError> {
        let ask = async {
            if way != Way::CprTransfer {
                return Ok(query(&self.source).await?.blockers);
            }
            // The reasons are those for the mode that is set; one that QEMU does not know, it refuses.
            if let Err(refusal) = set_mode(&self.source, "cpr-transfer").await {
                return Ok(vec![refusal.to_string()]);
            }
            let found = query(&self.source).await;
            set_mode(&self.source, "normal").await?;
            Ok(found?.blockers)
        };
        self.runtime.block_on(ask).map_err(MigrateError::old)
    }

    /// Has the old QEMU hand its memory over to one that was started with the channel `path` for that, and nothing but
    /// that yet: the guest runs on. Only with this the new one opens its sockets.
    pub fn hand_over_ram(&mut self, path: &Path, main: &Path) -> Result<(), MigrateError> {
        let socket = |path: &Path| json!({"transport": "socket", "type": "unix", "path": path.to_string_lossy()});
        let channels = json!({"channels": [
            {"channel-type": "main", "addr": socket(main)},
            {"channel-type": "cpr", "addr": socket(path)},
        ]});
        let start = async {
            capabilities(&self.source, &[("events", true)]).await?;
            set_mode(&self.source, "cpr-transfer").await?;
            let _: Value = self.source.execute_as("migrate", channels).await?;
            Ok(())
        };
        self.runtime.block_on(start).map_err(MigrateError::old)
    }

    /// Begins to move the guest. With [`Way::CprTransfer`], `main` is what [`Pair::hand_over_ram`] was told.
    pub fn start(&mut self, way: Way, limits: &Limits, main: &Path) -> Result<(), MigrateError> {
        self.was_running = self.source_state()? == RunState::Running;
        let new = self.target()?;
        let shared = way == Way::IgnoreShared;
        let runtime = &self.runtime;
        // A guest that stands is not let run, and its disks must be there nevertheless.
        let mut wanted = vec![("events", true), ("late-block-activate", self.was_running)];
        if shared {
            wanted.push(("x-ignore-shared", true));
        }
        runtime
            .block_on(capabilities(new, &wanted))
            .map_err(MigrateError::new)?;
        if way == Way::CprTransfer {
            let uri = format!("unix:{}", main.display());
            return runtime.block_on(receive(new, &uri)).map_err(MigrateError::new);
        }
        let (ours, theirs) = stream::channel()?;
        let uri = runtime.block_on(stream::pass(new, theirs)).map_err(MigrateError::new)?;
        runtime.block_on(receive(new, &uri)).map_err(MigrateError::new)?;
        let send = async {
            let source = &self.source;
            capabilities(source, &[("events", true), ("x-ignore-shared", shared)]).await?;
            let bandwidth = limits.bandwidth.unwrap_or(NO_LIMIT);
            set_downtime(source, FIRST_DOWNTIME_MS.min(limits.downtime_ms)).await?;
            let _: Value = source
                .execute_as("migrate-set-parameters", json!({"max-bandwidth": bandwidth}))
                .await?;
            let uri = stream::pass(source, ours).await?;
            if limits.standing {
                source.execute(qapi::qmp::stop {}).await?;
            }
            let _: Value = source.execute_as("migrate", json!({"uri": uri})).await?;
            Ok(())
        };
        runtime.block_on(send).map_err(MigrateError::old)
    }

    /// Waits until the guest has arrived, and stands in both. `observe` is told how far it is, some twenty times a second, and
    /// says whether to go on; `alive` whether the new process is.
    ///
    /// Errors: whatever they are, the guest may still be on its way; [`Pair::cancel`] comes next.
    pub fn wait(
        &mut self,
        limits: &Limits,
        observe: impl FnMut(&Progress) -> bool,
        alive: impl FnMut() -> bool,
    ) -> Result<Arrival, MigrateError> {
        let new = self.destination.as_mut().ok_or(MigrateError::NoDestination)?;
        let watch = Watch::new(&self.source, &new.client, limits, self.was_running);
        let events = [&mut self.source_events, &mut new.events];
        self.runtime.block_on(watch.wait(events, observe, alive))
    }

    /// Lets the guest run in the new QEMU, and gives the moment, in microseconds since 1970. From then on the old one's guest
    /// is history.
    ///
    /// Errors: where QEMU refused ([`CommandError::Refused`]), it has not run; else see [`Pair::has_run`].
    pub fn resume(&mut self) -> Result<Option<u64>, MigrateError> {
        let new = self.destination.as_mut().ok_or(MigrateError::NoDestination)?;
        let run = async {
            new.client.execute(qapi::qmp::cont {}).await?;
            // The event comes before the answer.
            Ok(resumed(&mut new.events))
        };
        self.runtime.block_on(run).map_err(MigrateError::new)
    }

    /// Whether the guest has run in the new QEMU, after a [`Pair::resume`] that failed otherwise than by a refusal. Its process
    /// must have ended: what it told before is still to be read, and it tells before it lets a vCPU run.
    pub fn has_run(&mut self, within: Duration) -> bool {
        let Some(new) = self.destination.as_mut() else {
            return false;
        };
        let end = async {
            loop {
                match new.events.recv().await {
                    Ok(event) if event.name == "RESUME" => return true,
                    Err(RecvError::Closed) => return false,
                    Ok(_) | Err(RecvError::Lagged(_)) => {}
                }
            }
        };
        // Where even that can't be told, it may have.
        let told = self.runtime.block_on(async { timeout(within, end).await });
        told.unwrap_or(true)
    }

    /// Gives the move up. Afterwards the old QEMU is at rest, with the guest running there, or standing where `completed` is
    /// told: then all had been sent already. A QEMU that was moved into tells its own arrival as `completed` until it sends for the
    /// first time; where the guest runs, or its operator paused it, nothing has been sent, and `None` is told.
    pub fn cancel(&mut self, within: Duration) -> Result<Status, MigrateError> {
        let end = Instant::now() + within;
        let give_up = async {
            let source = &self.source;
            let mut asked = false;
            loop {
                let progress = query(source).await?;
                if progress.status != Status::UnderWay || Instant::now() >= end {
                    // One that QEMU leaves as it is does no harm, but the next migration would be of that kind.
                    let _ = set_mode(source, "normal").await;
                    // Where all has been sent it is `postmigrate`.
                    let state = RunState::query(source).await?;
                    return Ok((progress, matches!(state, RunState::Running | RunState::Paused)));
                }
                if !asked {
                    let _: Value = source.execute_as("migrate_cancel", json!({})).await?;
                    asked = true;
                }
                sleep(Duration::from_millis(CANCEL_POLL_MS)).await;
            }
        };
        let (progress, is_here) = self.runtime.block_on(give_up).map_err(MigrateError::old)?;
        match progress.status {
            Status::Completed if is_here => Ok(Status::None),
            Status::UnderWay => Err(MigrateError::TooLong {
                within_s: within.as_secs(),
                state: progress.state,
            }),
            status => Ok(status),
        }
    }

    /// Lets the guest run in the old QEMU again, where it stands: after all had been sent, or because it stood for the copy. Only where
    /// the new one has never let it run, and its process is gone, with its hold on the disks. Tries for as long as `within` while
    /// QEMU refuses: it can't have a disk that somebody else has taken meanwhile.
    pub fn take_back(&mut self, within: Duration) -> Result<(), MigrateError> {
        let end = Instant::now() + within;
        let source = &self.source;
        let run = async {
            loop {
                match source.execute(qapi::qmp::cont {}).await {
                    Err(CommandError::Refused { .. }) if Instant::now() < end => {
                        sleep(Duration::from_millis(TAKE_BACK_RETRY_MS)).await;
                    }
                    result => return result.map(drop),
                }
            }
        };
        self.runtime.block_on(run).map_err(MigrateError::old)
    }

    fn target(&self) -> Result<&Client, MigrateError> {
        let new = self.destination.as_ref().ok_or(MigrateError::NoDestination)?;
        Ok(&new.client)
    }
}

/// When the guest was let run, by an event that has come already.
fn resumed(events: &mut Receiver<Event>) -> Option<u64> {
    while let Ok(event) = events.try_recv() {
        if event.name == "RESUME" {
            return event.at_us;
        }
    }
    None
}

/// How far a QEMU's migration is, in either direction.
pub(super) async fn query(client: &Client) -> Result<Progress, CommandError> {
    let reply: Value = client.execute_as("query-migrate", json!({})).await?;
    Ok(Progress::of(&reply))
}

/// Sets the longest time that the guest may stand.
pub(super) async fn set_downtime(client: &Client, downtime_ms: u64) -> Result<(), CommandError> {
    let _: Value = client
        .execute_as("migrate-set-parameters", json!({"downtime-limit": downtime_ms}))
        .await?;
    Ok(())
}

async fn set_mode(client: &Client, mode: &str) -> Result<(), CommandError> {
    let _: Value = client
        .execute_as("migrate-set-parameters", json!({"mode": mode}))
        .await?;
    Ok(())
}

async fn capabilities(client: &Client, wanted: &[(&str, bool)]) -> Result<(), CommandError> {
    let list: Vec<_> = wanted
        .iter()
        .map(|(name, state)| json!({"capability": name, "state": state}))
        .collect();
    let _: Value = client
        .execute_as("migrate-set-capabilities", json!({"capabilities": list}))
        .await?;
    Ok(())
}

async fn receive(client: &Client, uri: &str) -> Result<(), CommandError> {
    let _: Value = client.execute_as("migrate-incoming", json!({"uri": uri})).await?;
    Ok(())
}
