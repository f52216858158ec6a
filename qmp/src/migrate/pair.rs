//! Drives the two QEMUs of a migration together.

use super::arrival::{Arrival, FIRST_DOWNTIME_MS, Watch};
use super::{Facts, Limits, Method, MigrateError, Progress, Status, settings, stream};
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

/// Interval between two attempts to connect to a socket that a new process has not opened yet, in milliseconds.
const OPEN_RETRY_MS: u64 = 3;
/// Interval between two queries of a migration that is being cancelled, in milliseconds.
const CANCEL_POLL_MS: u64 = 10;
/// Interval between two attempts to resume a guest in its old QEMU, in milliseconds.
const RESUME_RETRY_MS: u64 = 100;
/// Bandwidth for "no limit", in bytes a second. QEMU's own default is one gigabit.
const NO_LIMIT: u64 = 1 << 40;

/// The old QEMU, which has the guest, and the new one, which is to get it. Every method blocks.
#[derive(Debug)]
pub struct Pair {
    // Declared before the runtime, so that they are dropped before: their tasks run there.
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

    /// Connects to the new QEMU, which may not have opened its socket yet: repeats attempts for `within`, as long as the process is `alive`.
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

    /// The properties of the old QEMU's machine.
    pub fn source_facts(&self) -> Result<Facts, MigrateError> {
        self.runtime
            .block_on(Facts::read(&self.source))
            .map_err(MigrateError::old)
    }

    /// The properties of the new QEMU's machine.
    pub fn destination_facts(&self) -> Result<Facts, MigrateError> {
        self.runtime
            .block_on(Facts::read(self.target()?))
            .map_err(MigrateError::new)
    }

    /// Copies settings to the new QEMU that were changed in the old one since its start, as far as they can be set. [`Pair::destination_facts`] gives the
    /// result.
    pub fn carry_settings_over(&self, old: &Facts, new: &Facts) -> Result<(), MigrateError> {
        let set = settings::carry_over(self.target()?, &old.settings, &new.settings);
        self.runtime.block_on(set).map_err(MigrateError::new)
    }

    /// The state of the guest in the old QEMU.
    pub fn source_state(&self) -> Result<RunState, MigrateError> {
        self.runtime
            .block_on(RunState::query(&self.source))
            .map_err(MigrateError::old)
    }

    /// The state of the guest in the new QEMU.
    pub fn destination_state(&self) -> Result<RunState, MigrateError> {
        self.runtime
            .block_on(RunState::query(self.target()?))
            .map_err(MigrateError::new)
    }

    /// The progress of the old QEMU's migration.
    pub fn sent(&self) -> Result<Progress, MigrateError> {
        self.runtime.block_on(query(&self.source)).map_err(MigrateError::old)
    }

    /// The progress of the new QEMU's migration.
    pub fn arrived(&self) -> Result<Progress, MigrateError> {
        self.runtime.block_on(query(self.target()?)).map_err(MigrateError::new)
    }

    /// The map of the guest's RAM in the old process `pid`.
    pub fn source_ram(&self, pid: i32) -> Result<RamMap, RamMapError> {
        self.runtime.block_on(RamMap::read(&self.source, pid))
    }

    /// The map of the guest's RAM in the new process `pid`.
    pub fn destination_ram(&self, pid: i32) -> Result<RamMap, RamMapError> {
        match &self.destination {
            Some(new) => self.runtime.block_on(RamMap::read(&new.client, pid)),
            None => Err(RamMapError::NoRam),
        }
    }

    /// The old QEMU's reasons that forbid a migration by this method. Settings are restored afterwards.
    pub fn blockers(&self, method: Method) -> Result<Vec<String>, MigrateError> {
        let ask = async {
            if method != Method::CprTransfer {
                return Ok(query(&self.source).await?.blockers);
            }
            // QEMU gives the reasons for the mode that is set. It refuses an unknown mode.
            if let Err(refusal) = set_mode(&self.source, "cpr-transfer").await {
                return Ok(vec![refusal.to_string()]);
            }
            let found = query(&self.source).await;
            set_mode(&self.source, "normal").await?;
            Ok(found?.blockers)
        };
        self.runtime.block_on(ask).map_err(MigrateError::old)
    }

    /// Lets the old QEMU hand over its memory, and nothing else yet, to one that was started with the channel `path` for that. The guest runs on. The new
    /// QEMU opens its sockets only after this.
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

