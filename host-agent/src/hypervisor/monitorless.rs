//! A guest under KVM that is reached without a monitor, whatever program runs it: adapts the `kvm` crate to [`Hypervisor`].
//!
//! The program is asked nothing. Its vCPUs' threads stop for a pause, and for an instant to read registers. Where the guest's RAM is, is told
//! by KVM's own memory slots, which are read in the host's kernel; in each pause they must still be the same.

use super::kvm::{PausedByThreads, ThreadVcpus};
use super::ram::{self, GuestRam, RamError, RamRegion};
use super::stops::StopsHeldBack;
use super::{
    Accelerator, Activity, Hypervisor, Identity, Meaning, PauseMethod, Prepared, ReachError, Route, TakenOver, Vcpus,
};
use crate::domains::process;
use ::process::Memory;
use guest_core::machine::{MachineError, Paused};
use guest_core::{Gpa, Hva, PhysMemory, Registers};
use kvm::{ArmError, Armed, FindError, PauseError, Slot, Slots, SlotsError, Vm};
use nix::errno::Errno;
use std::cell::{Cell, RefCell};
use std::time::{Duration, Instant};
use std::{fs, io};

/// How long the vCPUs' threads are looked for.
const FIND_TIME_MAX: Duration = Duration::from_secs(1);
/// How long it is tried to read registers: a vCPU's thread may be at what the guest asked of its program, for some hundred microseconds
/// each time.
const READ_TIME_MAX: Duration = Duration::from_secs(2);
/// Pause between two such tries, in which the guest runs.
const READ_WAIT: Duration = Duration::from_millis(2);
/// An address that is RAM in every PC: where the kernel's old place was. The slot that holds it tells what is done with all RAM.
const IN_RAM: u64 = 0x10_0000;

/// What the link of a descriptor of userfaultfd(2) leads to.
const USERFAULTFD: &str = "anon_inode:[userfaultfd]";

/// A guest under KVM without a monitor.
pub(super) struct Monitorless {
    route: Route,
    identity: Identity,
    memory: GuestRam,
    slots: RefCell<Slots>,
    /// RAM was not where it was when it was opened. It may come back.
    has_moved: Cell<bool>,
}

