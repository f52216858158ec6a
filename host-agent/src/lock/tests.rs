//! Locks within one process, and the folder they are in.
//!
//! Tests that start processes run beside these: for the moment between `fork` and `exec` a child holds every lock that is held then,
//! so a lock that was let go is [`free`] soon, and not at once.

use super::{DomainLock, LockError, file_name, folder_for, make_folder, parse_file_name};
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

/// The lock of a process, once no child holds it any more.
fn free(pid: i32) -> DomainLock {
    DomainLock::acquire_within(pid, Duration::from_secs(60)).unwrap()
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
    drop(lock);
    free(target.pid());
}

#[test]
fn a_lock_is_held_until_its_last_descriptor_is_closed() {
    let target = Target::start();
    let lock = DomainLock::acquire(target.pid()).unwrap();
    let inherited = lock.descriptor().unwrap();
    drop(lock);
    let error = DomainLock::acquire(target.pid()).unwrap_err();
    assert!(matches!(error, LockError::Held { .. }), "{error}");
    drop(inherited);
    free(target.pid());
}

/// As of a vmpatch of root and one of the user whose QEMU it is, or of one user at a terminal and from cron.
#[test]
fn a_lock_excludes_those_who_keep_their_files_in_another_folder() {
    let target = Target::start();
    let [one, other] =
        ["one", "other"].map(|name| std::env::temp_dir().join(format!("vmpatch-lock-{}-{name}", target.pid())));
    let lock = DomainLock::take((target.pid(), 0), &one).unwrap();
    let is_held = || matches!(DomainLock::take((target.pid(), 0), &other), Err(LockError::Held { .. }));
    assert!(is_held());
    let mut command = Command::new("sleep");
    lock.bequeath(&mut command).unwrap();
    let mut child = command.arg("600").spawn().unwrap();
    drop((command, lock));
    assert!(is_held(), "a supervisor still has it");
    child.kill().unwrap();
    child.wait().unwrap();
    let begun = Instant::now();
    while is_held() {
        assert!(begun.elapsed() < Duration::from_secs(60));
    }
    for path in [one, other] {
        fs::remove_file(path).unwrap();
    }
}

#[test]
fn the_lock_of_a_process_that_has_ended_is_removed_by_the_next_one() {
    let (ended, other) = (Target::start(), Target::start());
    let path = DomainLock::acquire(ended.pid()).unwrap().path().to_owned();
    DomainLock::acquire(other.pid()).unwrap();
    assert!(path.exists(), "its process still runs");
    drop(ended);
    let begun = Instant::now();
    // A lock that a child still holds is left to the next one again.
    while path.exists() && begun.elapsed() < Duration::from_secs(60) {
        assert!(free(other.pid()).path().exists());
    }
    assert!(!path.exists());
}

#[test]
fn only_locks_are_read_as_locks() {
    assert_eq!(parse_file_name(&file_name(42, 123)), Some((42, 123)));
    for name in ["42-123", "42.lock", "a-1.lock", "1-b.lock", "1--1.lock", ".lock", ""] {
        assert_eq!(parse_file_name(name), None, "{name}");
    }
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
fn only_a_host_without_a_place_for_locks_is_read_without_one() {
    let path = || PathBuf::from("/run/vmpatch");
    let cause = || std::io::ErrorKind::ReadOnlyFilesystem.into();
    for (error, is_so) in [
        (
            LockError::Folder {
                path: path(),
                cause: cause(),
            },
            true,
        ),
        (
            LockError::File {
                path: path(),
                cause: cause(),
            },
            true,
        ),
        (LockError::Held { pid: 1, holder: None }, false),
        (LockError::Process { pid: 1, cause: cause() }, false),
    ] {
        assert_eq!(error.is_for_want_of_a_place(), is_so, "{error}");
    }
}

/// Its inodes are for locks, and its blocks used up: `/dev/full` is such a file.
#[test]
fn a_lock_is_held_also_where_its_holder_cannot_be_written() {
    let lock = DomainLock::take((1, 0), Path::new("/dev/full"));
    assert!(lock.is_ok(), "{lock:?}");
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
