//! The new process, from its start until it has the guest or is ended.

use super::descriptor;
use super::error::UpgradeError;
use super::launch::Spec;
use crate::domains::process::{self, proc_path};
use crate::lock;
use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Where programs write their messages.
const STDERR: i32 = 2;
/// Most bytes of the new process's messages that are shown.
const MESSAGES_LEN_MAX: u64 = 2000;
/// How long a process that was killed may take to go: a large guest's memory takes a while to be freed.
const END_TIME_MAX: Duration = Duration::from_secs(60);
/// Between two looks whether it has gone.
const POLL: Duration = Duration::from_millis(2);

/// A process that is to take over a guest.
#[derive(Debug)]
pub(super) struct Successor {
    child: Child,
    /// Its number.
    pub(super) pid: i32,
    log: Log,
}

/// Where it writes its messages.
#[derive(Debug)]
struct Log {
    file: File,
    /// For people.
    path: PathBuf,
    /// The length that it had before.
    start: u64,
}

impl Successor {
    /// Starts it: `vmpatch` is the program that becomes it.
    pub(super) fn start(vmpatch: &Path, spec: &Spec) -> Result<Self, UpgradeError> {
        let log = Log::of(spec.old)?;
        let failed = || UpgradeError::host(format!("starting {}", spec.program.display()));
        let text = serde_json::to_vec(spec).map_err(io::Error::from).map_err(failed())?;
        let mut child = Command::new(vmpatch)
            .arg("launch")
            .stdin(Stdio::piped())
            .stdout(log.file.try_clone().map_err(failed())?)
            .stderr(log.file.try_clone().map_err(failed())?)
            .spawn()
            .map_err(failed())?;
        let told = child.stdin.take().map_or(Ok(()), |mut stdin| stdin.write_all(&text));
        let pid = i32::try_from(child.id()).unwrap_or(i32::MAX);
        let successor = Self { child, pid, log };
        told.map_err(failed())?;
        Ok(successor)
    }

    /// Whether it runs.
    pub(super) fn is_alive(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// That it ended, with what it said, where it does so within that time.
    pub(super) fn end_within(&mut self, within: Duration) -> Option<UpgradeError> {
        let until = Instant::now() + within;
        loop {
            match self.child.try_wait().ok()? {
                Some(status) => {
                    return Some(UpgradeError::Ended {
                        status: status.to_string(),
                        messages: self.messages(),
                    });
                }
                None if Instant::now() >= until => return None,
                None => std::thread::sleep(POLL),
            }
        }
    }

    /// What it has written since it started.
    pub(super) fn messages(&self) -> String {
        let text = self.log.since_start().unwrap_or_default();
        let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
        match lines.as_slice() {
            [] => format!("it said nothing (see {})", self.log.path.display()),
            lines => lines.join("; "),
        }
    }

    /// Ends it and all that it has started.
    pub(super) fn end(&mut self) {
        // `vmpatch launch` makes it lead a group of its own before it becomes another program.
        let _ = killpg(Pid::from_raw(self.pid), Signal::SIGKILL);
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Log {
    /// The old one's, where that is a file, else one of its own. The very descriptor of the old process: what its user may have put in the
    /// place of the file's name is not opened.
    fn of(old: i32) -> Result<Self, UpgradeError> {
        let theirs = descriptor::copies(old, &[STDERR]).unwrap_or_default();
        let theirs = theirs.into_iter().map(|(_, descriptor)| File::from(descriptor));
        let is_file = |file: &File| file.metadata().is_ok_and(|found| found.is_file());
        if let Some(file) = theirs.into_iter().find(is_file) {
            let path = fs::read_link(proc_path(old, "fd/2")).unwrap_or_default();
            return Ok(Self::from(file, path));
        }
        let folder = lock::run_folder()
            .map_err(io::Error::other)
            .map_err(UpgradeError::host("making a log for the new process"))?;
        let path = folder.join(format!("upgrade-{old}.log"));
        let file = OpenOptions::new().append(true).create(true).mode(0o600).open(&path);
        let file = file.map_err(UpgradeError::host(format!("opening {}", path.display())))?;
        Ok(Self::from(file, path))
    }

    fn from(file: File, path: PathBuf) -> Self {
        let start = file.metadata().map_or(0, |found| found.len());
        Self { file, path, start }
    }

    fn since_start(&self) -> io::Result<String> {
        // The same file, opened for reading; its name is not asked.
        let mut file = File::open(format!("/proc/self/fd/{}", self.file.as_raw_fd()))?;
        file.seek(SeekFrom::Start(self.start))?;
        let mut bytes = Vec::new();
        file.take(MESSAGES_LEN_MAX).read_to_end(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }
}

/// Ends the process that `pid` was at `start_time`, and waits until it has gone. By SIGKILL: a QEMU that ends by itself
/// removes its sockets' names, which are the other one's by now; of a guest that has moved it has nothing to save.
pub(super) fn end(pid: i32, start_time: u64) -> io::Result<()> {
    let until = Instant::now() + END_TIME_MAX;
    if process::is_running(pid, start_time) {
        kill(Pid::from_raw(pid), Signal::SIGKILL)?;
    }
    while process::is_running(pid, start_time) {
        if Instant::now() >= until {
            return Err(io::ErrorKind::TimedOut.into());
        }
        std::thread::sleep(POLL);
    }
    Ok(())
}
