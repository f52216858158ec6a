//! The vCPUs of a process and the threads that run them, found without stopping any.

use crate::descriptors::{self, Descriptors, Vcpu};
use crate::run::KVM_RUN;
use process::{Doing, Stat, Thread, ThreadError, threads};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// Pause between two looks at the threads.
const LOOK_WAIT: Duration = Duration::from_millis(2);

/// A VM: its vCPUs, and the threads that run them. Which thread runs which vCPU is told when it is stopped. Another process that is given it
/// need not find them again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Vm {
    vcpus: Vec<Vcpu>,
    threads: Vec<Thread>,
}

/// Why a process's vCPUs are not understood.
#[derive(Debug, thiserror::Error)]
pub enum FindError {
    /// The host does not tell it.
    #[error("cannot read {path}")]
    Proc {
        /// The file or folder.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The host does not tell the threads.
    #[error(transparent)]
    Threads(#[from] ThreadError),
    /// It runs no guest of KVM.
    #[error("process {pid} has no VM of KVM")]
    NoVm {
        /// The process.
        pid: i32,
    },
    /// It has a VM that nothing can run: a process that is about to start a guest, or a helper of one that runs it.
    #[error("process {pid} has a VM of KVM, and runs no vCPU of it")]
    NoVcpus {
        /// The process.
        pid: i32,
    },
    /// It runs more than one guest, or has the same twice.
    #[error("process {pid} has {count} descriptors of VMs; one is understood")]
    SeveralVms {
        /// The process.
        pid: i32,
        /// How many.
        count: usize,
    },
    /// What it has of a vCPU does not fit together.
    #[error(
        "process {pid} has {descriptors} descriptors and {mappings} mappings of vCPU {id}; one of each is understood"
    )]
    Vcpu {
        /// The process.
        pid: i32,
        /// The vCPU's number in KVM.
        id: u32,
        /// How many descriptors.
        descriptors: usize,
        /// How many mappings.
        mappings: usize,
    },
    /// Not as many threads run a guest as there are vCPUs.
    #[error("process {pid} has {vcpus} vCPUs, and {found} threads were seen to run one within {within_ms} ms")]
    ThreadCount {
        /// The process.
        pid: i32,
        /// vCPUs.
        vcpus: usize,
        /// Threads.
        found: usize,
        /// How long they were looked for, in milliseconds.
        within_ms: u128,
    },
}

impl Vm {
    #[cfg(test)]
    pub(crate) fn new(vcpus: Vec<Vcpu>, threads: Vec<Thread>) -> Self {
        Self { vcpus, threads }
    }

    /// Finds the VM that a process runs. Threads that have not run for a tick of the host's clock are only told while they wait in the
    /// kernel, so they are looked for `within` that time. Stops nothing.
    ///
    /// # Errors
    ///
    /// Not every vCPU is accounted for, or there is something else that is not understood.
    pub fn find(pid: i32, within: Duration) -> Result<Self, FindError> {
        let (descriptors, vcpus) = find_vcpus(pid)?;
        let threads = find_threads(pid, &descriptors.vcpus, vcpus.len(), within)?;
        Ok(Self { vcpus, threads })
    }

    /// How many vCPUs the VM has that a process runs. Its threads are not looked at.
    ///
    /// # Errors
    ///
    /// It runs no guest of KVM ([`FindError::NoVm`]), or what it has of KVM is not understood.
    pub fn count_vcpus(pid: i32) -> Result<usize, FindError> {
        find_vcpus(pid).map(|(_, vcpus)| vcpus.len())
    }

    /// True where the process has the same vCPUs as when they were found. One that comes right behind this is seen by the guest's own list
    /// of CPUs.
    pub fn is_current(&self) -> bool {
        let Some(pid) = self.threads.first().map(|thread| thread.pid) else {
            return false;
        };
        let found = Descriptors::of(pid).ok().zip(descriptors::mapped(pid).ok());
        let vcpus = found.and_then(|(descriptors, mapped)| pair(pid, &descriptors.vcpus, &mapped).ok());
        let is_there = |thread: &Thread| {
            let stat = thread.stat();
            stat.is_ok_and(|stat| stat.start_time == thread.start_time && !stat.has_ended())
        };
        vcpus.is_some_and(|vcpus| vcpus == self.vcpus) && self.threads.iter().all(is_there)
    }

    /// The vCPUs, in ascending order of their numbers.
    pub fn vcpus(&self) -> &[Vcpu] {
        &self.vcpus
    }

    /// The threads that run them, in ascending order of their numbers.
    pub fn threads(&self) -> &[Thread] {
        &self.threads
    }
}

fn find_vcpus(pid: i32) -> Result<(Descriptors, Vec<Vcpu>), FindError> {
    let proc = |(path, source)| FindError::Proc { path, source };
    let descriptors = Descriptors::of(pid).map_err(proc)?;
    descriptors.one_vm(pid)?;
    let vcpus = pair(pid, &descriptors.vcpus, &descriptors::mapped(pid).map_err(proc)?)?;
    Ok((descriptors, vcpus))
}

