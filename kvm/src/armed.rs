//! A VM whose registers KVM stores at each exit, and its pause.

use crate::descriptors::Vcpu;
use crate::run::{self, Page};
use crate::vm::{self, Vm};
use guest_core::Registers;
use nix::errno::Errno;
use process::{Memory, Span, StopError, Stopped, Thread, ThreadRegisters};
use std::time::Duration;

/// A VM whose registers KVM stores at each exit. Dropped, KVM does so no more.
///
/// It stays armed over all pauses: armed anew in each, some registers of a busy host were those from before. Should this process be killed,
/// KVM goes on storing them, which costs the guest a little time at each exit, until somebody calls [`Armed::disarm_left`].
#[derive(Debug)]
pub struct Armed {
    vm: Vm,
    memory: Memory,
}

/// Why KVM can't be told to store registers.
#[derive(Debug, thiserror::Error)]
pub enum ArmError {
    /// The process's memory can't be reached.
    #[error("reaching the page that KVM shares for vCPU {vcpu}")]
    Memory {
        /// The vCPU's number in KVM.
        vcpu: u32,
        /// Why.
        source: Errno,
    },
    /// The process itself has KVM store or set registers there.
    #[error(
        "the process uses KVM's shared registers of vCPU {vcpu} itself (kvm_valid_regs {valid:#x}, kvm_dirty_regs {dirty:#x})"
    )]
    InUse {
        /// The vCPU's number in KVM.
        vcpu: u32,
        /// What KVM stores for it.
        valid: u64,
        /// What it has set.
        dirty: u64,
    },
}

/// Why the guest could not be paused. It runs as before.
#[derive(Debug, thiserror::Error)]
pub enum PauseError {
    /// A thread could not be stopped, or has ended.
    #[error(transparent)]
    Stop(#[from] StopError),
    /// A vCPU's thread was not in KVM: it was handling what the guest asked for, and KVM may have an instruction of it half done.
    #[error("thread {} of process {} was not in its vCPU, but {}", .thread.tid, .thread.pid, call_name(*.call))]
    Outside {
        /// The thread.
        thread: Thread,
        /// The system call that it was in.
        call: Option<u64>,
    },
    /// A thread runs another vCPU than those that were found, or two run the same.
    #[error("thread {} of process {} runs another vCPU than was found (descriptor {descriptor})", .thread.tid, .thread.pid)]
    OtherVcpu {
        /// The thread.
        thread: Thread,
        /// The descriptor of its vCPU.
        descriptor: u64,
    },
    /// KVM has not stored the registers.
    #[error("KVM has not stored the registers of vCPU {vcpu}")]
    Stale {
        /// The vCPU's number in KVM.
        vcpu: u32,
    },
    /// Somebody else has changed what KVM is to store.
    #[error(
        "what KVM stores of vCPU {vcpu} was changed by another (kvm_valid_regs {valid:#x}, kvm_dirty_regs {dirty:#x})"
    )]
    Disarmed {
        /// The vCPU's number in KVM.
        vcpu: u32,
        /// What it stores.
        valid: u64,
        /// What it is to set.
        dirty: u64,
    },
    /// The pages that KVM shares can't be read.
    #[error("reading the pages that KVM shares")]
    Memory(#[source] Errno),
}

fn call_name(call: Option<u64>) -> String {
    call.map_or_else(|| "in the program".to_owned(), |call| format!("in system call {call}"))
}

impl PauseError {
    /// What the process was doing, where the next try may succeed: "it keeps …".
    pub fn transient(&self) -> Option<&'static str> {
        match self {
            Self::Stop(StopError::Late { .. }) => Some("a vCPU from being stopped"),
            Self::Stop(StopError::Gone(_)) | Self::OtherVcpu { .. } => Some("plugging vCPUs in or out"),
            Self::Outside { .. } | Self::Stale { .. } => Some("handling what the guest asks of it"),
            Self::Stop(_) | Self::Disarmed { .. } | Self::Memory(_) => None,
        }
    }
}

