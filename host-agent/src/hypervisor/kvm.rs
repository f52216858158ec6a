//! A guest of QEMU under KVM, whose vCPUs are paused without QEMU: adapts the `kvm` crate to [`Hypervisor`].
//!
//! QEMU's `stop` writes the guest's disks out within the pause. Here only the vCPUs' threads stop, and QEMU is asked nothing until they run
//! again. Where the guest's RAM is, and what QEMU does with it, is still told by its monitor.

use super::qemu::Qemu;
use super::ram::GuestRam;
use super::{
    Activity, Hypervisor, Identity, Meaning, PauseMethod, Prepared, ReachError, Route, TakenOver, VcpuThreads, Vcpus,
};
use crate::chain::chain;
use guest_core::machine::{MachineError, PauseTimes, Paused, WriteCode};
use guest_core::{Gpa, PhysMemory, Registers};
use kvm::{ArmError, Armed, FindError, PauseError, Vm};
use process::StopError;
use std::io;
use std::time::{Duration, Instant};

/// How long the vCPUs' threads are looked for: those of a busy guest are seen at once, and so are those of an idle one, but not those
/// that go from one to the other and have run for less than a tick of the host's clock.
const FIND_TIME_MAX: Duration = Duration::from_secs(1);
/// How long all vCPUs may take to stop: far longer than a host needs that has a processor for each, and not so long that the guest's users
/// notice that some of them were stopped for it.
const STOP_TIME_MAX: Duration = Duration::from_millis(100);
/// Tries of one pause: a vCPU's thread may just be at what the guest asked of QEMU.
const TRIES: u32 = 8;
/// Time between two of them.
const TRY_WAIT: Duration = Duration::from_micros(500);
/// How long a pause is tried that recovers a guest.
const RECOVER_TIME_MAX: Duration = Duration::from_secs(10);
/// Time between two of its tries where some threads had stopped in vain, or something else was wrong.
const RECOVER_WAIT: Duration = Duration::from_millis(100);

/// A guest of QEMU under KVM.
pub(super) struct KvmGuest {
    qemu: Qemu,
    method: PauseMethod,
}

/// Why the guest's vCPUs can't be paused by their threads.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    /// They are not understood.
    #[error("finding the vCPUs' threads (--pause qmp pauses through QEMU)")]
    Find(#[from] FindError),
    /// QEMU says that other threads run its vCPUs.
    #[error(
        "QEMU says that threads {told:?} run its vCPUs, and threads {found:?} were seen to (--pause qmp pauses through QEMU)"
    )]
    OtherThreads {
        /// By QEMU.
        told: Vec<i64>,
        /// By what the host says of them.
        found: Vec<i64>,
    },
    /// QEMU does not tell which threads run its vCPUs.
    #[error("asking QEMU which threads run its vCPUs")]
    Ask(#[source] ReachError),
    /// KVM can't be told to store registers.
    #[error("having KVM store the vCPUs' registers (--pause qmp pauses through QEMU)")]
    Arm(#[from] ArmError),
    /// They were not paused.
    #[error("stopping the vCPUs' threads")]
    Pause(#[from] PauseError),
    /// A thread was killed while it was stopped.
    #[error("letting the vCPUs' threads go on")]
    Resume(#[source] StopError),
    /// QEMU works on the guest's memory.
    #[error("{0}")]
    Busy(String),
}

impl KvmGuest {
    pub(super) fn new(qemu: Qemu, method: PauseMethod) -> Self {
        Self { qemu, method }
    }

    fn find(&self) -> Result<Vm, FindError> {
        Vm::find(self.identity().pid, FIND_TIME_MAX)
    }

    fn by_threads(&self) -> Result<ThreadVcpus<'_>, KvmError> {
        let vm = self.find()?;
        let mut told = self.qemu.vcpu_threads().map_err(KvmError::Ask)?;
        let found = vm.threads().iter().map(|thread| thread.own_number().map(i64::from));
        let mut found = found.collect::<Result<Vec<_>, _>>().map_err(FindError::from)?;
        told.sort_unstable();
        found.sort_unstable();
        if told != found {
            return Err(KvmError::OtherThreads { told, found });
        }
        Ok(ThreadVcpus::new(self, Armed::arm(vm)?))
    }
}

/// What a pause by the vCPUs' threads needs of a guest.
pub(super) trait PausedByThreads {
    /// Its RAM.
    fn ram(&self) -> &GuestRam;

    /// What is done with its memory now: not in a pause.
    fn activity(&self) -> Result<Activity, ReachError>;

    /// False where the RAM may be elsewhere by now. Asked in each pause, so that it takes no time.
    fn is_ram_in_place(&self) -> Result<bool, ReachError>;
}

impl PausedByThreads for KvmGuest {
    fn ram(&self) -> &GuestRam {
        self.qemu.ram()
    }

    fn activity(&self) -> Result<Activity, ReachError> {
        self.qemu.activity()
    }

    /// QEMU has told where it is, and is not asked in a pause.
    fn is_ram_in_place(&self) -> Result<bool, ReachError> {
        Ok(true)
    }
}

impl Hypervisor for KvmGuest {
    fn identity(&self) -> &Identity {
        self.qemu.identity()
    }

    fn route(&self) -> Route {
        self.qemu.route()
    }

    fn memory(&self) -> &dyn PhysMemory {
        self.qemu.memory()
    }

    fn memory_without_rights(&self) -> io::Result<GuestRam> {
        self.qemu.memory_without_rights()
    }

    fn registers_running(&self) -> Result<Vec<Registers>, ReachError> {
        self.qemu.registers_running()
    }

    fn activity(&self) -> Result<Activity, ReachError> {
        self.qemu.activity()
    }

    fn vcpus(&self) -> Box<dyn Vcpus + '_> {
        Box::new(KvmVcpus {
            guest: self,
            ready: Ready::No,
        })
    }

    /// What a killed vmpatch has left in QEMU and in KVM.
    fn remove_leftovers(&self) -> Result<(), ReachError> {
        self.qemu.remove_leftovers()?;
        match self.find() {
            Ok(vm) => Armed::disarm_left(&vm).map_err(|error| reach(error.into())),
            // Where vCPUs are not understood, none was armed; where they come and go, it costs the guest a little time and no more.
            Err(_) => Ok(()),
        }
    }

    fn disconnect(&self) {
        self.qemu.disconnect();
    }

    /// The threads of a killed vmpatch's pause run: the kernel has seen to that. Where it paused through QEMU, they may not.
    fn take_over(&self) -> Result<Box<dyn TakenOver + '_>, ReachError> {
        if self.qemu.is_running()?
            && let Ok(vcpus) = self.by_threads()
        {
            return Ok(Box::new(vcpus));
        }
        self.qemu.take_over()
    }
}

