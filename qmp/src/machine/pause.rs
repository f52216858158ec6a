//! A pause of the guest, as a guard.
//!
//! The connect to the stub stops the guest, with the packets that request the registers already in the socket. The detach on the same connection
//! resumes it. Of the methods measured on QEMU 10.0.2 and 7.2.22 this is the fastest. It is faster than a bare QMP `stop` and `cont`, which pass
//! through QEMU's monitor threads twice. The stub's socket is opened before the pause, and its connection closed after it.
//!
//! The guard's drop makes sure that the guest runs again. If the stub fails, the stub is closed, and then QMP `cont` is sent: in this order, so that a
//! connection that QEMU has not accepted yet cannot stop the guest afterwards.

use super::Machine;
use super::busy::Busy;
use super::run_state::RunState;
use super::stub::StubOpenError;
use crate::client::{CommandError, Event};
use crate::gdb::{Connection, Stopped, StubError};
use crate::memory::mtree::RamRange;
use crate::text::TextError;
use guest_core::Gpa;
use guest_core::Registers;
use std::io;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use tokio::sync::broadcast::{Receiver, error::RecvError};
use tokio::time::timeout;

/// Longest wait for the STOP event of our own pause, in milliseconds. QEMU sends it before the stub's first reply, so that it is usually there. A QEMU
/// that sends none must not keep the guest stopped.
const STOP_EVENT_MS: u64 = 20;

/// Attempts through QMP if QEMU does not answer, each with the client's own timeout.
const QMP_TRIES: u32 = 3;

/// How often QMP is asked for the vCPUs if the stub lists others: a vCPU may be plugged or unplugged between the two questions. While the guest is
/// stopped, only another QMP client could do that, so that the second answers agree.
const VCPU_TRIES: usize = 3;