impl Armed {
    /// Has KVM store the registers of all vCPUs at each exit from now on.
    ///
    /// # Errors
    ///
    /// The process does so itself, or can't be reached. Nothing was changed then.
    pub fn arm(vm: Vm) -> Result<Self, ArmError> {
        let memory = memory_of(&vm);
        for vcpu in vm.vcpus() {
            let reaching = reaching(vcpu);
            let mut page = [0; run::READ_LEN];
            memory.read(vcpu.run, &mut page).map_err(reaching)?;
            let (valid, dirty) = (Page(&page).valid_regs(), Page(&page).dirty_regs());
            if (valid != 0 && !is_marked(memory, vcpu)?) || dirty != 0 {
                let vcpu = vcpu.id;
                return Err(ArmError::InUse { vcpu, valid, dirty });
            }
        }
        // Dropped by an error, it disarms those that were.
        let armed = Self { vm, memory };
        for vcpu in armed.vm.vcpus() {
            let reaching = reaching(vcpu);
            let put = |at: u64, bytes: [u8; 8]| memory.write(vcpu.run + at, &bytes).map_err(&reaching);
            put(run::MARK_AT, run::MARK)?;
            put(run::RIP, run::POISON.to_le_bytes())?;
            put(run::VALID_REGS, run::WANTED.to_le_bytes())?;
        }
        Ok(armed)
    }

    /// Ends what an [`Armed`] of a process that was killed has left.
    ///
    /// # Errors
    ///
    /// It may still be there.
    pub fn disarm_left(vm: &Vm) -> Result<(), ArmError> {
        let memory = memory_of(vm);
        for vcpu in vm.vcpus() {
            if is_marked(memory, vcpu)? {
                disarm(memory, vcpu).map_err(reaching(vcpu))?;
            }
        }
        Ok(())
    }

    /// The VM.
    pub fn vm(&self) -> &Vm {
        &self.vm
    }

    /// Stops all vCPUs, all of which have `within` for it, and reads their registers.
    ///
    /// # Errors
    ///
    /// They run as before.
    pub fn pause(&self, within: Duration) -> Result<Paused, PauseError> {
        let stopped = Stopped::stop(self.vm.threads(), within)?;
        let stop = stopped.elapsed();
        let threads: Vec<Thread> = stopped.threads().collect();
        check_threads(self.vm.vcpus(), &threads, &stopped.registers()?)?;
        let registers = self.registers()?;
        let registers_read = stopped.elapsed();
        Ok(Paused {
            stopped,
            registers,
            stop,
            registers_read,
        })
    }

    /// What KVM stored at the exits that stopped the vCPUs.
    fn registers(&self) -> Result<Vec<Registers>, PauseError> {
        let vcpus = self.vm.vcpus();
        let mut bytes = vec![0; vcpus.len() * run::READ_LEN];
        let spans = vcpus.iter().map(|vcpu| Span {
            at: vcpu.run,
            len: run::READ_LEN,
        });
        self.memory.read_all(spans, &mut bytes).map_err(PauseError::Memory)?;
        let (pages, _) = bytes.as_chunks::<{ run::READ_LEN }>();
        vcpus
            .iter()
            .zip(pages)
            .map(|(vcpu, page)| judge(vcpu.id, Page(page)))
            .collect()
    }
}

impl Drop for Armed {
    fn drop(&mut self) {
        for vcpu in self.vm.vcpus() {
            // Where the process has ended, or has unplugged the vCPU, nothing is left to be changed: its address may hold other memory by now.
            if matches!(is_marked(self.memory, vcpu), Ok(true)) {
                let _ = disarm(self.memory, vcpu);
            }
        }
    }
}

/// A paused guest. Dropped, it runs.
#[derive(Debug)]
pub struct Paused {
    stopped: Stopped,
    registers: Vec<Registers>,
    stop: Duration,
    registers_read: Duration,
}

impl Paused {
    /// Registers of each vCPU, in ascending order of their numbers.
    pub fn registers(&self) -> &[Registers] {
        &self.registers
    }

    /// Time since the first vCPU was asked to stop.
    pub fn elapsed(&self) -> Duration {
        self.stopped.elapsed()
    }

    /// How long it took to stop all vCPUs, and to have read their registers, both since the first was asked to stop.
    pub fn times(&self) -> (Duration, Duration) {
        (self.stop, self.registers_read)
    }

    /// Lets the guest run.
    ///
    /// # Errors
    ///
    /// The process is being killed.
    pub fn resume(self) -> Result<(), StopError> {
        self.stopped.resume()
    }
}