/// The vCPUs, paused by the method that [`Vcpus::prepare`] chooses.
struct KvmVcpus<'a> {
    guest: &'a KvmGuest,
    ready: Ready<'a>,
}

enum Ready<'a> {
    No,
    Threads(ThreadVcpus<'a>),
    /// Through QEMU.
    Qemu(Box<dyn Vcpus + 'a>),
}

impl Vcpus for KvmVcpus<'_> {
    /// A guest that its operator has paused stays so: that is QEMU's to see to.
    fn prepare(&mut self) -> Result<Prepared, MachineError> {
        // They have the connection to QEMU to themselves.
        if let Ready::Qemu(vcpus) = &mut self.ready {
            return vcpus.prepare();
        }
        let running = self
            .guest
            .qemu
            .is_running()
            .map_err(at("asking whether the guest runs"))?;
        if let Ready::Threads(vcpus) = &self.ready
            && running
            && vcpus.are_current()
        {
            return Ok(vcpus.prepared());
        }
        // Whatever is armed is disarmed first.
        self.ready = Ready::No;
        if running {
            match (self.guest.by_threads(), self.guest.method) {
                (Ok(vcpus), _) => {
                    let prepared = vcpus.prepared();
                    self.ready = Ready::Threads(vcpus);
                    return Ok(prepared);
                }
                (Err(error), PauseMethod::Ptrace) => return Err(failed("preparing the pause", error)),
                (Err(error), _) => tracing::warn!(
                    "the guest is paused through QEMU, which takes longer: {}",
                    chain(&error).join(": ")
                ),
            }
        }
        let mut vcpus = self.guest.qemu.vcpus();
        let prepared = vcpus.prepare()?;
        self.ready = Ready::Qemu(vcpus);
        Ok(prepared)
    }

    fn pause(&mut self) -> Result<Box<dyn Paused + '_>, MachineError> {
        if matches!(self.ready, Ready::No) {
            self.prepare()?;
        }
        match &mut self.ready {
            Ready::Threads(vcpus) => Ok(Box::new(vcpus.pause()?)),
            Ready::Qemu(vcpus) => vcpus.pause(),
            Ready::No => Err(MachineError::new("pausing the guest", "it was not prepared")),
        }
    }
}

/// What the process is doing where vCPUs or RAM are not those that were found.
const PLUGGING: &str = "plugging vCPUs or memory in or out";

/// The vCPUs are not those that were found.
#[derive(Debug, thiserror::Error)]
#[error("vCPUs have come or gone")]
struct VcpusChanged;

