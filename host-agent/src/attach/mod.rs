//! Reaching a guest: QEMU over QMP, its memory, its vCPUs.

pub mod machine;
pub mod memory;
mod permanent;

pub use machine::GuardedMachine;
pub use permanent::is_permanent;

use crate::lock::DomainLock;
use crate::supervisor::Supervisor;
use guest_core::machine::{MachineError, Paused};
use guest_core::{PhysMemory, Registers};
use machine::TakenOver;
use memory::RamError;
use qmp::machine::{Busy, QueryError};
use qmp::memory::RamMapError;
use qmp::{CommandError, CpuState, Machine};
use std::cell::RefCell;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How long QEMU has to greet: it does so at once, unless another client holds the socket.
const CONNECT_TIME_MAX: Duration = Duration::from_secs(3);

/// Why a guest can't be reached.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// No QMP connection.
    #[error("connecting to {socket}")]
    Connect {
        /// The QMP socket.
        socket: PathBuf,
        /// Why.
        source: qmp::machine::AttachError,
    },
    /// The socket does not say whose it is.
    #[error("{socket} does not tell which process is at its other end")]
    NoPeer {
        /// The QMP socket.
        socket: PathBuf,
    },
    /// QEMU did not answer a question.
    #[error("asking QEMU")]
    Query(#[from] QueryError),
    /// QEMU did not answer a question.
    #[error("asking QEMU")]
    Command(#[from] CommandError),
    /// Where the RAM is, is not known.
    #[error("finding the guest's RAM")]
    RamMap(#[from] RamMapError),
    /// The RAM can't be reached.
    #[error("reaching the guest's RAM")]
    Ram(#[from] RamError),
    /// The vCPUs can't be stopped or resumed.
    #[error(transparent)]
    Machine(#[from] MachineError),
}

/// A guest that has been reached.
pub struct Attached {
    socket: PathBuf,
    pid: i32,
    name: Option<String>,
    is_tcg: bool,
    qmp: RefCell<Machine>,
    memory: Box<dyn PhysMemory>,
}

impl Attached {
    /// Connects to the QMP socket and finds the guest's RAM. The guest is not paused.
    pub fn open(socket: &Path) -> Result<Self, AttachError> {
        let socket = socket.to_owned();
        let qmp = Machine::attach(&socket, CONNECT_TIME_MAX).map_err(|source| AttachError::Connect {
            socket: socket.clone(),
            source,
        })?;
        let pid = qmp
            .pid()
            .ok_or_else(|| AttachError::NoPeer { socket: socket.clone() })?;
        let memory = memory::open(&qmp.ram_map(pid)?)?;
        let (name, is_tcg) = (qmp.name()?, qmp.is_tcg()?);
        Ok(Self {
            socket,
            pid,
            name,
            is_tcg,
            qmp: RefCell::new(qmp),
            memory,
        })
    }

    /// The QEMU process.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// The guest's name, as QEMU was given it.
    pub fn name(&self) -> Option<String> {
        self.name.clone()
    }

    /// The guest's RAM.
    pub fn memory(&self) -> &dyn PhysMemory {
        self.memory.as_ref()
    }

    /// `tcg`, where QEMU translates the guest's code, or `kvm`.
    pub fn accelerator(&self) -> &'static str {
        if self.is_tcg { "tcg" } else { "kvm" }
    }

    /// QEMU's version: major, minor, micro.
    pub fn version(&self) -> (u64, u64, u64) {
        self.qmp.borrow().version()
    }

    /// QEMU's version, as people write it.
    pub fn qemu_version(&self) -> String {
        let (major, minor, micro) = self.version();
        format!("{major}.{minor}.{micro}")
    }

    /// What QEMU is doing that a patch would not survive.
    pub fn busy_with(&self) -> Result<Option<Busy>, AttachError> {
        Ok(self.qmp.borrow().busy_with()?)
    }

    /// Closes what a vmpatch that was killed has left open in QEMU.
    pub fn close_left_stub(&self) -> Result<(), AttachError> {
        Ok(self.qmp.borrow_mut().close_left_stub()?)
    }

    /// Registers of all vCPUs while they run: what changes at every moment may be torn, what does not change after
    /// boot is right.
    pub fn registers_running(&self) -> Result<Vec<Registers>, AttachError> {
        Ok(self.qmp.borrow().cpu_states()?.iter().map(registers).collect())
    }

    /// The guest as the core changes it, with a supervisor, from that program, beside it for as long as this lives.
    pub fn machine(&self, supervisor: &Path, lock: &DomainLock) -> std::io::Result<GuardedMachine<'_>> {
        Ok(GuardedMachine::new(
            self.qmp.borrow_mut(),
            Supervisor::start(supervisor, &self.socket, lock)?,
        ))
    }

    /// Leaves QEMU's socket to another process. Nothing can be asked of QEMU any more.
    pub fn disconnect(&self) {
        self.qmp.borrow_mut().disconnect();
    }

    /// Stops the vCPUs in place of a vmpatch that died; resumed, they run if they were `running` before it came.
    pub fn take_over(&self, running: bool) -> Result<Box<dyn Paused + '_>, AttachError> {
        Ok(Box::new(TakenOver::new(&self.qmp, running)?))
    }
}

/// QEMU's word on a vCPU, as the core wants it. Where the source does not tell a register it is 0, which the core finds
/// no kernel with.
fn registers(cpu: &CpuState) -> Registers {
    Registers {
        general: cpu.general,
        rip: cpu.rip,
        rflags: cpu.rflags,
        cs: cpu.cs,
        cr0: cpu.cr0,
        cr3: cpu.cr3,
        cr4: cpu.cr4,
        efer: cpu.efer,
        gs_base: cpu.gs_base,
        kernel_gs_base: cpu.kernel_gs_base.unwrap_or(0),
        idt_base: cpu.idt_base.unwrap_or(0),
    }
}