fn memory_of(vm: &Vm) -> Memory {
    // A VM without a thread has no vCPU, and nothing is read.
    Memory::of(vm.threads().first().map_or(0, |thread| thread.pid))
}

fn reaching(vcpu: &Vcpu) -> impl Fn(Errno) -> ArmError + use<> {
    let vcpu = vcpu.id;
    move |source| ArmError::Memory { vcpu, source }
}

/// True where an [`Armed`] has been, and has not been dropped.
fn is_marked(memory: Memory, vcpu: &Vcpu) -> Result<bool, ArmError> {
    let mut mark = [0; run::MARK.len()];
    memory
        .read(vcpu.run + run::MARK_AT, &mut mark)
        .map_err(reaching(vcpu))?;
    Ok(mark == run::MARK)
}

fn disarm(memory: Memory, vcpu: &Vcpu) -> nix::Result<()> {
    memory.write(vcpu.run + run::VALID_REGS, &[0; 8])?;
    memory.write(vcpu.run + run::MARK_AT, &[0; run::MARK.len()])
}

/// Makes sure that the threads were stopped in `KVM_RUN`, each in another of the vCPUs. That call returns EINTR then, which KVM gives where
/// no instruction of the guest is half done and all registers are stored (`kvm_arch_vcpu_ioctl_run()`, arch/x86/kvm/x86.c, Linux 6.12).
fn check_threads(vcpus: &[Vcpu], threads: &[Thread], registers: &[ThreadRegisters]) -> Result<(), PauseError> {
    let mut left: Vec<Vcpu> = vcpus.to_vec();
    for (thread, registers) in threads.iter().zip(registers) {
        let thread = *thread;
        let [descriptor, request, _] = registers.args;
        let is_in_vcpu = registers.call.is_some_and(|call| vm::is_kvm_run(call, request))
            && registers.result == -i64::from(nix::libc::EINTR);
        if !is_in_vcpu {
            return Err(PauseError::Outside {
                thread,
                call: registers.call,
            });
        }
        let Some(at) = left.iter().position(|vcpu| vm::is_same(vcpu.descriptor, descriptor)) else {
            return Err(PauseError::OtherVcpu { thread, descriptor });
        };
        left.swap_remove(at);
    }
    Ok(())
}

/// The registers that KVM stored, where it did.
fn judge(vcpu: u32, page: Page<'_>) -> Result<Registers, PauseError> {
    let (valid, dirty) = (page.valid_regs(), page.dirty_regs());
    if valid != run::WANTED || dirty != 0 {
        return Err(PauseError::Disarmed { vcpu, valid, dirty });
    }
    let registers = page.registers();
    if registers.rip == run::POISON {
        return Err(PauseError::Stale { vcpu });
    }
    Ok(registers)
}

#[cfg(test)]
mod tests {
    use super::*;

    const EINTR: i64 = -4;

    fn threads() -> [Thread; 2] {
        [20, 21].map(|tid| Thread {
            pid: 20,
            tid,
            start_time: 1,
        })
    }

    fn vcpus() -> [Vcpu; 2] {
        [(0, 11), (1, 12)].map(|(id, descriptor)| Vcpu { id, descriptor, run: 0 })
    }

    fn in_vcpu(descriptor: u64) -> ThreadRegisters {
        ThreadRegisters {
            call: Some(16),
            args: [descriptor, 0xae80, 0],
            result: EINTR,
        }
    }

    fn checked(registers: &[ThreadRegisters]) -> Result<(), PauseError> {
        check_threads(&vcpus(), &threads(), registers)
    }

    #[test]
    fn each_thread_must_be_in_a_vcpu_of_its_own() {
        checked(&[in_vcpu(11), in_vcpu(12)]).unwrap();
        checked(&[in_vcpu(12), in_vcpu(11)]).unwrap();
        for (one, other) in [(11, 11), (11, 13), (13, 12)] {
            let error = checked(&[in_vcpu(one), in_vcpu(other)]).unwrap_err();
            assert!(matches!(error, PauseError::OtherVcpu { .. }), "{error}");
        }
    }