/// RAM that is elsewhere now.
#[derive(Debug, thiserror::Error)]
#[error("KVM's memory slots have changed")]
struct SlotsChanged;

/// The vCPUs, paused by their threads.
pub(super) struct ThreadVcpus<'a> {
    guest: &'a dyn PausedByThreads,
    armed: Armed,
}

impl<'a> ThreadVcpus<'a> {
    pub(super) fn new(guest: &'a dyn PausedByThreads, armed: Armed) -> Self {
        Self { guest, armed }
    }

    /// True where the process has the same vCPUs as when they were found.
    pub(super) fn are_current(&self) -> bool {
        self.armed.vm().is_current()
    }

    pub(super) fn prepared(&self) -> Prepared {
        Prepared {
            running: true,
            threads: Some(VcpuThreads::new(self.armed.vm().clone(), self.guest.ram())),
        }
    }

    /// Pauses the guest. Tries some times where a thread is at something that passes.
    pub(super) fn pause(&self) -> Result<PausedThreads<'_>, MachineError> {
        if !self.are_current() {
            // vCPUs have come or gone, and the supervisor has been told of others.
            return Err(MachineError::new("pausing the guest", VcpusChanged).transient(Some(PLUGGING)));
        }
        if let Activity::Busy(what) = self.guest.activity().map_err(at("pausing the guest"))? {
            return Err(failed("pausing the guest", KvmError::Busy(what)));
        }
        self.pause_even_if_busy(wait_after)
    }

    /// `wait` says how long to wait after an error, given the number of tries, or that it is not tried again.
    fn pause_even_if_busy(
        &self,
        wait: impl Fn(&PauseError, u32) -> Option<Duration>,
    ) -> Result<PausedThreads<'_>, MachineError> {
        let paused = self.stop(wait).map_err(|error| {
            let transient = error.transient();
            failed("pausing the guest", error.into()).transient(transient)
        })?;
        // Dropped by an error, it runs.
        if !self.guest.is_ram_in_place().map_err(at("pausing the guest"))? {
            return Err(MachineError::new("pausing the guest", SlotsChanged).transient(Some(PLUGGING)));
        }
        let ram = self.guest.ram();
        Ok(PausedThreads { paused, ram })
    }

    /// Stops the threads and reads the registers. `wait` as above.
    pub(super) fn stop(&self, wait: impl Fn(&PauseError, u32) -> Option<Duration>) -> Result<kvm::Paused, PauseError> {
        let mut tries = 0;
        loop {
            tries += 1;
            match self.armed.pause(STOP_TIME_MAX) {
                Ok(paused) => return Ok(paused),
                Err(error) => match wait(&error, tries) {
                    Some(wait) => std::thread::sleep(wait),
                    None => return Err(error),
                },
            }
        }
    }
}

/// Not again after a thread that did not stop in time: some of the others had stopped for all of that time, and each further try would stop
/// them again. The engine, which paces such tries, makes the next one.
fn wait_after(error: &PauseError, tries: u32) -> Option<Duration> {
    let is_late = matches!(error, PauseError::Stop(StopError::Late { .. }));
    (error.transient().is_some() && !is_late && tries < TRIES).then_some(TRY_WAIT)
}

/// After any error, for as long as `left`: this guest is half patched. What the killed vmpatch traced may still be traced, as the kernel
/// closes a process's sockets before it lets go of what it traces (`do_exit()`, kernel/exit.c, Linux 6.12).
fn wait_to_recover(error: &PauseError, left: Duration) -> Option<Duration> {
    let passes_soon = matches!(error, PauseError::Outside { .. } | PauseError::Stale { .. });
    let wait = if passes_soon { TRY_WAIT } else { RECOVER_WAIT };
    (!left.is_zero()).then_some(wait.min(left))
}

impl WriteCode for ThreadVcpus<'_> {
    fn write(&mut self, writes: &[(Gpa, Vec<u8>)]) -> Result<(), MachineError> {
        if writes.is_empty() {
            return Ok(());
        }
        // Half a patch in the guest is worse than one in a snapshot.
        let began = Instant::now();
        let wait = |error: &PauseError, _| wait_to_recover(error, RECOVER_TIME_MAX.saturating_sub(began.elapsed()));
        let mut paused = self.pause_even_if_busy(wait)?;
        paused.write(writes)?;
        Box::new(paused).resume().map(drop)
    }

    /// A write is done when its system call returns.
    fn drain(&mut self) -> Result<(), MachineError> {
        Ok(())
    }
}

