//! One vmpatch at a time for each domain.
//!
//! The lock is the kernel's (`flock(2)`) on a file of its own for each QEMU process, so that it ends with its holder,
//! however that ends.

use crate::domains::process;
use std::env;
use std::ffi::OsStr;
use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};
use thiserror::Error;

/// Between two tries at a lock that is held, in milliseconds. `flock` itself has no time-out.
const RETRY_MS: u64 = 20;

/// Tries at a file that its last holder removes just then. Each failed one is another vmpatch that came and went.
const OPEN_TRIES_MAX: u32 = 16;

/// More than any holder writes: a pid in decimal.
const HOLDER_LEN_MAX: u64 = 32;

/// The right to work on a domain. Dropped, or with the end of its process, it is free again.
#[derive(Debug)]
pub struct DomainLock {
    /// Holds the lock: it ends when the last copy of this descriptor is closed.
    file: File,
    path: PathBuf,
    /// The process that took it; a copy in a forked child must not remove the file under its holder.
    holder: u32,
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
    /// The lock's file can't be opened, locked or written.
    #[error("the lock {} could not be taken", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        cause: io::Error,
    },
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
        let path = folder.join(format!("{pid}-{start_time}.lock"));
        let end = Instant::now() + within;
        loop {
            match Self::take(pid, &path) {
                Err(LockError::Held { .. }) if Instant::now() < end => sleep(Duration::from_millis(RETRY_MS)),
                other => return other,
            }
        }
    }

    fn take(pid: i32, path: &Path) -> Result<Self, LockError> {
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
            // Locked, but the last holder has removed it meanwhile: the others lock the file that is there now.
            if !is_at(&file, path).map_err(failed)? {
                continue;
            }
            let holder = std::process::id();
            file.set_len(0)
                .and_then(|()| writeln!(file, "{holder}"))
                .map_err(failed)?;
            return Ok(Self {
                file,
                path: path.to_owned(),
                holder,
            });
        }
        Err(LockError::Held { pid, holder: None })
    }

    /// A descriptor for a child process to inherit: the lock is held until both are closed.
    pub fn descriptor(&self) -> io::Result<OwnedFd> {
        Ok(self.file.try_clone()?.into())
    }

    /// The lock's file, in which the holder's pid stands.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for DomainLock {
    fn drop(&mut self) {
        if self.holder == std::process::id() {
            // Removed while it is still locked. A file that stays does no harm, so nothing is to be done on failure.
            let _ = fs::remove_file(&self.path);
        }
    }
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

/// The folder of the locks, made where there is none.
fn run_folder() -> Result<PathBuf, LockError> {
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
mod tests {
    use super::{DomainLock, LockError, folder_for, make_folder};
    use std::ffi::OsStr;
    use std::fs::{self, Permissions};
    use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
    use std::path::{Path, PathBuf};
    use std::process::{Child, Command};
    use std::time::{Duration, Instant};

    /// A process to be locked, ended when the test is over.
    struct Target(Child);

    impl Target {
        fn start() -> Self {
            Self(Command::new("sleep").arg("60").spawn().unwrap())
        }

        fn pid(&self) -> i32 {
            i32::try_from(self.0.id()).unwrap()
        }
    }

    impl Drop for Target {
        fn drop(&mut self) {
            self.0.kill().unwrap();
            self.0.wait().unwrap();
        }
    }

    #[test]
    fn a_lock_is_held_until_it_is_dropped_and_names_its_holder() {
        let target = Target::start();
        let lock = DomainLock::acquire(target.pid()).unwrap();
        let own = i32::try_from(std::process::id()).unwrap();
        let error = DomainLock::acquire(target.pid()).unwrap_err();
        assert!(
            matches!(error, LockError::Held { holder: Some(pid), .. } if pid == own),
            "{error}"
        );
        let path = lock.path().to_owned();
        assert!(path.exists());
        drop(lock);
        assert!(!path.exists(), "nothing stays behind");
        DomainLock::acquire(target.pid()).unwrap();
    }

    #[test]
    fn domains_are_locked_apart() {
        let (one, other) = (Target::start(), Target::start());
        let _one = DomainLock::acquire(one.pid()).unwrap();
        let _other = DomainLock::acquire(other.pid()).unwrap();
    }

    #[test]
    fn waiting_ends_with_the_lock_or_with_the_time() {
        let target = Target::start();
        let pid = target.pid();
        let lock = DomainLock::acquire(pid).unwrap();
        let begun = Instant::now();
        let limit = Duration::from_millis(100);
        let error = DomainLock::acquire_within(pid, limit).unwrap_err();
        assert!(
            matches!(error, LockError::Held { .. }) && begun.elapsed() >= limit,
            "{error}"
        );
        let waiting = std::thread::spawn(move || DomainLock::acquire_within(pid, Duration::from_secs(60)).map(drop));
        std::thread::sleep(limit);
        drop(lock);
        waiting.join().unwrap().unwrap();
    }

    #[test]
    fn a_lock_of_many_is_never_held_by_two() {
        let target = Target::start();
        let pid = target.pid();
        let path = std::env::temp_dir().join(format!("vmpatch-lock-test-{pid}"));
        let work = || {
            for _ in 0..50 {
                let _lock = DomainLock::acquire_within(pid, Duration::from_secs(60)).unwrap();
                // Fails if another one is in here too.
                fs::create_dir(&path).unwrap();
                fs::remove_dir(&path).unwrap();
            }
        };
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(work);
            }
        });
    }

    #[test]
    fn a_process_that_has_ended_cannot_be_locked() {
        // Above the kernel's highest pid (PID_MAX_LIMIT, 2^22).
        let error = DomainLock::acquire(1 << 22).unwrap_err();
        assert!(matches!(error, LockError::Process { .. }), "{error}");
    }

    #[test]
    fn each_user_has_a_folder() {
        let runtime = std::env::temp_dir();
        assert_eq!(folder_for(0, Some(runtime.as_os_str())), Path::new("/run/vmpatch"));
        assert_eq!(folder_for(1000, Some(runtime.as_os_str())), runtime.join("vmpatch"));
        for unset in [None, Some(OsStr::new("run")), Some(OsStr::new("/nowhere/at/all"))] {
            assert_eq!(folder_for(1000, unset), Path::new("/tmp/vmpatch-1000"));
        }
    }

    #[test]
    fn a_folder_that_others_can_change_is_refused() {
        let base = std::env::temp_dir().join(format!("vmpatch-folder-test-{}", std::process::id()));
        fs::create_dir(&base).unwrap();
        let uid = fs::metadata(&base).unwrap().uid();
        let refused = |path: &PathBuf, uid| match make_folder(path, uid) {
            Err(LockError::Unsafe { found, .. }) => found,
            other => panic!("{other:?}"),
        };
        let own = base.join("own");
        make_folder(&own, uid).unwrap();
        assert_eq!(fs::metadata(&own).unwrap().mode() & 0o777, 0o700);
        make_folder(&own, uid).unwrap();
        assert_eq!(refused(&own, uid + 1), format!("it belongs to user {uid}"));
        fs::set_permissions(&own, Permissions::from_mode(0o770)).unwrap();
        assert_eq!(refused(&own, uid), "others may write to it (mode 770)");
        let link = base.join("link");
        symlink("/tmp", &link).unwrap();
        assert_eq!(refused(&link, uid), "not a folder");
        fs::remove_dir_all(&base).unwrap();
    }
}