/// Why a guest is not reached without a monitor.
#[derive(Debug, thiserror::Error)]
pub(super) enum MonitorlessError {
    /// Another process may have its number.
    #[error("process {pid} has ended")]
    Ended { pid: i32 },
    /// There is nobody to ask.
    #[error("--pause qmp goes through QEMU's monitor, and a guest that is given by --pid is reached without one")]
    NoMonitor,
    /// Its vCPUs are not understood.
    #[error("finding the vCPUs' threads")]
    Find(#[from] FindError),
    /// KVM can't be told to store registers.
    #[error("having KVM store the vCPUs' registers")]
    Arm(#[from] ArmError),
    /// Where its RAM is can't be told.
    #[error("finding the guest's RAM by KVM's memory slots")]
    Slots(#[from] SlotsError),
    /// The host forbids reading it.
    #[error(transparent)]
    Ram(#[from] RamError),
    /// A confidential guest.
    #[error("process {pid} can't see the guest's memory at {gpa}: a confidential guest (guest_memfd)")]
    Hidden { pid: i32, gpa: Gpa },
    /// No slot can be read.
    #[error("process {pid} has no RAM of a guest that can be read")]
    NoRam { pid: i32 },
    /// RAM has come, gone or moved.
    #[error("the guest's RAM is not where it was when vmpatch began; run it again")]
    OtherRam,
    /// Who reads or writes a page that is not there waits for the program, without end.
    #[error("process {pid} fills in the guest's memory itself (userfaultfd: a restore or a migration on demand)")]
    HandlesFaults { pid: i32 },
    /// The process's descriptors can't be read.
    #[error("reading the descriptors of process {pid}")]
    Descriptors { pid: i32, source: io::Error },
    /// The threads could not be stopped.
    #[error("stopping the vCPUs' threads for their registers")]
    Pause(#[from] PauseError),
}

impl Monitorless {
    /// Finds the vCPUs and the RAM of the guest that a process runs. Stops nothing.
    pub(super) fn open(route: &Route, pid: i32, start_time: u64, pause: PauseMethod) -> Result<Self, ReachError> {
        Self::find(route, pid, start_time, pause).map_err(mean)
    }

    fn find(route: &Route, pid: i32, start_time: u64, pause: PauseMethod) -> Result<Self, MonitorlessError> {
        if pause == PauseMethod::Qmp {
            return Err(MonitorlessError::NoMonitor);
        }
        if !process::is_running(pid, start_time) {
            return Err(MonitorlessError::Ended { pid });
        }
        Vm::count_vcpus(pid)?;
        if handles_faults(pid)? {
            return Err(MonitorlessError::HandlesFaults { pid });
        }
        let slots = Slots::of(pid)?;
        let memory = ram::open(pid, &regions(pid, slots.list())?)?;
        // Its number was not given to another process meanwhile.
        if !process::is_running(pid, start_time) {
            return Err(MonitorlessError::Ended { pid });
        }
        for slot in slots.list() {
            tracing::debug!("memory slot {:#x}, {} KiB", slot.gpa, slot.len >> 10);
        }
        Ok(Self {
            route: route.clone(),
            identity: Identity {
                pid,
                name: None,
                accelerator: Accelerator::Kvm,
                version: None,
            },
            memory,
            slots: RefCell::new(slots),
            has_moved: Cell::new(false),
        })
    }

    fn vm(&self) -> Result<Vm, FindError> {
        Vm::find(self.identity.pid, FIND_TIME_MAX)
    }

    fn by_threads(&self) -> Result<ThreadVcpus<'_>, MonitorlessError> {
        Ok(ThreadVcpus::new(self, Armed::arm(self.vm()?)?))
    }

    /// Makes sure of the slots where they have changed: a device's memory may have been mapped elsewhere.
    fn check_slots(&self) -> Result<(), MonitorlessError> {
        let mut slots = self.slots.borrow_mut();
        if !self.has_moved.get() && slots.are_current()? {
            return Ok(());
        }
        self.has_moved.set(true);
        let now = regions(self.identity.pid, slots.read_again()?)?;
        let places = |regions: &[RamRegion]| {
            regions
                .iter()
                .map(|region| (region.gpa, region.len, region.hva))
                .collect()
        };
        let (now, then): (Vec<_>, Vec<_>) = (places(&now), places(&self.memory.found()));
        if now != then {
            return Err(MonitorlessError::OtherRam);
        }
        self.has_moved.set(false);
        Ok(())
    }

    fn read_registers(&self) -> Result<Vec<Registers>, MonitorlessError> {
        let vcpus = self.by_threads()?;
        let began = Instant::now();
        let _stops = StopsHeldBack::begin();
        let paused = vcpus.stop(|error, _| {
            let passes = matches!(error, PauseError::Outside { .. } | PauseError::Stale { .. });
            (passes && began.elapsed() < READ_TIME_MAX).then_some(READ_WAIT)
        })?;
        Ok(paused.registers().to_vec())
    }
}

/// Whether a process has a descriptor by which it handles page faults of its own memory.
fn handles_faults(pid: i32) -> Result<bool, MonitorlessError> {
    let failed = |source| MonitorlessError::Descriptors { pid, source };
    for descriptor in fs::read_dir(format!("/proc/{pid}/fd")).map_err(failed)? {
        // One that was closed meanwhile leads nowhere.
        let link = fs::read_link(descriptor.map_err(failed)?.path());
        if link.is_ok_and(|link| link.as_os_str() == USERFAULTFD) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// The slots that hold what the guest can write and this process can read. A device's memory can't be read so, nor can a slot of which the
/// process itself has nothing yet.
fn regions(pid: i32, slots: &[Slot]) -> Result<Vec<RamRegion>, MonitorlessError> {
    let memory = Memory::of(pid);
    let mut regions = Vec::new();
    for slot in slots {
        let gpa = Gpa(slot.gpa);
        if slot.is_hidden() {
            return Err(MonitorlessError::Hidden { pid, gpa });
        }
        let is_readable = || !matches!(memory.read(slot.hva, &mut [0]), Err(Errno::EFAULT));
        if !slot.is_read_only() && is_readable() {
            regions.push(RamRegion {
                gpa,
                len: slot.len,
                hva: Hva(slot.hva),
                block: format!("{gpa}"),
                file: None,
            });
        }
    }
    if regions.is_empty() {
        return Err(MonitorlessError::NoRam { pid });
    }
    Ok(regions)
}

impl PausedByThreads for Monitorless {
    fn ram(&self) -> &GuestRam {
        &self.memory
    }

    fn activity(&self) -> Result<Activity, ReachError> {
        Hypervisor::activity(self)
    }

    fn is_ram_in_place(&self) -> Result<bool, ReachError> {
        let are_current = self.slots.borrow().are_current();
        let are_current = are_current.map_err(|error| mean(error.into()))?;
        Ok(are_current && !self.has_moved.get())
    }
}

impl Hypervisor for Monitorless {
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

    /// Stops the vCPUs for an instant: KVM stores registers when a vCPU leaves it.
    fn registers_running(&self) -> Result<Vec<Registers>, ReachError> {
        self.read_registers().map_err(mean)
    }

    /// KVM logs what the guest writes while it is migrated, or saved bit by bit. What only reads the guest's memory does not show.
    fn activity(&self) -> Result<Activity, ReachError> {
        if handles_faults(self.identity.pid).map_err(mean)? {
            return Ok(Activity::Busy(
                "a restore or a migration on demand (userfaultfd)".to_owned(),
            ));
        }
        let slot = self.slots.borrow().now_at(IN_RAM).map_err(|error| mean(error.into()))?;
        Ok(match slot {
            None => Activity::Busy("its memory: no slot of KVM holds what is RAM in every PC".to_owned()),
            Some(slot) if slot.is_logged() => Activity::Busy(
                "a migration or a snapshot: KVM logs which pages the guest writes, and a write from outside is in no such log"
                    .to_owned(),
            ),
            Some(_) => Activity::Unknown,
        })
    }

    fn vcpus(&self) -> Box<dyn Vcpus + '_> {
        Box::new(MonitorlessVcpus {
            guest: self,
            ready: None,
        })
    }

    /// What a killed vmpatch has left in KVM.
    fn remove_leftovers(&self) -> Result<(), ReachError> {
        match self.vm() {
            Ok(vm) => Armed::disarm_left(&vm).map_err(|error| mean(error.into())),
            // Where vCPUs are not understood, none was armed; where they come and go, it costs the guest a little time and no more.
            Err(_) => Ok(()),
        }
    }

    /// Nothing is held.
    fn disconnect(&self) {}

    /// The threads of a killed vmpatch's pause run: the kernel has seen to that.
    fn take_over(&self) -> Result<Box<dyn TakenOver + '_>, ReachError> {
        Ok(Box::new(self.by_threads().map_err(mean)?))
    }
}

/// The vCPUs, paused by their threads.
struct MonitorlessVcpus<'a> {
    guest: &'a Monitorless,
    ready: Option<ThreadVcpus<'a>>,
}

impl MonitorlessVcpus<'_> {
    fn make_ready(&mut self) -> Result<&ThreadVcpus<'_>, MonitorlessError> {
        self.guest.check_slots()?;
        // Whatever is armed is disarmed first.
        if self.ready.as_ref().is_some_and(|vcpus| !vcpus.are_current()) {
            self.ready = None;
        }
        if self.ready.is_none() {
            self.ready = Some(self.guest.by_threads()?);
        }
        self.ready.as_ref().ok_or(MonitorlessError::Ended {
            pid: self.guest.identity.pid,
        })
    }
}

impl Vcpus for MonitorlessVcpus<'_> {
    fn prepare(&mut self) -> Result<Prepared, MachineError> {
        let vcpus = self.make_ready();
        let prepared = vcpus.map(ThreadVcpus::prepared);
        prepared.map_err(|error| MachineError::new("preparing the pause", mean(error)))
    }

