//! Descriptors of another process, taken over under their own numbers, and those of this one, closed for the program that comes next.

use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};

/// Gives this process the descriptors `numbers` of process `pid`, under the same numbers, to be kept when another program
/// takes this process over. Needs the right to trace that process, and Linux 5.6.
///
/// For a process that is about to become another program. Its limit of open files may be as low as the other's: there is room for
/// twice as many as are taken over.
///
/// Errors: a number that is open in this process already (see [`close_inherited`]) is not taken from whoever has it.
pub(super) fn inherit(pid: i32, numbers: &[i32]) -> io::Result<()> {
    // The kernel gives the lowest free number, which may be one of those that are wanted.
    let (mut parked, mut in_the_way) = (Vec::new(), Vec::new());
    for (number, mut copy) in copies(pid, numbers)? {
        while numbers.contains(&copy.as_raw_fd()) {
            let other = copy.try_clone()?;
            in_the_way.push(copy);
            copy = other;
        }
        parked.push((number, copy));
    }
    drop(in_the_way);
    for (number, parked) in &parked {
        place(parked, *number)?;
    }
    Ok(())
}

/// Copies of the descriptors `numbers` of process `pid`, with those numbers. Needs what [`inherit`] needs.
pub(super) fn copies(pid: i32, numbers: &[i32]) -> io::Result<Vec<(i32, OwnedFd)>> {
    if numbers.is_empty() {
        return Ok(Vec::new());
    }
    let process = pidfd_open(pid)?;
    let copy = |number: &i32| Ok((*number, pidfd_getfd(&process, *number)?));
    numbers.iter().map(copy).collect()
}

/// The descriptor for a process.
fn pidfd_open(pid: i32) -> io::Result<OwnedFd> {
    // SAFETY: the system call takes two numbers and touches no memory; what it returns is a new descriptor, or -1.
    owned(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) })
}

/// A copy of another process's descriptor.
fn pidfd_getfd(process: &OwnedFd, number: i32) -> io::Result<OwnedFd> {
    // SAFETY: as above; `process` is open for as long as the call takes.
    owned(unsafe { libc::syscall(libc::SYS_pidfd_getfd, process.as_raw_fd(), number, 0) })
}

/// A copy under that very number, which stays open in the next program.
fn place(descriptor: &OwnedFd, number: i32) -> io::Result<()> {
    // The lowest free number from the wanted one on: unlike dup2(), this closes nothing that is open already.
    let placed = fcntl(descriptor, FcntlArg::F_DUPFD(number))?;
    // SAFETY: the kernel has just made this descriptor for the caller, and nobody else knows it.
    let placed = unsafe { OwnedFd::from_raw_fd(placed) };
    if placed.as_raw_fd() == number {
        // From here on it is the next program's.
        let _ = placed.into_raw_fd();
        Ok(())
    } else {
        let taken = format!("the number {number} is open in this process already");
        Err(io::Error::new(io::ErrorKind::AlreadyExists, taken))
    }
}

/// Closes all descriptors above standard error: what the starter of vmpatch had open, such as a lock, is not for the program that this
/// process becomes. Needs Linux 5.9; before that, none is closed.
///
/// # Safety
///
/// Nothing in this process owns a descriptor above 2.
pub(super) unsafe fn close_inherited() {
    // SAFETY: the system call takes three numbers and touches no memory; no descriptor that it closes is owned (see above).
    let _ = unsafe { libc::syscall(libc::SYS_close_range, libc::STDERR_FILENO + 1, libc::c_uint::MAX, 0) };
}

fn owned(result: libc::c_long) -> io::Result<OwnedFd> {
    match RawFd::try_from(result) {
        // SAFETY: the kernel has just made this descriptor for the caller, and nobody else knows it.
        Ok(number) if number >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(number) }),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::io::{Read, Write};

    #[test]
    fn a_number_that_is_in_use_is_not_taken_from_its_owner() {
        let file = |name: &str| File::open(name).unwrap();
        let (owner, other) = (file("/dev/zero"), OwnedFd::from(file("/dev/null")));
        let error = place(&other, owner.as_raw_fd()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AlreadyExists, "{error}");
        let mut byte = [1];
        (&owner).read_exact(&mut byte).unwrap();
        assert_eq!(byte, [0], "still /dev/zero");
    }

    #[test]
    fn a_free_number_is_taken() {
        // No process of tests has that many files open.
        const NUMBER: i32 = 900;
        place(&OwnedFd::from(File::open("/dev/null").unwrap()), NUMBER).unwrap();
        let name = std::fs::read_link(format!("/proc/self/fd/{NUMBER}")).unwrap();
        assert_eq!(name.to_str(), Some("/dev/null"));
    }

    #[test]
    fn a_descriptor_of_another_process_is_the_same_open_file() {
        let (mut ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        let mut child = std::process::Command::new("sleep")
            .arg("100")
            .stdin(OwnedFd::from(theirs))
            .spawn()
            .unwrap();
        let process = pidfd_open(i32::try_from(child.id()).unwrap()).unwrap();
        let copy = pidfd_getfd(&process, 0).unwrap();
        std::fs::File::from(copy).write_all(b"x").unwrap();
        let mut found = [0];
        ours.read_exact(&mut found).unwrap();
        assert_eq!(found, *b"x");
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(pidfd_getfd(&process, 0).is_err());
    }
}
