//! A running QEMU, with blocking methods for what vmpatch needs of it.

mod busy;
mod pause;
mod run_state;
mod stub;

pub use busy::Busy;
pub use pause::{PauseError, PauseTimes, Paused};
pub use run_state::RunState;
pub use stub::StubOpenError;

use crate::client::{Client, CommandError, ConnectError};
use crate::cpu::info_registers;
use crate::gdb::Layout;
use crate::memory::mtree::{self, RamRange};
use crate::memory::{RamMap, RamMapError, RamRegion};
use crate::text::TextError;
use guest_core::Registers;
use serde::Deserialize;
use serde_json::json;
use std::io;
use std::path::Path;
use std::time::Duration;
use stub::ListeningStub;
use tokio::runtime::{Builder, Runtime};

/// Default time for the replies to one exchange within a pause, in seconds. A stop drains the guest's disks, which may take seconds with a slow
/// disk.
const REPLY_TIMEOUT_S: u64 = 10;

/// Longest time for closing the stub when the machine is dropped, in seconds. The result is not needed, and QEMU executes the command when it
/// can.
const CLOSE_TIMEOUT_S: u64 = 2;

/// Why attaching to a QEMU failed.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// The QMP connection was not made.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// The event loop cannot be created.
    #[error("cannot set up an event loop")]
    EventLoop(#[source] io::Error),
}

/// Why a question to QEMU has no answer.
#[derive(Debug, thiserror::Error)]
pub enum QueryError {
    /// QEMU did not answer.
    #[error(transparent)]
    Command(#[from] CommandError),
    /// QEMU's answer is not understood.
    #[error(transparent)]
    Text(#[from] TextError),
}

#[derive(Deserialize)]
struct Vcpu {
    #[serde(rename = "cpu-index")]
    index: u64,
    #[serde(rename = "thread-id")]
    thread: i64,
}

/// A QEMU that is attached to through its QMP monitor.
///
/// Every method blocks. The machine owns the event loop that drives its [`Client`], and must not be used from inside another event loop. When it is
/// dropped, it closes the GDB stub, if it has opened it.
#[derive(Debug)]
pub struct Machine {
    // Declared before the runtime, so that it is dropped before: its task runs there.
    client: Client,
    runtime: Runtime,
    stub: Option<ListeningStub>,
    layout: Option<Layout>,
    ram: Option<Vec<RamRange>>,
    reply_timeout: Duration,
    on_silence: Option<fn(Duration)>,
}

impl Machine {
    /// Connects to the QMP socket at `path` within `within`.
    pub fn attach(path: &Path, within: Duration) -> Result<Self, AttachError> {
        Self::attach_by(Client::connect(path, within))
    }

    /// Attaches through the client that `connecting` gives: see [`Transport`](crate::client::Transport).
    pub fn attach_by(connecting: impl Future<Output = Result<Client, ConnectError>>) -> Result<Self, AttachError> {
        let runtime = Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(AttachError::EventLoop)?;
        let client = runtime.block_on(connecting)?;
        let reply_timeout = Duration::from_secs(REPLY_TIMEOUT_S);
        Ok(Self {
            client,
            runtime,
            stub: None,
            layout: None,
            ram: None,
            reply_timeout,
            on_silence: None,
        })
    }

    /// The QMP connection, for commands without a method here. [`Machine::block_on`] runs them.
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// Waits for a command of [`Machine::client`].
    pub fn block_on<F: Future>(&self, future: F) -> F::Output {
        self.runtime.block_on(future)
    }

    /// QEMU's version: major, minor, micro.
    pub fn version(&self) -> (u64, u64, u64) {
        self.client.greeting().version
    }

    /// The QEMU process, as far as the socket tells: see [`Client::peer_pid`].
    pub fn pid(&self) -> Option<i32> {
        self.client.peer_pid()
    }

    /// Whether the guest runs.
    pub fn run_state(&self) -> Result<RunState, CommandError> {
        self.block_on(RunState::query(&self.client))
    }

    /// What QEMU does with the guest's memory that forbids patching; `None` for nothing.
    pub fn busy_with(&self) -> Result<Option<Busy>, CommandError> {
        self.block_on(Busy::query(&self.client))
    }

    /// Where the guest's RAM is, in process `pid` (see [`Machine::pid`]). Does not pause the guest. A pause writes nowhere else.
    pub fn ram_map(&mut self, pid: i32) -> Result<RamMap, RamMapError> {
        let map = self.block_on(RamMap::read(&self.client, pid))?;
        self.ram = Some(map.regions.iter().map(RamRegion::range).collect());
        Ok(map)
    }

    /// The guest's name (`-name`), if it has one; and true if QEMU translates the guest's code (TCG) instead of running it with KVM. Writes to guest
    /// memory from outside do not change translated code; writes through QEMU do ([`Paused::write`]).
    pub fn name_and_is_tcg(&self) -> Result<(Option<String>, bool), CommandError> {
        self.block_on(async {
            let (name, kvm) = tokio::try_join!(
                self.client.execute(qapi::qmp::query_name {}),
                self.client.execute(qapi::qmp::query_kvm {}),
            )?;
            Ok((name.name, !kvm.enabled))
        })
    }

    /// Registers of all vCPUs while they run, to find things by: see [`info_registers`]. Does not pause the guest.
    pub fn cpu_states(&self) -> Result<Vec<Registers>, QueryError> {
        let text = self.block_on(self.client.hmp("info registers -a"))?;
        Ok(info_registers::parse(&text)?)
    }

    /// Sets the longest time for the reply to a QMP command, and for those to one exchange within a pause. After it, a pause is given up and
    /// the guest resumed.
    pub fn set_reply_timeout(&mut self, within: Duration) {
        self.reply_timeout = within;
        self.client.set_command_timeout(within);
    }

    /// Sets a callback for each time that QEMU did not answer in a pause and is tried again, which may take more than a minute. It gets the length of the
    /// pause so far, and must not block.
    pub fn on_silence(&mut self, tell: fn(Duration)) {
        self.on_silence = Some(tell);
    }

    /// Opens the GDB stub and reads what a pause needs, so that the pause is short. [`Machine::pause`] does it otherwise. Does not pause the guest.
    pub fn prepare_pause(&mut self) -> Result<(), PauseError> {
        if self.ram.is_none() {
            self.ram = Some(mtree::ram_ranges(&self.block_on(self.client.hmp("info mtree -f"))?)?);
        }
        if self.stub.is_none() {
            self.stub = Some(self.runtime.block_on(ListeningStub::open(&self.client))?);
        }
        Ok(())
    }

    /// Stops all vCPUs and reads their registers. The guest runs again when the guard is resumed or dropped, on any
    /// path; a guest that was paused already stays paused.
    ///
    /// Refused in any state but running and paused, and while QEMU works on the guest's memory ([`Machine::busy_with`]).
    pub fn pause(&mut self) -> Result<Paused<'_>, PauseError> {
        if let Some(busy) = self.busy_with()? {
            return Err(PauseError::Busy(busy));
        }
        Paused::begin(self)
    }

    /// As [`Machine::pause`], but also while QEMU works on the guest's memory. For the rollback of a change whose process was killed: half a patch in the
    /// guest is worse than half a patch in a snapshot.
    pub fn pause_to_recover(&mut self) -> Result<Paused<'_>, PauseError> {
        Paused::begin(self)
    }

