//! One vmpatch at a time for each domain.
//!
//! The lock is the kernel's (`flock(2)`) on a file of its own for each QEMU process, so that it ends with its holder,
//! however that ends. Each user has a folder for these files, and one user may have two (with `XDG_RUNTIME_DIR`, and without), so that a
//! file of the process itself in `/proc` is locked, too: it is the same for all who may read the guest's memory.

use crate::domains::process;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use std::env;
use std::ffi::OsStr;
use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread::sleep;
use std::time::{Duration, Instant};
use thiserror::Error;

/// How long another vmpatch at work on the domain is waited for: its supervisor may just be recovering something.
pub(crate) const LOCK_TIME_MAX: Duration = Duration::from_secs(5);

/// Between two tries at a lock that is held, in milliseconds. `flock` itself has no time-out.
const RETRY_MS: u64 = 20;

/// Tries at a file that its last holder removes just then. Each failed one is another vmpatch that came and went.
const OPEN_TRIES_MAX: u32 = 16;

/// More than any holder writes: a pid in decimal.
const HOLDER_LEN_MAX: u64 = 32;

/// The right to work on a domain. It is free again when this is dropped, or its process has ended, and every process
/// that inherited [`DomainLock::descriptor`] has ended as well.
///
/// The file stays: were it removed here, the next one could lock a new file while such a process is still at work. The
/// files of QEMUs that have ended are removed by whoever takes a lock next.
#[derive(Debug)]
pub struct DomainLock {
    /// Holds the lock: it ends when the last copy of this descriptor is closed.
    file: File,
    /// The process's own file; None where the host does not show it.
    process: Option<File>,
    path: PathBuf,
    /// The process, and when it started.
    of: (i32, u64),
}

/// Why a domain could not be locked.
#[derive(Debug, Error)]
pub enum LockError {
    /// The QEMU process is gone, or can't be looked at.
    #[error("the QEMU process {pid} could not be looked at, to lock it")]
    Process {
        /// The process.
        pid: i32,
        /// What /proc said; `NotFound` where it has ended.
        #[source]
        cause: io::Error,
    },
    /// Another vmpatch has it.
    #[error("another vmpatch{} is at work on the QEMU process {pid}", holder.map(|pid| format!(" (pid {pid})")).unwrap_or_default())]
    Held {
        /// The QEMU process.
        pid: i32,
        /// The other vmpatch, where it has said so yet.
        holder: Option<i32>,
    },
    /// The folder of the locks can't be made or looked at.
    #[error("the folder for locks {} could not be used", path.display())]
    Folder {
        /// The folder.
        path: PathBuf,
        /// Why.
        #[source]
        cause: io::Error,
    },
    /// Others could tamper with the locks.
    #[error("the folder for locks {} is not safe: {found}, but a folder of user {uid} that nobody else may write to is needed; remove it", path.display())]
    Unsafe {
        /// The folder.
        path: PathBuf,
        /// What it is.
        found: String,
        /// The user whom it should belong to.
        uid: u32,
    },
    /// The domain was only to be read.
    #[error("the QEMU process {pid} was not locked, as its guest was only to be read")]
    NotTaken {
        /// The QEMU process.
        pid: i32,
    },
    /// The lock's file can't be opened or locked.
    #[error("the lock {} could not be taken", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        cause: io::Error,
    },
}

impl LockError {
    /// True where it is the host that has no place for locks: nobody is known to be at work on the domain.
    pub fn is_for_want_of_a_place(&self) -> bool {
        matches!(self, Self::Folder { .. } | Self::Unsafe { .. } | Self::File { .. })
    }
}

impl DomainLock {
    /// Locks the domain of the QEMU process `pid`.
    ///
    /// Errors: [`LockError::Held`] at once where another vmpatch has it.
    pub fn acquire(pid: i32) -> Result<Self, LockError> {
        Self::acquire_within(pid, Duration::ZERO)
    }

    /// Locks the domain of the QEMU process `pid`; where another vmpatch has it, waits for as long as `within`.
    ///
    /// Errors: [`LockError::Held`] when the time is over. One that holds the lock itself waits in vain.
    pub fn acquire_within(pid: i32, within: Duration) -> Result<Self, LockError> {
        let start_time = process::start_time(pid).map_err(|cause| LockError::Process { pid, cause })?;
        let folder = run_folder()?;
        // Another process may get this pid once QEMU has ended.
        let path = folder.join(file_name(pid, start_time));
        sweep(&folder);
        let end = Instant::now() + within;
        loop {
            match Self::take((pid, start_time), &path) {
                Err(LockError::Held { .. }) if Instant::now() < end => sleep(Duration::from_millis(RETRY_MS)),
                other => return other,
            }
        }
    }