/// Why the guest was not paused, written or resumed.
#[derive(Debug, thiserror::Error)]
pub enum PauseError {
    /// QEMU works on the guest's memory.
    #[error("the guest cannot be patched now: {0}")]
    Busy(Busy),
    /// The guest is neither running nor paused.
    #[error("the guest cannot be patched in its state `{0}`; it must be running, or paused by its operator")]
    State(RunState),
    /// QEMU did not answer.
    #[error(transparent)]
    Command(#[from] CommandError),
    /// QEMU's answer is not understood.
    #[error(transparent)]
    Text(#[from] TextError),
    /// The GDB stub could not be opened.
    #[error("cannot open QEMU's GDB stub")]
    Open(#[from] StubOpenError),
    /// The connect to the socket of the GDB stub failed.
    #[error("cannot connect to QEMU's GDB stub")]
    Connect(#[source] io::Error),
    /// The GDB stub failed.
    #[error(transparent)]
    Stub(#[from] StubError),
    /// The bytes are not all guest RAM.
    #[error("{len} bytes at {at} are not guest RAM")]
    NotRam {
        /// The first byte.
        at: Gpa,
        /// Bytes.
        len: usize,
    },
    /// The guest could not be resumed. It stays stopped until an operator enters `cont`.
    #[error("the guest does not run again: its state is `{state}`")]
    NotResumed {
        /// The state from QEMU, or why QEMU gave none.
        state: String,
    },
}

impl PauseError {
    /// True if the guest was paused, and is not known to run again.
    pub fn left_paused(&self) -> bool {
        matches!(self, Self::NotResumed { .. })
    }

    /// True if a vCPU was plugged or unplugged meanwhile: another attempt may succeed.
    pub fn is_passing(&self) -> bool {
        matches!(self, Self::Stub(StubError::Vcpus { .. }))
    }
}

/// The times of a pause by the host's monotonic clock, in microseconds. The rest of the total was the caller's own work.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PauseTimes {
    /// From the request until the guest had stopped.
    pub stop_us: u64,
    /// Reading the registers of all vCPUs.
    pub registers_us: u64,
    /// All reads and writes of guest memory through the stub.
    pub writes_us: u64,
    /// From the request to resume until QEMU's reply that the guest runs.
    pub resume_us: u64,
    /// From the request to stop until QEMU's reply that the guest runs; if the guest stays paused, until the end.
    pub total_us: u64,
    /// True if the guest was paused before, and was left paused.
    pub left_paused: bool,
}

/// A guest whose vCPUs are stopped. Dropping it resumes the guest; [`Paused::resume`] tells how it went.
#[derive(Debug)]
pub struct Paused<'a> {
    machine: &'a mut Machine,
    connection: Connection,
    events: Receiver<Event>,
    /// True if the guest ran before, and must be resumed.
    was_running: bool,
    vcpus: Vec<Registers>,
    times: PauseTimes,
    began: Instant,
    /// `began` by the clock that QEMU stamps events with, in microseconds since 1970.
    began_at_us: u64,
    finished: bool,
}

impl<'a> Paused<'a> {
    pub(super) fn begin(machine: &'a mut Machine) -> Result<Self, PauseError> {
        machine.prepare_pause()?;
        let threads = machine.threads()?;
        let events = machine.client.events();
        let was_running = match machine.run_state()? {
            RunState::Running => true,
            RunState::Paused => false,
            other => return Err(PauseError::State(other)),
        };
        let began = Instant::now();
        let began_at_us = now_us();
        let connection = connect(machine)?;
        let times = PauseTimes::default();
        let vcpus = Vec::new();
        let finished = false;
        let mut paused = Self {
            machine,
            connection,
            events,
            was_running,
            vcpus,
            times,
            began,
            began_at_us,
            finished,
        };
        // From here on the guest is stopped, or about to stop.
        let stopped = match stop(&mut paused.connection, paused.machine, threads) {
            Ok(stopped) => stopped,
            Err(error) => return Err(paused.give_up(error)),
        };
        paused.vcpus = stopped.vcpus;
        paused.times.stop_us = as_us(stopped.stopped_at - began);
        paused.times.registers_us = as_us(stopped.stopped_at.elapsed());
        Ok(paused)
    }

    /// Resumes the guest after `error`. If that fails, too, gives this graver error.
    fn give_up(mut self, error: PauseError) -> PauseError {
        match self.finish() {
            Err(graver @ PauseError::NotResumed { .. }) => graver,
            _ => error,
        }
    }

    /// The registers of each vCPU, in the order of their numbers.
    pub fn registers(&self) -> &[Registers] {
        &self.vcpus
    }

    /// The machine, for questions that are allowed while the guest is stopped.
    pub fn machine(&self) -> &Machine {
        self.machine
    }

    /// Time since the request to stop: for the caller's own bound on the pause.
    pub fn elapsed(&self) -> Duration {
        self.began.elapsed()
    }

    /// Writes guest-physical memory, also of code that QEMU has translated. All writes must be in RAM, which is checked before the first one.
    ///
    /// # Errors
    ///
    /// The writes are not all in RAM. After another error, some may be made, and some may be made later: see [`Paused::drain`].
    pub fn write(&mut self, writes: &[(Gpa, &[u8])]) -> Result<(), PauseError> {
        for (at, bytes) in writes {
            self.check_ram(*at, bytes.len())?;
        }
        self.timed(|connection| connection.write(writes))
    }

    /// Reads guest-physical memory through QEMU.
    pub fn read(&mut self, at: Gpa, buf: &mut [u8]) -> Result<(), PauseError> {
        self.check_ram(at, buf.len())?;
        self.timed(|connection| connection.read(at, buf))
    }

    /// Resumes the guest, if it ran before, and gives the times of the pause.
    pub fn resume(mut self) -> Result<PauseTimes, PauseError> {
        self.finish()?;
        Ok(self.times)
    }

    /// Waits, after a failed write, until none of its writes can be made later, and connects again. The guest stays stopped.
    ///
    /// # Errors
    ///
    /// QEMU does not answer, or the guest was resumed by another client.
    pub fn drain(&mut self) -> Result<(), PauseError> {
        if self.connection.is_in_step() {
            return Ok(());
        }
        let mut result = Ok(());
        for _ in 0..QMP_TRIES {
            self.tell_silence();
            result = self.connect_anew();
            // The stub and the monitor share one loop of QEMU: while they do not answer, nothing resumes the guest either.
            if !matches!(
                result,
                Err(PauseError::Command(_) | PauseError::Open(_) | PauseError::Stub(_))
            ) {
                break;
            }
        }
        result
    }

    /// Closing the stub discards what is in the old connection. QEMU then leaves a stopped guest stopped.
    fn connect_anew(&mut self) -> Result<(), PauseError> {
        self.machine.close_stub()?;
        self.machine.prepare_pause()?;
        let threads = self.machine.threads()?;
        match self.machine.run_state()? {
            RunState::Paused => {}
            other => return Err(PauseError::State(other)),
        }
        let mut connection = connect(self.machine)?;
        stop(&mut connection, self.machine, threads)?;
        self.connection = connection;
        Ok(())
    }

    fn tell_silence(&self) {
        if let Some(tell) = self.machine.on_silence {
            tell(self.began.elapsed());
        }
    }

    fn timed(&mut self, work: impl FnOnce(&mut Connection) -> Result<(), StubError>) -> Result<(), PauseError> {
        let start = Instant::now();
        let result = work(&mut self.connection);
        self.times.writes_us = self.times.writes_us.saturating_add(as_us(start.elapsed()));
        Ok(result?)
    }

    fn check_ram(&self, at: Gpa, len: usize) -> Result<(), PauseError> {
        let ranges = self.machine.ram.as_deref().unwrap_or_default();
        if is_ram(ranges, at, len) {
            Ok(())
        } else {
            Err(PauseError::NotRam { at, len })
        }
    }

    fn finish(&mut self) -> Result<(), PauseError> {
        if self.finished {
            return Ok(());
        }
        self.finished = true;
        let start = Instant::now();
        self.times.left_paused = !self.was_running || self.somebody_else_stopped_it();
        let result = if self.times.left_paused {
            // The guest stays stopped in both cases.
            self.connection
                .leave_stopped()
                .or_else(|_| Ok(self.machine.close_stub()?))
        } else {
            self.connection.resume().or_else(|_| self.resume_by_qmp())
        };
        self.times.resume_us = as_us(start.elapsed());
        self.times.total_us = as_us(self.began.elapsed());
        result
    }

    /// True if another client's `stop` came between the question whether the guest runs and our own stop. The STOP event is then older than our stop.
    fn somebody_else_stopped_it(&mut self) -> bool {
        let Self {
            machine,
            events,
            began,
            began_at_us,
            ..
        } = self;
        let stop = async {
            loop {
                match events.recv().await {
                    Ok(event) if event.name == "STOP" => return event.at_us,
                    Ok(_) | Err(RecvError::Lagged(_)) => {}
                    Err(RecvError::Closed) => return None,
                }
            }
        };
        let at_us = machine.block_on(async { timeout(Duration::from_millis(STOP_EVENT_MS), stop).await });
        let times = (*began_at_us, now_us(), began.elapsed());
        at_us.ok().flatten().is_some_and(|at_us| is_anothers(at_us, times))
    }

    /// Resumes the guest when the stub does not answer. QEMU executes the commands in this order even if it answers too late, so that it never accepts a
    /// connection that it has not accepted yet.
    fn resume_by_qmp(&mut self) -> Result<(), PauseError> {
        self.machine.stub = None;
        let client = &self.machine.client;
        let mut state = String::new();
        for _ in 0..QMP_TRIES {
            self.tell_silence();
            let attempt = async {
                let closed = client.hmp("gdbserver none").await;
                let continued = client.execute(qapi::qmp::cont {}).await;
                let state = RunState::query(client).await?;
                if state != RunState::Running {
                    continued?;
                    closed?;
                }
                Ok::<_, CommandError>(state)
            };
            state = match self.machine.block_on(attempt) {
                Ok(RunState::Running) => return Ok(()),
                Ok(other) => other.to_string(),
                Err(cause) => cause.to_string(),
            };
        }
        Err(PauseError::NotResumed { state })
    }
}

impl Drop for Paused<'_> {
    fn drop(&mut self) {
        // A drop cannot report an error. The supervisor, or the next command, finds the guest's state in QEMU.
        let _ = self.finish();
    }
}

/// Connects to the open stub.
fn connect(machine: &Machine) -> Result<Connection, PauseError> {
    let stub = machine.stub.as_ref();
    let opened = stub.ok_or_else(|| io::ErrorKind::NotFound.into());
    let connected = opened.and_then(|stub| Connection::open(&stub.socket(), machine.reply_timeout));
    connected.map_err(PauseError::Connect)
}

/// Waits until the guest has stopped, and reads the registers of all vCPUs: of `threads`, or, if the stub lists others, of those that QMP lists now.
fn stop(connection: &mut Connection, machine: &mut Machine, mut threads: Vec<u64>) -> Result<Stopped, PauseError> {
    let mut tries = 1;
    loop {
        match connection.stop(&threads, &mut machine.layout) {
            Err(StubError::Vcpus { .. }) if tries < VCPU_TRIES => {
                tries += 1;
                threads = machine.threads()?;
            }
            stopped => return Ok(stopped?),
        }
    }
}

/// True if all bytes are RAM, in one range or in several adjacent ones.
fn is_ram(ranges: &[RamRange], at: Gpa, len: usize) -> bool {
    let Some(end) = u64::try_from(len).ok().and_then(|len| at.0.checked_add(len)) else {
        return false;
    };
    let covered = ranges
        .iter()
        .filter(|range| range.gpa.0 < end)
        .fold(at.0, |covered, range| match range.gpa.0 <= covered {
            true => covered.max(range.gpa.0.saturating_add(range.len)),
            false => covered,
        });
    covered >= end
}

/// The clock that QEMU stamps events with, in microseconds since 1970.
fn now_us() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, as_us)
}

