//! A running QEMU as vmpatch needs it, blocking.

mod busy;
mod pause;
mod recover;
mod run_state;
mod stub;

pub use busy::Busy;
pub use pause::{PauseError, PauseTimes, Paused};
pub use recover::{RecoverError, recover};
pub use run_state::RunState;
pub use stub::StubOpenError;

use crate::client::{Client, CommandError, ConnectError};
use crate::cpu::{CpuState, info_registers};
use crate::gdb::Layout;
use crate::memory::mtree::{self, RamRange};
use crate::memory::{RamMap, RamMapError};
use crate::text::TextError;
use serde::Deserialize;
use serde_json::json;
use std::io;
use std::path::Path;
use std::time::Duration;
use stub::ListeningStub;
use tokio::runtime::{Builder, Runtime};

/// How long the answers to what is sent at once within a pause may take, in seconds, unless the caller says otherwise: stopping
/// drains the guest's disks, which a slow one can hold up for seconds.
const REPLY_TIMEOUT_S: u64 = 10;

/// How long closing the stub may take when the machine is dropped, in seconds: nobody waits for the result, and QEMU
/// carries the command out when it can.
const CLOSE_TIMEOUT_S: u64 = 2;

/// Why a QEMU could not be attached to.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// No QMP connection.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// The host gave no event loop.
    #[error("cannot set up an event loop")]
    EventLoop(#[source] io::Error),
}

/// A question to QEMU that was not answered, or not understood.
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
}

/// A QEMU, attached to through its QMP socket.
///
/// Every method blocks; it owns the event loop that drives its [`Client`], so it must not be used from inside another
/// one. Dropping it closes the GDB stub, if it was opened.
#[derive(Debug)]
pub struct Machine {
    // Declared before the runtime that its task lives on.
    client: Client,
    runtime: Runtime,
    stub: Option<ListeningStub>,
    layout: Option<Layout>,
    ram: Option<Vec<RamRange>>,
    reply_timeout: Duration,
}

impl Machine {
    /// Connects to the QMP socket at `path` within `within`.
    pub fn attach(path: &Path, within: Duration) -> Result<Self, AttachError> {
        let runtime = Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(AttachError::EventLoop)?;
        let client = runtime.block_on(Client::connect(path, within))?;
        let reply_timeout = Duration::from_secs(REPLY_TIMEOUT_S);
        Ok(Self {
            client,
            runtime,
            stub: None,
            layout: None,
            ram: None,
            reply_timeout,
        })
    }

    /// The QMP connection, for commands that have no method here; run them with [`Machine::block_on`].
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

    /// The guest's name (`-name`), where it has one.
    pub fn name(&self) -> Result<Option<String>, CommandError> {
        Ok(self.block_on(self.client.execute(qapi::qmp::query_name {}))?.name)
    }

    /// True where QEMU translates the guest's code instead of running it by KVM. Translated code does not notice writes
    /// to guest memory from outside; only those through QEMU ([`Paused::write`]).
    pub fn is_tcg(&self) -> Result<bool, CommandError> {
        Ok(!self.block_on(self.client.execute(qapi::qmp::query_kvm {}))?.enabled)
    }

    /// Whether the guest runs.
    pub fn run_state(&self) -> Result<RunState, CommandError> {
        self.block_on(RunState::query(&self.client))
    }

    /// What QEMU does with the guest's memory that forbids patching; `None`: nothing.
    pub fn busy_with(&self) -> Result<Option<Busy>, CommandError> {
        self.block_on(Busy::query(&self.client))
    }

    /// Where the guest's RAM is, in process `pid` (see [`Machine::pid`]). Does not pause the guest.
    pub fn ram_map(&self, pid: i32) -> Result<RamMap, RamMapError> {
        self.block_on(RamMap::read(&self.client, pid))
    }

    /// Registers of all vCPUs while they run, to find things by: see [`info_registers`]. Does not pause the guest.
    pub fn cpu_states(&self) -> Result<Vec<CpuState>, QueryError> {
        let text = self.block_on(self.client.hmp("info registers -a"))?;
        Ok(info_registers::parse(&text)?)
    }

    /// Bounds the time that the answers to what is sent at once within a pause may take. Past it the pause is given up and the guest
    /// resumed.
    pub fn set_reply_timeout(&mut self, within: Duration) {
        self.reply_timeout = within;
    }

    /// Opens the GDB stub and reads what a pause needs, so that the pause is short. [`Machine::pause`] does it where it
    /// was not done. Does not pause the guest.
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

    /// Thread numbers of the vCPUs in the stub: index plus one.
    fn threads(&self) -> Result<Vec<u64>, CommandError> {
        let vcpus: Vec<Vcpu> = self.block_on(self.client.execute_as("query-cpus-fast", json!({})))?;
        Ok(vcpus.iter().map(|vcpu| vcpu.index.saturating_add(1)).collect())
    }

    /// Closes a GDB stub that a killed process has left; [`Machine::pause`] does so, too. Does not touch one that this process
    /// uses, nor an operator's.
    pub fn close_left_stub(&mut self) -> Result<(), CommandError> {
        if self.stub.is_some() { Ok(()) } else { self.close_stub() }
    }

    /// Closes the QMP connection, so that another process can use its socket; what this one still has sent to QEMU may come into
    /// effect. Every later command fails. The stub, where it is open, is left to whoever comes next, as by a process that was killed.
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
            // Best effort: a stub left over listens for nobody, and the next opening closes it.
            let _ = self.close_stub();
        }
    }
}