    fn take(of: (i32, u64), path: &Path) -> Result<Self, LockError> {
        let (pid, _) = of;
        let failed = |cause| LockError::File {
            path: path.to_owned(),
            cause,
        };
        for _ in 0..OPEN_TRIES_MAX {
            let mut file = open(path).map_err(failed)?;
            match file.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => {
                    return Err(LockError::Held {
                        pid,
                        holder: read_holder(file),
                    });
                }
                Err(TryLockError::Error(cause)) => return Err(failed(cause)),
            }
            // Locked, but somebody has removed it meanwhile: the others lock the file that is there now.
            if !is_at(&file, path).map_err(failed)? {
                continue;
            }
            let process = match process_file(pid) {
                Some(process) => match process.try_lock() {
                    Err(TryLockError::WouldBlock) => return Err(LockError::Held { pid, holder: None }),
                    locked => locked.is_ok().then_some(process),
                },
                None => None,
            };
            // For messages only: a disk without room for it is no reason to stop.
            let _ = file.set_len(0).and_then(|()| writeln!(file, "{}", std::process::id()));
            return Ok(Self {
                file,
                process,
                path: path.to_owned(),
                of,
            });
        }
        Err(LockError::Held { pid, holder: None })
    }

    /// A descriptor for a child process to inherit: the lock is held until both are closed.
    pub fn descriptor(&self) -> io::Result<OwnedFd> {
        Ok(self.file.try_clone()?.into())
    }

    /// Has `child` inherit the lock of the process's own file, too, where there is one. No other child that is started meanwhile does.
    pub fn bequeath(&self, child: &mut Command) -> io::Result<()> {
        let Some(process) = &self.process else { return Ok(()) };
        let copy = process.try_clone()?;
        // SAFETY: fcntl(2) may be called between fork and exec. The descriptor is open there, as the closure owns it.
        unsafe {
            child.pre_exec(move || {
                fcntl(&copy, FcntlArg::F_SETFD(FdFlag::empty()))?;
                Ok(())
            });
        }
        Ok(())
    }

    /// The QEMU process, and when it started, in clock ticks since the host's boot: both say which process it is for good.
    pub(crate) fn process(&self) -> (i32, u64) {
        self.of
    }

    /// The lock's file, with the holder's pid in it.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// A file of the process in /proc that can be opened by those alone who may read its memory. Others could hold a lock on it to be in the
/// way.
fn process_file(pid: i32) -> Option<File> {
    File::open(format!("/proc/{pid}/maps")).ok()
}

/// Removes the files of processes that have ended. Whatever can't be removed does no harm.
fn sweep(folder: &Path) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        let name = path.file_name().and_then(OsStr::to_str).unwrap_or_default();
        let Some((pid, start_time)) = parse_file_name(name) else {
            continue;
        };
        let alive = process::start_time(pid).is_ok_and(|found| found == start_time);
        // A lock that is held says that this one does not see all processes.
        if !alive && open(&path).is_ok_and(|file| file.try_lock().is_ok()) {
            let _ = fs::remove_file(&path);
        }
    }
}

fn file_name(pid: i32, start_time: u64) -> String {
    format!("{pid}-{start_time}.lock")
}

fn parse_file_name(name: &str) -> Option<(i32, u64)> {
    let (pid, start_time) = name.strip_suffix(".lock")?.split_once('-')?;
    Some((pid.parse().ok()?, start_time.parse().ok()?))
}

fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path)
}

fn is_at(file: &File, path: &Path) -> io::Result<bool> {
    let own = file.metadata()?;
    match fs::symlink_metadata(path) {
        Ok(found) => Ok((own.dev(), own.ino()) == (found.dev(), found.ino())),
        Err(cause) if cause.kind() == ErrorKind::NotFound => Ok(false),
        Err(cause) => Err(cause),
    }
}

/// None for a holder that has not written its pid yet.
fn read_holder(file: File) -> Option<i32> {
    let mut text = String::new();
    file.take(HOLDER_LEN_MAX).read_to_string(&mut text).ok()?;
    text.strip_suffix('\n')?.parse().ok()
}

/// The folder of the locks, made where there is none; only this user can enter it.
pub(crate) fn run_folder() -> Result<PathBuf, LockError> {
    // The owner of a process's own folder in /proc is its effective user.
    let own = PathBuf::from("/proc/self");
    let uid = fs::metadata(&own)
        .map_err(|cause| LockError::Folder { path: own, cause })?
        .uid();
    let path = folder_for(uid, env::var_os("XDG_RUNTIME_DIR").as_deref());
    make_folder(&path, uid)?;
    Ok(path)
}

/// Where a user's locks are.
fn folder_for(uid: u32, runtime: Option<&OsStr>) -> PathBuf {
    if uid == 0 {
        return PathBuf::from("/run/vmpatch");
    }
    match runtime
        .map(Path::new)
        .filter(|path| path.is_absolute() && path.is_dir())
    {
        Some(runtime) => runtime.join("vmpatch"),
        None => PathBuf::from(format!("/tmp/vmpatch-{uid}")),
    }
}

/// Makes the folder, or makes sure that the one that is there can be trusted: in /tmp anyone may have made it.
fn make_folder(path: &Path, uid: u32) -> Result<(), LockError> {
    let failed = |cause| LockError::Folder {
        path: path.to_owned(),
        cause,
    };
    match DirBuilder::new().mode(0o700).create(path) {
        Err(cause) if cause.kind() != ErrorKind::AlreadyExists => return Err(failed(cause)),
        _ => {}
    }
    let found = fs::symlink_metadata(path).map_err(failed)?;
    let problem = if !found.is_dir() {
        Some("not a folder".to_owned())
    } else if found.uid() != uid {
        Some(format!("it belongs to user {}", found.uid()))
    } else if found.mode() & 0o022 != 0 {
        Some(format!("others may write to it (mode {:o})", found.mode() & 0o7777))
    } else {
        None
    };
    match problem {
        Some(found) => Err(LockError::Unsafe {
            path: path.to_owned(),
            found,
            uid,
        }),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests;
