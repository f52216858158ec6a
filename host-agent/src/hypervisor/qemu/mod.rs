//! QEMU, by its QMP monitor, its own or libvirt's: adapts the `qmp` crate to [`Hypervisor`].

mod error;
mod monitor;
mod vcpus;

pub use error::AttachError;

use self::error::reach;
use self::monitor::Monitor;
use self::vcpus::{QemuTakenOver, QemuVcpus};
use super::ram::{self, GuestRam, RamError, RamFile, RamRegion};
use super::{Accelerator, Activity, Hypervisor, Identity, ReachError, Route, TakenOver, Vcpus};
use guest_core::{PhysMemory, Registers};
use qmp::machine::RunState;
use qmp::{Backing, Machine, RamMap};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

/// A guest of QEMU.
pub struct Qemu {
    route: Route,
    identity: Identity,
    machine: RefCell<Machine>,
    memory: GuestRam,
}

impl Qemu {
    /// Connects to QEMU's monitor and finds the guest's RAM. The guest is not paused. How `route` has its vCPUs paused is not looked at: this
    /// pauses them through QEMU.
    ///
    /// # Errors
    ///
    /// QEMU or its memory can't be reached.
    pub fn open(route: &Route) -> Result<Self, ReachError> {
        Self::attach(route).map_err(reach)
    }

    /// True where neither an operator nor QEMU itself has stopped the guest.
    pub(super) fn is_running(&self) -> Result<bool, ReachError> {
        let state = self.machine.borrow().run_state();
        Ok(state.map_err(|error| reach(AttachError::from(error)))? == RunState::Running)
    }

    /// The threads that run its vCPUs, as QEMU says.
    pub(super) fn vcpu_threads(&self) -> Result<Vec<i64>, ReachError> {
        let threads = self.machine.borrow().vcpu_threads();
        threads.map_err(|error| reach(AttachError::from(error)))
    }

    /// The guest's RAM.
    pub(super) fn ram(&self) -> &GuestRam {
        &self.memory
    }

    fn attach(route: &Route) -> Result<Self, AttachError> {
        let monitor = match route {
            Route::Qmp { socket, .. } => Monitor::Socket(socket.clone()),
            Route::Libvirt { uuid, pid, .. } => Monitor::Libvirt { uuid: *uuid, pid: *pid },
            Route::Process { .. } => {
                let route = route.to_string();
                return Err(AttachError::NoMonitor { route });
            }
        };
        let mut machine = monitor.connect()?;
        if let Some(within) = route.reply_timeout() {
            machine.set_reply_timeout(within);
        }
        let pid = machine.pid().ok_or_else(|| AttachError::NoPeer {
            route: route.to_string(),
        })?;
        let memory = open_ram(&machine.ram_map(pid)?)?;
        let (name, is_tcg) = machine.name_and_is_tcg()?;
        let identity = Identity {
            pid,
            name,
            accelerator: match is_tcg {
                true => Accelerator::Tcg,
                false => Accelerator::Kvm,
            },
            version: Some(machine.version()),
        };
        Ok(Self {
            route: route.clone(),
            identity,
            machine: RefCell::new(machine),
            memory,
        })
    }
}

impl Hypervisor for Qemu {
    fn identity(&self) -> &Identity {
        &self.identity
    }

    fn route(&self) -> Route {
        self.route.clone()
    }

    fn memory(&self) -> &dyn PhysMemory {
        &self.memory
    }

    fn memory_without_rights(&self) -> io::Result<GuestRam> {
        self.memory.without_rights(self.identity.pid)
    }

    fn registers_running(&self) -> Result<Vec<Registers>, ReachError> {
        let registers = self.machine.borrow().cpu_states();
        registers.map_err(|error| reach(AttachError::from(error)))
    }

    fn activity(&self) -> Result<Activity, ReachError> {
        let busy = self.machine.borrow().busy_with();
        Ok(match busy.map_err(|error| reach(AttachError::from(error)))? {
            Some(busy) => Activity::Busy(busy.to_string()),
            None => Activity::Idle,
        })
    }

    fn vcpus(&self) -> Box<dyn Vcpus + '_> {
        Box::new(QemuVcpus::new(self.machine.borrow_mut()))
    }

    /// Closes the GDB stub that a killed vmpatch left open.
    fn remove_leftovers(&self) -> Result<(), ReachError> {
        let closed = self.machine.borrow_mut().close_left_stub();
        closed.map_err(|error| reach(AttachError::from(error)))
    }

    /// Closes the QMP connection: QEMU serves one client per socket.
    fn disconnect(&self) {
        self.machine.borrow_mut().disconnect();
    }

    fn take_over(&self) -> Result<Box<dyn TakenOver + '_>, ReachError> {
        let guest = QemuTakenOver::new(&self.machine).map_err(|error| reach(AttachError::from(error)))?;
        Ok(Box::new(guest))
    }
}

/// Opens guest RAM by the map that QEMU gave.
///
/// # Errors
///
/// The host forbids it.
pub fn open_ram(map: &RamMap) -> Result<GuestRam, RamError> {
    let mut files: BTreeMap<&str, Option<Arc<std::fs::File>>> = BTreeMap::new();
    let mut regions = Vec::new();
    for region in &map.regions {
        // A block of unknown pages may have holes.
        let file = match (&region.backing, region.page_size) {
            (Backing::Shared(shared), Some(page_size)) => {
                // None: it is a device, or belongs to another user.
                let opened = files
                    .entry(&region.block)
                    .or_insert_with(|| shared.open(map.pid).ok().map(Arc::new));
                opened.clone().map(|file| RamFile {
                    file,
                    offset: shared.offset,
                    page_size,
                })
            }
            _ => None,
        };
        regions.push(RamRegion {
            gpa: region.gpa,
            len: region.len,
            hva: region.hva,
            block: region.block.clone(),
            file,
        });
    }
    ram::open(map.pid, &regions)
}
