//! The threads of a process, and what each does, without a stop.

use crate::stat::Stat;
use serde::{Deserialize, Serialize};
use std::fs;
use std::io;
use std::path::PathBuf;

/// A thread of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Thread {
    /// The process.
    pub pid: i32,
    /// The thread's number.
    pub tid: i32,
    /// When it started: see [`Stat::start_time`]. A number is given anew to another thread, but not at the same time.
    pub start_time: u64,
}

/// What a thread does: `/proc/PID/task/TID/syscall`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Doing {
    /// It runs, in the program or in the kernel.
    Running,
    /// It waits, in no system call.
    Waiting,
    /// It waits in a system call.
    Call {
        /// Its number.
        number: u64,
        /// Its arguments.
        args: [u64; 6],
    },
}

/// Why a process's threads can't be told.
#[derive(Debug, thiserror::Error)]
pub enum ThreadError {
    /// The host does not tell it: the process ended, or is another user's.
    #[error("cannot read {path}")]
    Proc {
        /// The file or folder.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The file holds something else than expected.
    #[error("{path} is not understood")]
    Text {
        /// The file.
        path: PathBuf,
    },
}

/// All threads of a process, those of the kernel that are listed in it included, in ascending order of their numbers. One that ends
/// meanwhile may be missing.
///
/// # Errors
///
/// The process ended, or the host forbids it.
pub fn threads(pid: i32) -> Result<Vec<(Thread, Stat)>, ThreadError> {
    let path = PathBuf::from(format!("/proc/{pid}/task"));
    let folder = fs::read_dir(&path).map_err(|source| ThreadError::Proc { path, source })?;
    let mut found = Vec::new();
    for entry in folder.flatten() {
        let Some(tid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        match stat(pid, tid) {
            Ok(stat) => {
                let start_time = stat.start_time;
                found.push((Thread { pid, tid, start_time }, stat));
            }
            Err(ThreadError::Proc { source, .. }) if is_gone(&source) => {}
            Err(error) => return Err(error),
        }
    }
    found.sort_by_key(|(thread, _)| thread.tid);
    Ok(found)
}

/// What the host says of thread `tid` of process `pid`.
pub(crate) fn stat(pid: i32, tid: i32) -> Result<Stat, ThreadError> {
    let (path, bytes) = read(pid, tid, "stat")?;
    Stat::parse(&bytes).ok_or(ThreadError::Text { path })
}

impl Thread {
    /// What the host says of it now.
    ///
    /// # Errors
    ///
    /// It ended, or the host forbids it.
    pub fn stat(&self) -> Result<Stat, ThreadError> {
        stat(self.pid, self.tid)
    }

    /// What it does now.
    ///
    /// # Errors
    ///
    /// It ended, or the host forbids it: this takes the right to trace it.
    pub fn doing(&self) -> Result<Doing, ThreadError> {
        let (path, bytes) = read(self.pid, self.tid, "syscall")?;
        Doing::parse(&bytes).ok_or(ThreadError::Text { path })
    }

    /// Its number as it knows it itself: in its own PID namespace, which may be a container's.
    ///
    /// # Errors
    ///
    /// It ended.
    pub fn own_number(&self) -> Result<i32, ThreadError> {
        let (path, bytes) = read(self.pid, self.tid, "status")?;
        own_number(&bytes).ok_or(ThreadError::Text { path })
    }

    /// The thread that traces it.
    pub(crate) fn tracer(&self) -> Option<i32> {
        let (_, bytes) = read(self.pid, self.tid, "status").ok()?;
        let text = String::from_utf8_lossy(&bytes);
        let line = text.lines().find_map(|line| line.strip_prefix("TracerPid:"))?;
        line.trim().parse().ok().filter(|tracer| *tracer != 0)
    }
}

impl Doing {
    /// Format of fs/proc/base.c, `proc_pid_syscall()`, Linux 6.12: a word, or a number (-1 for none), then in hex six arguments, the stack
    /// pointer and the program counter.
    fn parse(text: &[u8]) -> Option<Self> {
        let text = std::str::from_utf8(text).ok()?.trim_end();
        if text == "running" {
            return Some(Self::Running);
        }
        let mut words = text.split(' ');
        let number: i64 = words.next()?.parse().ok()?;
        let Ok(number) = u64::try_from(number) else {
            return Some(Self::Waiting);
        };
        let mut args = [0; 6];
        for arg in &mut args {
            *arg = u64::from_str_radix(words.next()?.strip_prefix("0x")?, 16).ok()?;
        }
        Some(Self::Call { number, args })
    }
}

/// The last of the numbers in `NSpid:`, which go from the outermost namespace to the innermost (`proc_pid_status(5)`, Linux 4.1).
fn own_number(status: &[u8]) -> Option<i32> {
    let text = String::from_utf8_lossy(status);
    let numbers = text.lines().find_map(|line| line.strip_prefix("NSpid:"))?;
    numbers.split_ascii_whitespace().next_back()?.parse().ok()
}

fn read(pid: i32, tid: i32, name: &str) -> Result<(PathBuf, Vec<u8>), ThreadError> {
    let path = PathBuf::from(format!("/proc/{pid}/task/{tid}/{name}"));
    match fs::read(&path) {
        Ok(bytes) => Ok((path, bytes)),
        Err(source) => Err(ThreadError::Proc { path, source }),
    }
}

/// A thread that ends while its file is open gives ESRCH.
pub(crate) fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(nix::libc::ESRCH)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_threads_own_number_is_that_of_its_innermost_namespace() {
        let status = |numbers: &str| format!("Name:\tqemu\nTgid:\t4711\nNSpid:{numbers}\nNSsid:\t9\n");
        assert_eq!(own_number(status("\t4711").as_bytes()), Some(4711));
        assert_eq!(own_number(status("\t4711\t17").as_bytes()), Some(17));
        assert_eq!(own_number(b"Name:\tqemu\n"), None);
        let own = threads(std::process::id().cast_signed()).unwrap();
        assert!(own.iter().all(|(thread, _)| thread.own_number().unwrap() == thread.tid));
    }

    #[test]
    fn what_a_thread_does_is_read() {
        let call = b"16 0x1b 0xae80 0x0 0x1 0x2 0x3 0x7ffd01020304 0x7f0102030405\n";
        let args = [0x1b, 0xae80, 0, 1, 2, 3];
        for (text, doing) in [
            (&b"running\n"[..], Some(Doing::Running)),
            (b"-1 0x7ffd01020304 0x7f0102030405\n", Some(Doing::Waiting)),
            (call, Some(Doing::Call { number: 16, args })),
            (b"16 0x1b 0xae80", None),
            (b"", None),
        ] {
            assert_eq!(Doing::parse(text), doing, "{text:?}");
        }
    }
}
