//! Waits for the arrival of a guest in the new QEMU.

use super::pair::{query, set_downtime};
use super::{Limits, MigrateError, Progress, Status};
use crate::client::{Client, Event};
use crate::machine::RunState;
use std::time::Duration;
use tokio::sync::broadcast::Receiver;
use tokio::sync::broadcast::error::RecvError;
use tokio::time::{MissedTickBehavior, interval, timeout};

/// Interval between two queries of the progress, in milliseconds. Events tell the end without delay.
const TICK_MS: u64 = 50;
/// First downtime limit, in milliseconds: too short to be noticed. A guest that writes faster than it is copied needs a longer one.
pub(super) const FIRST_DOWNTIME_MS: u64 = 20;
/// Rounds after which the downtime limit is raised: precopy does not converge.
const ROUNDS: u64 = 3;

/// A guest that has arrived: the new QEMU has all of it, and it is paused in both.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Arrival {
    /// True if the guest was running when it was paused for the rest of the copy.
    pub was_running: bool,
    /// When it was paused, in microseconds since 1970; `None` if it was paused before.
    pub stopped_at_us: Option<u64>,
}

/// What is known of the migration so far.
pub(super) struct Watch<'a> {
    pub(super) source: &'a Client,
    pub(super) destination: &'a Client,
    pub(super) limits: &'a Limits,
    /// True if the guest was running when the migration began.
    pub(super) was_running: bool,
    pub(super) downtime_ms: u64,
    pub(super) raised_at_round: u64,
    pub(super) sent: bool,
    pub(super) arrived: bool,
    pub(super) stopped_at_us: Option<u64>,
    /// The old QEMU's word for the state of the migration.
    pub(super) state: String,
}

impl<'a> Watch<'a> {
    pub(super) fn new(source: &'a Client, destination: &'a Client, limits: &'a Limits, was_running: bool) -> Self {
        Self {
            source,
            destination,
            limits,
            was_running,
            downtime_ms: FIRST_DOWNTIME_MS.min(limits.downtime_ms),
            raised_at_round: 0,
            sent: false,
            arrived: false,
            stopped_at_us: None,
            state: "not begun".to_owned(),
        }
    }

    /// See [`super::Pair::wait`]. The events start before the migration.
    pub(super) async fn wait(
        mut self,
        events: [&mut Receiver<Event>; 2],
        observe: impl FnMut(&Progress) -> bool,
        alive: impl FnMut() -> bool,
    ) -> Result<Arrival, MigrateError> {
        let time_max = self.limits.time_max;
        // A QEMU that hangs does not answer.
        match timeout(time_max, self.follow(events, observe, alive)).await {
            Ok(result) => result?,
            Err(_) => {
                return Err(MigrateError::TooLong {
                    within_s: time_max.as_secs(),
                    state: self.state,
                });
            }
        }
        Ok(Arrival {
            was_running: self.was_running,
            stopped_at_us: self.stopped_at_us,
        })
    }

    async fn follow(
        &mut self,
        events: [&mut Receiver<Event>; 2],
        mut observe: impl FnMut(&Progress) -> bool,
        mut alive: impl FnMut() -> bool,
    ) -> Result<(), MigrateError> {
        let [from_source, from_destination] = events;
        let mut tick = interval(Duration::from_millis(TICK_MS));
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        while !(self.sent && self.arrived) {
            tokio::select! {
                biased;
                event = next(from_source, "old") => self.source_event(&event?).await?,
                event = next(from_destination, "new") => self.destination_event(&event?)?,
                _ = tick.tick() => {
                    let progress = self.look().await?;
                    if self.sent {
                        // In the last few milliseconds the migration is not cancelled any more.
                    } else if !observe(&progress) {
                        return Err(MigrateError::Cancelled);
                    } else if !alive() {
                        return Err(MigrateError::DestinationGone);
                    }
                    self.state = progress.state;
                }
            }
        }
        Ok(())
    }

    async fn source_event(&mut self, event: &Event) -> Result<(), MigrateError> {
        match event.name.as_str() {
            "STOP" => {
                self.stopped_at_us = event.at_us;
                if self.limits.paused_throughout {
                    return Ok(());
                }
                // The stop of the migration has another state. This one is a command of another client, and is kept.
                if RunState::query(self.source).await.map_err(MigrateError::old)? == RunState::Paused {
                    self.was_running = false;
                }
            }
            "RESUME" => self.was_running = true,
            "MIGRATION" => match state_of(event) {
                Status::Completed => self.sent = true,
                Status::GivenUp => return Err(self.given_up().await),
                _ => {}
            },
            _ => {}
        }
        Ok(())
    }

    fn destination_event(&mut self, event: &Event) -> Result<(), MigrateError> {
        if event.name == "MIGRATION" {
            match state_of(event) {
                Status::Completed => self.arrived = true,
                Status::GivenUp => {
                    return Err(MigrateError::Failed {
                        which: "new",
                        reason: "it could not take the guest in; its own messages say why".to_owned(),
                    });
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Queries what no event told, and raises the downtime limit if precopy does not converge.
    async fn look(&mut self) -> Result<Progress, MigrateError> {
        let progress = query(self.source).await.map_err(MigrateError::old)?;
        match progress.status {
            Status::Completed => self.sent = true,
            Status::GivenUp => return Err(self.given_up().await),
            _ => {}
        }
        if self.sent {
            let arrived = query(self.destination).await.map_err(MigrateError::new)?;
            self.arrived |= arrived.status == Status::Completed;
        }
        if progress.rounds >= self.raised_at_round + ROUNDS && self.downtime_ms < self.limits.downtime_ms {
            self.raised_at_round = progress.rounds;
            self.downtime_ms = self.downtime_ms.saturating_mul(2).min(self.limits.downtime_ms);
            set_downtime(self.source, self.downtime_ms)
                .await
                .map_err(MigrateError::old)?;
        }
        Ok(progress)
    }

    async fn given_up(&self) -> MigrateError {
        match query(self.source).await {
            Ok(progress) => MigrateError::Failed {
                which: "old",
                reason: progress.reason.unwrap_or(progress.state),
            },
            Err(cause) => MigrateError::old(cause),
        }
    }
}

fn state_of(event: &Event) -> Status {
    Progress::of(&event.data).status
}

/// The next event.
///
/// # Errors
///
/// The connection has ended.
async fn next(events: &mut Receiver<Event>, which: &'static str) -> Result<Event, MigrateError> {
    loop {
        match events.recv().await {
            Ok(event) => return Ok(event),
            // The regular queries find out what the lost events told.
            Err(RecvError::Lagged(_)) => {}
            Err(RecvError::Closed) => return Err(MigrateError::Gone { which }),
        }
    }
}