impl TakenOver for ThreadVcpus<'_> {
    /// The kernel lets its threads go on when their tracer dies.
    fn has_run(&self) -> bool {
        true
    }

    /// It runs.
    fn resume(self: Box<Self>) -> Result<(), MachineError> {
        Ok(())
    }
}

/// A guest whose vCPU threads are stopped.
pub(super) struct PausedThreads<'a> {
    paused: kvm::Paused,
    ram: &'a GuestRam,
}

impl WriteCode for PausedThreads<'_> {
    /// KVM runs the guest's code where it is, so that a write to its RAM is all. One system call makes all of it, also where the RAM is
    /// mapped here: the guest runs at once should this process be killed, and then no jump may be there in part.
    fn write(&mut self, writes: &[(Gpa, Vec<u8>)]) -> Result<(), MachineError> {
        let written = self.ram.write_through_process(writes);
        written.map_err(|error| MachineError::new("writing the guest's RAM", error))
    }

    fn drain(&mut self) -> Result<(), MachineError> {
        Ok(())
    }
}

impl Paused for PausedThreads<'_> {
    fn registers(&mut self) -> Result<Vec<Registers>, MachineError> {
        Ok(self.paused.registers().to_vec())
    }

    fn elapsed(&self) -> Duration {
        self.paused.elapsed()
    }

    fn resume(self: Box<Self>) -> Result<PauseTimes, MachineError> {
        let began = Instant::now() - self.paused.elapsed();
        let (stop, registers) = self.paused.times();
        let resuming = Instant::now();
        let resumed = self.paused.resume();
        let (resume, total) = (resuming.elapsed(), began.elapsed());
        // Only a process that is being killed does not let its threads go on.
        resumed.map_err(|error| failed("resuming the guest", KvmError::Resume(error)))?;
        Ok(PauseTimes {
            stop_us: us(stop),
            registers_us: us(registers.saturating_sub(stop)),
            resume_us: us(resume),
            total_us: us(total),
            ..PauseTimes::default()
        })
    }
}

fn us(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

fn at(doing: &'static str) -> impl FnOnce(ReachError) -> MachineError {
    move |error| MachineError::new(doing, error)
}

fn failed(doing: &'static str, error: KvmError) -> MachineError {
    MachineError::new(doing, reach(error))
}

/// An error of KVM's, with its meaning.
fn reach(error: KvmError) -> ReachError {
    let meaning = match &error {
        KvmError::Busy(_) => Meaning::Busy,
        KvmError::Pause(PauseError::Stop(StopError::Forbidden(_))) => Meaning::Forbidden { memory_of: None },
        KvmError::Find(FindError::SeveralVms { .. }) | KvmError::Arm(ArmError::InUse { .. }) => Meaning::Permanent,
        _ => Meaning::MayPass,
    };
    ReachError::new(meaning, error)
}

#[cfg(test)]
mod tests {
    use super::*;
    use process::Thread;

    const THREAD: Thread = Thread {
        pid: 20,
        tid: 21,
        start_time: 1,
    };

    #[test]
    fn a_thread_that_does_not_stop_in_time_does_not_stop_the_others_again_at_once() {
        let late = PauseError::Stop(StopError::Late {
            thread: THREAD,
            within_us: 100_000,
        });
        let outside = PauseError::Outside {
            thread: THREAD,
            call: None,
        };
        assert_eq!(wait_after(&late, 1), None);
        assert_eq!(wait_after(&outside, 1), Some(TRY_WAIT));
        assert_eq!(wait_after(&outside, TRIES), None);
        assert_eq!(wait_to_recover(&late, RECOVER_TIME_MAX), Some(RECOVER_WAIT));
        assert_eq!(wait_to_recover(&late, Duration::ZERO), None);
    }

    #[test]
    fn a_half_patched_guest_is_recovered_though_the_killed_vmpatch_still_traces_it() {
        let traced = PauseError::Stop(StopError::Traced {
            thread: THREAD,
            tracer: 19,
        });
        assert_eq!(wait_after(&traced, 1), None);
        assert_eq!(wait_to_recover(&traced, RECOVER_TIME_MAX), Some(RECOVER_WAIT));
    }

    #[test]
    fn an_error_says_what_it_means_and_why() {
        let several = FindError::SeveralVms { pid: 7, count: 2 };
        let error = reach(several.into());
        assert_eq!(error.meaning(), Meaning::Permanent);
        assert_eq!(
            chain(&error).join(": "),
            "finding the vCPUs' threads (--pause qmp pauses through QEMU): process 7 has 2 descriptors of VMs; one is understood"
        );
        assert_eq!(reach(KvmError::Busy("a dump".to_owned())).meaning(), Meaning::Busy);
    }
}