    #[test]
    fn a_thread_that_is_not_in_kvm_has_no_registers_to_judge_by() {
        let out_of = |registers: ThreadRegisters| {
            let error = checked(&[in_vcpu(11), registers]).unwrap_err();
            assert!(
                matches!(error, PauseError::Outside { thread, .. } if thread.tid == 21),
                "{error}"
            );
        };
        // KVM_RUN that has given the VMM something to do, another request, another call, the program itself.
        out_of(ThreadRegisters {
            result: 0,
            ..in_vcpu(12)
        });
        out_of(ThreadRegisters {
            args: [12, 0xae81, 0],
            ..in_vcpu(12)
        });
        out_of(ThreadRegisters {
            call: Some(202),
            ..in_vcpu(12)
        });
        out_of(ThreadRegisters {
            call: None,
            ..in_vcpu(12)
        });
    }

    #[test]
    fn registers_that_kvm_has_not_stored_are_not_taken() {
        let page = |valid: u64, dirty: u64, rip: u64| {
            let mut bytes = [0; run::READ_LEN];
            bytes[288..296].copy_from_slice(&valid.to_le_bytes());
            bytes[296..304].copy_from_slice(&dirty.to_le_bytes());
            bytes[304 + 128..304 + 136].copy_from_slice(&rip.to_le_bytes());
            judge(7, Page(&bytes))
        };
        assert_eq!(page(3, 0, 0x1000).unwrap().rip, 0x1000);
        assert!(matches!(page(3, 0, run::POISON), Err(PauseError::Stale { vcpu: 7 })));
        for (valid, dirty) in [(0, 0), (1, 0), (7, 0), (3, 1)] {
            assert!(matches!(
                page(valid, dirty, 0x1000),
                Err(PauseError::Disarmed { vcpu: 7, .. })
            ));
        }
    }

    /// The pages of two vCPUs in this process, as a VMM has them.
    fn own(pages: &mut [[u8; 4096]; 2]) -> Vm {
        let pid = std::process::id().cast_signed();
        let (thread, _) = process::threads(pid).unwrap()[0].clone();
        let [first, second] = [0, 1].map(|id: usize| Vcpu {
            id: u32::try_from(id).unwrap(),
            descriptor: 11,
            run: pages[id].as_mut_ptr() as u64,
        });
        Vm::new(vec![first, second], vec![thread])
    }

    fn word(page: &[u8; 4096], at: usize) -> u64 {
        u64::from_le_bytes(page[at..at + 8].try_into().unwrap())
    }

    #[test]
    fn what_is_armed_is_disarmed_and_also_what_a_killed_process_armed() {
        let mut pages = [[0; 4096]; 2];
        let vm = own(&mut pages);
        let armed = Armed::arm(vm.clone()).unwrap();
        for page in &pages {
            assert_eq!((word(page, 288), word(page, 304 + 128)), (3, run::POISON));
        }
        // Killed, it leaves all as it is.
        std::mem::forget(armed);
        Armed::disarm_left(&vm).unwrap();
        assert!(pages.iter().all(|page| word(page, 288) == 0));
        let armed = Armed::arm(vm.clone()).unwrap();
        std::mem::forget(armed);
        // The next one begins anew.
        drop(Armed::arm(vm).unwrap());
        assert!(pages.iter().all(|page| word(page, 288) == 0));
        assert!(pages.iter().all(|page| page[304 + 520..].iter().all(|byte| *byte == 0)));
    }

    #[test]
    fn what_took_the_address_of_an_unplugged_vcpu_is_left_alone() {
        let mut pages = [[0; 4096]; 2];
        let armed = Armed::arm(own(&mut pages)).unwrap();
        pages[1] = [0x5a; 4096];
        drop(armed);
        assert_eq!(word(&pages[0], 288), 0);
        assert_eq!(pages[1], [0x5a; 4096]);
    }

    #[test]
    fn a_process_that_uses_the_registers_itself_is_left_alone() {
        for at in [288, 296] {
            let mut pages = [[0; 4096]; 2];
            pages[1][at] = 1;
            let (vm, before) = (own(&mut pages), pages);
            let error = Armed::arm(vm.clone()).unwrap_err();
            assert!(matches!(error, ArmError::InUse { vcpu: 1, .. }), "{error}");
            Armed::disarm_left(&vm).unwrap();
            assert_eq!(pages, before);
        }
    }
}
