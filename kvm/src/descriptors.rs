//! A process's descriptors of KVM, and its mappings of them.

use crate::vm::FindError;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::PathBuf;

/// A vCPU of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Vcpu {
    /// Its number in KVM, which on x86 is its APIC's.
    pub id: u32,
    /// The process's descriptor of it.
    pub descriptor: i32,
    /// Where the process maps its `struct kvm_run`.
    pub run: u64,
}

/// What a process has of KVM.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Descriptors {
    /// Descriptors of VMs.
    pub vms: Vec<i32>,
    /// Descriptors of vCPUs: number in KVM, descriptor.
    pub vcpus: Vec<(u32, i32)>,
}

/// How the kernel names them: virt/kvm/kvm_main.c, Linux 6.1 (the number since 4.16).
const VM: &str = "anon_inode:kvm-vm";
const VCPU: &str = "anon_inode:kvm-vcpu:";

impl Descriptors {
    pub fn of(pid: i32) -> Result<Self, (PathBuf, io::Error)> {
        let path = PathBuf::from(format!("/proc/{pid}/fd"));
        let mut found = Self::default();
        for entry in fs::read_dir(&path).map_err(|error| (path.clone(), error))?.flatten() {
            let Some(descriptor) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else {
                continue;
            };
            // One that is being closed leads nowhere.
            if let Ok(target) = fs::read_link(entry.path()) {
                found.add(descriptor, &target.to_string_lossy());
            }
        }
        found.vcpus.sort_unstable();
        Ok(found)
    }

    /// The descriptor of the one VM.
    pub fn one_vm(&self, pid: i32) -> Result<i32, FindError> {
        match self.vms.as_slice() {
            [] => Err(FindError::NoVm { pid }),
            [vm] => Ok(*vm),
            several => {
                let count = several.len();
                Err(FindError::SeveralVms { pid, count })
            }
        }
    }

    fn add(&mut self, descriptor: i32, target: &str) {
        if target == VM {
            self.vms.push(descriptor);
        } else if let Some(id) = target.strip_prefix(VCPU).and_then(|id| id.parse().ok()) {
            self.vcpus.push((id, descriptor));
        }
    }
}

/// The descriptor of the one VM that a process has.
pub(crate) fn vm(pid: i32) -> Result<i32, FindError> {
    let descriptors = Descriptors::of(pid).map_err(|(path, source)| FindError::Proc { path, source })?;
    descriptors.one_vm(pid)
}

/// Where a process maps its vCPUs' `struct kvm_run`: all places for each number.
pub(crate) fn mapped(pid: i32) -> Result<BTreeMap<u32, Vec<u64>>, (PathBuf, io::Error)> {
    let path = PathBuf::from(format!("/proc/{pid}/maps"));
    let text = fs::read(&path).map_err(|error| (path, error))?;
    Ok(mappings(&String::from_utf8_lossy(&text)))
}

/// From `/proc/PID/maps`: see `proc_pid_maps(5)`.
fn mappings(text: &str) -> BTreeMap<u32, Vec<u64>> {
    let mut found: BTreeMap<u32, Vec<u64>> = BTreeMap::new();
    for line in text.lines() {
        let mut words = line.split_ascii_whitespace();
        let (Some(range), Some(offset), Some(name)) = (words.next(), words.nth(1), words.nth(2)) else {
            continue;
        };
        let id = name.strip_prefix(VCPU).and_then(|id| id.parse().ok());
        let start = range
            .split_once('-')
            .and_then(|(start, _)| u64::from_str_radix(start, 16).ok());
        // The page is the first of what can be mapped.
        if let (Some(id), Some(start), Ok(0)) = (id, start, u64::from_str_radix(offset, 16)) {
            found.entry(id).or_default().push(start);
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_of_kvm_are_told_from_others() {
        let mut found = Descriptors::default();
        for (descriptor, target) in [
            (9, "/dev/kvm"),
            (10, "anon_inode:kvm-vm"),
            (11, "anon_inode:kvm-vcpu:0"),
            (12, "anon_inode:kvm-vcpu:17"),
            (13, "anon_inode:kvm-vcpu-stats:0"),
            (14, "anon_inode:kvm-vcpu:x"),
            (15, "anon_inode:[eventfd]"),
        ] {
            found.add(descriptor, target);
        }
        assert_eq!(
            found,
            Descriptors {
                vms: vec![10],
                vcpus: vec![(0, 11), (17, 12)]
            }
        );
    }

    #[test]
    fn pages_of_vcpus_are_found_among_the_mappings() {
        let text = "\
7f60a4000000-7f60b4000000 rw-s 00000000 00:01 4211 /memfd:pc.ram (deleted)
7f60c8a5d000-7f60c8a60000 rw-s 00000000 00:0e 1061 anon_inode:kvm-vcpu:1
7f60c8a60000-7f60c8a63000 rw-s 00000000 00:0e 1061                       anon_inode:kvm-vcpu:0
7f60c8a63000-7f60c8a64000 rw-s 00001000 00:0e 1061 anon_inode:kvm-vcpu:2
7f60c8a64000-7f60c8a65000 rw-p 00000000 00:00 0
";
        let expected = BTreeMap::from([(0, vec![0x7f60_c8a6_0000]), (1, vec![0x7f60_c8a5_d000])]);
        assert_eq!(mappings(text), expected);
    }
}