    fn pause(&mut self) -> Result<Box<dyn Paused + '_>, MachineError> {
        if self.ready.is_none() {
            self.prepare()?;
        }
        match &self.ready {
            Some(vcpus) => Ok(Box::new(vcpus.pause()?)),
            None => Err(MachineError::new("pausing the guest", "it was not prepared")),
        }
    }
}

/// What an error means to its caller.
fn mean(error: MonitorlessError) -> ReachError {
    use MonitorlessError::*;
    let meaning = match &error {
        Ended { .. } => Meaning::Gone,
        NoMonitor | Hidden { .. } | NoRam { .. } | Slots(_) => Meaning::Permanent,
        Find(FindError::NoVm { .. } | FindError::NoVcpus { .. } | FindError::SeveralVms { .. }) => Meaning::Permanent,
        Arm(ArmError::InUse { .. }) => Meaning::Permanent,
        Ram(RamError::Process { pid, .. }) => Meaning::Forbidden { memory_of: Some(*pid) },
        Descriptors { .. } => Meaning::Gone,
        Find(_) | Arm(_) | OtherRam | HandlesFaults { .. } | Pause(_) => Meaning::MayPass,
    };
    ReachError::new(meaning, error)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// userfaultfd(2) gives a descriptor, whatever it is registered for.
    #[test]
    fn a_process_without_a_descriptor_of_userfaultfd_handles_no_faults() {
        assert!(!handles_faults(std::process::id().cast_signed()).unwrap());
        assert!(matches!(handles_faults(-1), Err(MonitorlessError::Descriptors { .. })));
    }

    #[test]
    fn what_can_not_be_reached_without_a_monitor_is_refused_by_name() {
        let pid = std::process::id().cast_signed();
        let start_time = process::start_time(pid).unwrap();
        let opened = |start_time, pause| {
            let route = Route::process(pid, start_time).paused_by(pause);
            let error = route.open().err().unwrap();
            (error.meaning(), crate::chain::chain(&error).join(": "))
        };
        let (meaning, text) = opened(start_time, PauseMethod::Auto);
        assert_eq!(meaning, Meaning::Permanent);
        assert_eq!(
            text,
            format!("finding the vCPUs' threads: process {pid} has no VM of KVM")
        );
        let (meaning, text) = opened(start_time - 1, PauseMethod::Ptrace);
        assert_eq!((meaning, text), (Meaning::Gone, format!("process {pid} has ended")));
        let (meaning, text) = opened(start_time, PauseMethod::Qmp);
        assert!(
            meaning == Meaning::Permanent && text.starts_with("--pause qmp goes through"),
            "{text}"
        );
    }
}
