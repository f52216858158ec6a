//! Guests under KVM that no QEMU runs, or none that is known by its name: found by the descriptors of KVM that their processes hold.

use super::process::{self, Binary, Process, is_gone};
use super::{DomainError, Domains};
use kvm::{FindError, Vm};
use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::io::ErrorKind;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// A process that holds a VM of KVM.
#[derive(Debug)]
pub struct KvmGuest {
    /// The process.
    pub pid: i32,
    /// When it started, in clock ticks since the host's boot.
    pub start_time: u64,
    /// Its program, or the name that it was called by where another user's process does not show it.
    pub program: String,
    /// How many vCPUs it runs, or why what it has of KVM is not understood.
    pub vcpus: Result<usize, FindError>,
}

/// Guests under KVM at one time.
#[derive(Debug, Default)]
pub struct KvmGuests {
    /// Those found, by rising pid.
    pub found: Vec<KvmGuest>,
    /// How many processes could not be looked at, because they are other users'.
    pub unreadable: usize,
}

impl KvmGuests {
    /// All processes with a VM of KVM that are not among the domains. What a process has open shows to root and to its own user alone.
    ///
    /// Errors: [`DomainError::Proc`]. A process that ends while it is read is left out.
    pub fn beside(domains: &Domains) -> Result<Self, DomainError> {
        let successors = domains.successors.iter().map(|successor| &successor.domain);
        let known: BTreeSet<i32> = domains.iter().chain(successors).map(|domain| domain.pid).collect();
        let mut guests = Self::default();
        for pid in process::pids().map_err(DomainError::Proc)? {
            if known.contains(&pid) {
                continue;
            }
            let vcpus = match Vm::count_vcpus(pid) {
                Err(FindError::NoVm { .. }) => continue,
                Err(FindError::Proc { source, .. }) if is_gone(&source) => continue,
                Err(FindError::Proc { source, .. }) if source.kind() == ErrorKind::PermissionDenied => {
                    // A kernel thread has no command line, and no guest.
                    guests.unreadable += usize::from(matches!(Process::read(pid), Ok(Some(_))));
                    continue;
                }
                vcpus => vcpus,
            };
            if let Ok(Some(process)) = Process::read(pid) {
                guests.found.push(KvmGuest {
                    pid,
                    start_time: process.start_time,
                    program: program(process.binary.as_ref(), process.words.first().map(Vec::as_slice)),
                    vcpus,
                });
            }
        }
        Ok(guests)
    }
}

/// The last part of a program's path.
fn program(binary: Option<&Binary>, called: Option<&[u8]>) -> String {
    let called = called.map(|word| Path::new(OsStr::from_bytes(word)));
    let path = binary.map(|binary| binary.path.as_path()).or(called);
    let name = path.and_then(Path::file_name).unwrap_or_default();
    // Its user chooses the name: nothing in it may move the cursor of an operator's terminal.
    let is_plain = |c: char| c.is_alphanumeric() || c.is_ascii_graphic() || c == ' ';
    let shown = |c| if is_plain(c) { c } else { '?' };
    name.to_string_lossy().chars().map(shown).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_is_named_by_its_file_and_else_by_what_it_was_called() {
        let binary = Binary {
            path: "/usr/bin/alioth".into(),
            deleted: false,
        };
        assert_eq!(program(Some(&binary), Some(b"vmm")), "alioth");
        assert_eq!(program(None, Some(b"./vmm")), "vmm");
        assert_eq!(program(None, None), "");
        assert_eq!(program(None, Some(b"\x1b[2Jvmm")), "?[2Jvmm");
    }

    #[test]
    fn processes_without_a_vm_of_kvm_are_left_out() {
        let guests = KvmGuests::beside(&Domains::default()).unwrap();
        let own = std::process::id().cast_signed();
        assert!(guests.found.iter().all(|guest| guest.pid != own));
    }
}