    /// Starts the migration. With [`Method::CprTransfer`], `main` is the path that [`Pair::hand_over_ram`] was given.
    pub fn start(&mut self, method: Method, limits: &Limits, main: &Path) -> Result<(), MigrateError> {
        self.was_running = self.source_state()? == RunState::Running;
        let new = self.target()?;
        let shared = method == Method::IgnoreShared;
        let runtime = &self.runtime;
        // A paused guest is not resumed, but its disks must be activated.
        let mut wanted = vec![("events", true), ("late-block-activate", self.was_running)];
        if shared {
            wanted.push(("x-ignore-shared", true));
        }
        runtime
            .block_on(capabilities(new, &wanted))
            .map_err(MigrateError::new)?;
        if method == Method::CprTransfer {
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
            if limits.paused_throughout {
                source.execute(qapi::qmp::stop {}).await?;
            }
            let _: Value = source.execute_as("migrate", json!({"uri": uri})).await?;
            Ok(())
        };
        runtime.block_on(send).map_err(MigrateError::old)
    }

    /// Waits until the guest has arrived, and is paused in both. `observe` gets the progress some twenty times a second, and tells whether to continue;
    /// `alive` tells whether the new process runs.
    ///
    /// # Errors
    ///
    /// The guest may still be migrating: the caller must call [`Pair::cancel`].
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

    /// Resumes the guest in the new QEMU, and gives the time, in microseconds since 1970. From then on the old QEMU's copy must not run again.
    ///
    /// # Errors
    ///
    /// If QEMU refused ([`CommandError::Refused`]), the guest has not run. After other errors, [`Pair::has_run`] tells.
    pub fn resume(&mut self) -> Result<Option<u64>, MigrateError> {
        let new = self.destination.as_mut().ok_or(MigrateError::NoDestination)?;
        let run = async {
            new.client.execute(qapi::qmp::cont {}).await?;
            // The event comes before the reply.
            Ok(resumed(&mut new.events))
        };
        self.runtime.block_on(run).map_err(MigrateError::new)
    }

    /// True if the guest has run in the new QEMU, after a [`Pair::resume`] that failed without a refusal. The new process must have ended. Its last events
    /// can still be read, and it sends the event before a vCPU runs.
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
        // If the events cannot be read, the guest may have run.
        let told = self.runtime.block_on(async { timeout(within, end).await });
        told.unwrap_or(true)
    }

    /// Cancels the migration. Afterwards the old QEMU is idle. The guest runs there, or is paused if the result is `completed`: then all had been sent
    /// already. A QEMU that has received a guest reports that migration as `completed` until it sends for the first time; if its guest runs, or its operator
    /// has paused it, nothing has been sent, and the result is `None`.
    pub fn cancel(&mut self, within: Duration) -> Result<Status, MigrateError> {
        let end = Instant::now() + within;
        let give_up = async {
            let source = &self.source;
            let mut asked = false;
            loop {
                let progress = query(source).await?;
                if progress.status != Status::UnderWay || Instant::now() >= end {
                    // A failure does no harm now, but the next migration would use this mode.
                    let _ = set_mode(source, "normal").await;
                    // After all has been sent, the state is `postmigrate`.
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

    /// Resumes the guest in the old QEMU, where it is paused: because all had been sent, or for the copy. The new QEMU must never have resumed it, and its
    /// process, with its locks of the disks, must have ended. Repeats attempts for `within` while QEMU refuses: another process may still hold a disk.
    pub fn resume_source(&mut self, within: Duration) -> Result<(), MigrateError> {
        let end = Instant::now() + within;
        let source = &self.source;
        let run = async {
            loop {
                match source.execute(qapi::qmp::cont {}).await {
                    Err(CommandError::Refused { .. }) if Instant::now() < end => {
                        sleep(Duration::from_millis(RESUME_RETRY_MS)).await;
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

/// The time of the guest's resume, from an event that has come already.
fn resumed(events: &mut Receiver<Event>) -> Option<u64> {
    while let Ok(event) = events.try_recv() {
        if event.name == "RESUME" {
            return event.at_us;
        }
    }
    None
}

/// The progress of a QEMU's migration, in either direction.
pub(super) async fn query(client: &Client) -> Result<Progress, CommandError> {
    let reply: Value = client.execute_as("query-migrate", json!({})).await?;
    Ok(Progress::of(&reply))
}

/// Sets the downtime limit.
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