/// The vCPUs that can run. QEMU keeps the descriptor of one that was unplugged, without a mapping and a thread.
fn pair(pid: i32, descriptors: &[(u32, i32)], mapped: &BTreeMap<u32, Vec<u64>>) -> Result<Vec<Vcpu>, FindError> {
    let mut vcpus = Vec::new();
    let ids: BTreeSet<u32> = descriptors
        .iter()
        .map(|(id, _)| *id)
        .chain(mapped.keys().copied())
        .collect();
    for id in ids {
        let of: Vec<i32> = descriptors
            .iter()
            .filter(|(other, _)| *other == id)
            .map(|(_, of)| *of)
            .collect();
        let at = mapped.get(&id).map_or(&[][..], Vec::as_slice);
        match (of.as_slice(), at) {
            ([descriptor], [run]) => vcpus.push(Vcpu {
                id,
                descriptor: *descriptor,
                run: *run,
            }),
            ([_], []) => {}
            _ => {
                let (descriptors, mappings) = (of.len(), at.len());
                return Err(FindError::Vcpu {
                    pid,
                    id,
                    descriptors,
                    mappings,
                });
            }
        }
    }
    if vcpus.is_empty() {
        Err(FindError::NoVcpus { pid })
    } else {
        Ok(vcpus)
    }
}

/// Looks at the threads until as many of them have been seen to run a vCPU as there are vCPUs.
fn find_threads(
    pid: i32,
    descriptors: &[(u32, i32)],
    vcpus: usize,
    within: Duration,
) -> Result<Vec<Thread>, FindError> {
    let began = Instant::now();
    let mut seen = BTreeSet::new();
    loop {
        let all = threads(pid)?;
        // One that has ended ran a vCPU that was unplugged.
        seen.retain(|thread| all.iter().any(|(other, _)| other == thread));
        let running = all
            .iter()
            .filter(|(thread, stat)| runs_guest(thread, stat, descriptors));
        seen.extend(running.map(|(thread, _)| *thread));
        if seen.len() == vcpus {
            return Ok(seen.into_iter().collect());
        }
        if seen.len() > vcpus || began.elapsed() > within {
            let (found, within_ms) = (seen.len(), within.as_millis());
            return Err(FindError::ThreadCount {
                pid,
                vcpus,
                found,
                within_ms,
            });
        }
        std::thread::sleep(LOOK_WAIT);
    }
}

/// True where a thread has run a guest's code, or waits in the call that does.
fn runs_guest(thread: &Thread, stat: &Stat, descriptors: &[(u32, i32)]) -> bool {
    // The registers of a kernel worker are its creator's, and may show that call.
    if stat.is_kernel_worker() || stat.has_ended() {
        return false;
    }
    stat.guest_time > 0 || thread.doing().is_ok_and(|doing| is_run(doing, descriptors))
}

fn is_run(doing: Doing, descriptors: &[(u32, i32)]) -> bool {
    match doing {
        Doing::Call {
            number,
            args: [descriptor, request, ..],
        } => is_kvm_run(number, request) && descriptors.iter().any(|(_, of)| is_same(*of, descriptor)),
        Doing::Running | Doing::Waiting => false,
    }
}

/// True for `ioctl(…, KVM_RUN)`.
pub(crate) fn is_kvm_run(number: u64, request: u64) -> bool {
    number == nix::libc::SYS_ioctl.cast_unsigned() && request == KVM_RUN
}

/// True where a register holds that descriptor.
pub(crate) fn is_same(descriptor: i32, register: u64) -> bool {
    u64::try_from(descriptor).is_ok_and(|descriptor| descriptor == register)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_vcpu_has_one_descriptor_and_one_page() {
        let mapped = |pages: &[(u32, u64)]| {
            let mut all: BTreeMap<u32, Vec<u64>> = BTreeMap::new();
            for (id, page) in pages {
                all.entry(*id).or_default().push(*page);
            }
            all
        };
        let vcpu = |id, descriptor, run| Vcpu { id, descriptor, run };
        let found = pair(1, &[(0, 11), (4, 12)], &mapped(&[(0, 0x1000), (4, 0x5000)])).unwrap();
        assert_eq!(found, [vcpu(0, 11, 0x1000), vcpu(4, 12, 0x5000)]);
        // The second was unplugged.
        assert_eq!(
            pair(1, &[(0, 11), (4, 12)], &mapped(&[(0, 0x1000)])).unwrap(),
            [vcpu(0, 11, 0x1000)]
        );
        for (descriptors, pages) in [
            (&[(0, 11), (0, 12)][..], &[(0, 0x1000)][..]),
            (&[(0, 11)], &[(0, 0x1000), (0, 0x5000)]),
            (&[(0, 11)], &[(0, 0x1000), (1, 0x5000)]),
            (&[(0, 11)], &[]),
            (&[], &[]),
        ] {
            assert!(
                pair(1, descriptors, &mapped(pages)).is_err(),
                "{descriptors:?} {pages:?}"
            );
        }
    }

    #[test]
    fn a_thread_that_waits_in_its_vcpu_is_told_from_others() {
        let call = |number, descriptor, request| Doing::Call {
            number,
            args: [descriptor, request, 0, 0, 0, 0],
        };
        let descriptors = [(0, 11), (1, 12)];
        assert!(is_run(call(16, 12, 0xae80), &descriptors));
        for other in [
            Doing::Running,
            Doing::Waiting,
            call(16, 13, 0xae80),
            call(16, 12, 0xae81),
            call(17, 12, 0xae80),
            call(16, u64::MAX, 0xae80),
        ] {
            assert!(!is_run(other, &descriptors), "{other:?}");
        }
    }

    #[test]
    fn a_process_without_kvm_is_named() {
        let error = Vm::find(std::process::id().cast_signed(), Duration::ZERO).unwrap_err();
        assert!(matches!(error, FindError::NoVm { .. }), "{error}");
    }
}
