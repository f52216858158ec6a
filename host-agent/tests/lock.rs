//! The lock of a domain, between processes.

use host_agent::lock::{DomainLock, LockError};
use std::env;
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// In the environment of a child: the pid that it shall lock.
const TO_LOCK: &str = "VMPATCH_TEST_TO_LOCK";
/// For the kernel to take a dead process's lock back.
const RELEASE_TIMEOUT_S: u64 = 10;

/// Not a test by itself: what [`a_killed_holder_leaves_no_lock`] runs in another process.
#[test]
#[ignore = "run by another test, in a process of its own"]
fn hold_a_lock_until_killed() {
    let pid = env::var(TO_LOCK).unwrap().parse().unwrap();
    let _lock = DomainLock::acquire(pid).unwrap();
    println!("\nlocked");
    loop {
        std::thread::park();
    }
}

/// A child, ended when the test is over.
struct Process(Child);

impl Process {
    fn pid(&self) -> i32 {
        i32::try_from(self.0.id()).unwrap()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // The test may have ended it already.
        let _ = self.0.kill();
        self.0.wait().unwrap();
    }
}

#[test]
fn a_killed_holder_leaves_no_lock() {
    let target = Process(Command::new("sleep").arg("600").spawn().unwrap());
    let mut holder = Command::new(env::current_exe().unwrap());
    holder.args(["--ignored", "--exact", "--nocapture", "hold_a_lock_until_killed"]);
    holder.env(TO_LOCK, target.pid().to_string()).stdout(Stdio::piped());
    let mut holder = Process(holder.spawn().unwrap());
    let mut lines = BufReader::new(holder.0.stdout.take().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap() == "locked"));

    let error = DomainLock::acquire(target.pid()).unwrap_err();
    assert!(
        matches!(error, LockError::Held { holder: Some(pid), .. } if pid == holder.pid()),
        "{error}"
    );
    assert_eq!(
        error.to_string(),
        format!(
            "another vmpatch (pid {}) is at work on the QEMU process {}",
            holder.pid(),
            target.pid()
        )
    );
    // SIGKILL: nothing of its own runs any more.
    holder.0.kill().unwrap();
    holder.0.wait().unwrap();
    let lock = DomainLock::acquire_within(target.pid(), Duration::from_secs(RELEASE_TIMEOUT_S)).unwrap();
    assert_eq!(
        std::fs::read_to_string(lock.path()).unwrap(),
        format!("{}\n", std::process::id())
    );
}