    /// Thread numbers of the vCPUs in the stub: index plus one.
    fn threads(&self) -> Result<Vec<u64>, CommandError> {
        let vcpus = self.vcpus()?;
        Ok(vcpus.iter().map(|vcpu| vcpu.index.saturating_add(1)).collect())
    }

    /// The numbers of the threads that run the vCPUs, as QEMU knows them: in its own PID namespace.
    pub fn vcpu_threads(&self) -> Result<Vec<i64>, CommandError> {
        Ok(self.vcpus()?.iter().map(|vcpu| vcpu.thread).collect())
    }

    fn vcpus(&self) -> Result<Vec<Vcpu>, CommandError> {
        self.block_on(self.client.execute_as("query-cpus-fast", json!({})))
    }

    /// Closes a GDB stub that a killed process has left; [`Machine::pause`] does so, too. Does not touch a stub that this process uses, nor an operator's.
    pub fn close_left_stub(&mut self) -> Result<(), CommandError> {
        if self.stub.is_some() { Ok(()) } else { self.close_stub() }
    }

    /// Closes the QMP connection, so that another process can use its socket. Commands that were sent may still take effect. Every later command fails.
    /// An open stub is left to the next process, as by a process that was killed.
    pub fn disconnect(&mut self) {
        self.stub = None;
        self.runtime.block_on(self.client.disconnect());
    }

    /// Closes the stub.
    fn close_stub(&mut self) -> Result<(), CommandError> {
        self.stub = None;
        self.block_on(stub::close(&self.client))
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if self.stub.is_some() {
            self.client.set_command_timeout(Duration::from_secs(CLOSE_TIMEOUT_S));
            // Best effort: nothing connects to a stub that is left, and the next opening closes it.
            let _ = self.close_stub();
        }
    }
}