/// True where an event is older than our stop, by QEMU's clock. Given are that clock's time at our stop and now, and how much time has passed. A clock that
/// was set back meanwhile makes the event of our own stop the older one.
fn is_anothers(at_us: u64, (began_at_us, now_us, passed): (u64, u64, Duration)) -> bool {
    let set_back_us = began_at_us.saturating_add(as_us(passed)).saturating_sub(now_us);
    began_at_us.saturating_sub(at_us) > set_back_us
}

fn as_us(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stop_of_ours_is_not_taken_for_anothers_where_the_clock_was_set_back() {
        let (began_us, passed) = (1_000_000, Duration::from_micros(3_000));
        for (at_us, now_us, expected) in [
            (1_000_100, 1_003_000, false),
            (1_000_000, 1_003_000, false),
            (999_990, 1_003_000, true),
            // Set back by 10 ms, before and after the event.
            (990_100, 993_000, false),
            (1_000_100, 993_000, false),
            (999_990, 2_003_000, true),
        ] {
            assert_eq!(
                is_anothers(at_us, (began_us, now_us, passed)),
                expected,
                "{at_us} {now_us}"
            );
        }
    }

    #[test]
    fn only_bytes_wholly_inside_of_ranges_are_ram() {
        let range = |gpa, len| RamRange {
            gpa: Gpa(gpa),
            len,
            name: "a".into(),
            offset: 0,
        };
        let ranges = [range(0, 0x5_0000), range(0x5_0000, 0x5_0000), range(0x10_0000, 0x1000)];
        for (gpa, len) in [(0, 0xa0000), (0x4_ffff, 2), (0x9ffff, 1), (0x10_0ff0, 16)] {
            assert!(is_ram(&ranges, Gpa(gpa), len), "{gpa:#x}");
        }
        for (gpa, len) in [
            (0x9ffff, 2),
            (0xa0000, 1),
            (0x10_0ff0, 17),
            (u64::MAX, 1),
            (0, usize::MAX),
        ] {
            assert!(!is_ram(&ranges, Gpa(gpa), len), "{gpa:#x}");
        }
    }
}
