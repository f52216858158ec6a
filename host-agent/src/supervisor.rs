//! What makes a SIGKILL of vmpatch harmless: a process of its own that knows what is being changed.
//!
//! The worker starts `vmpatch supervise ROUTE` in a process group of its own, so that Ctrl-C does not reach it, and tells it, line by
//! line as JSON, the [`Journal`] of what it is about to change and whether the guest was running; each line is answered by one
//! byte. When the worker's end of the socket closes with a journal outstanding, the supervisor reaches the guest by
//! itself, ends the commit ([`guest_core::transaction::recovery`] says how), lets the guest run, and tells a worker that is still there what
//! the guest is like. It inherits the domain's lock, so that no other vmpatch comes in between.

use crate::chain::chain;
use crate::domains::process;
use crate::hypervisor::{ChangeGuard, Meaning, Prepared, ReachError, Route, VcpuThreads};
use crate::lock::DomainLock;
use guest_core::commit::{self, CommitError, Effect};
use guest_core::machine::Journal;
use nix::sys::signal::{SigSet, Signal};
use serde::{Deserialize, Serialize};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// How long the supervisor tries to reach the guest after its worker died. QEMU frees the QMP socket within
/// milliseconds; a host that is out of memory or processors takes longer.
const RECOVERY_TIME_MAX: Duration = Duration::from_secs(30);
/// Pause between two tries.
const RECOVERY_WAIT: Duration = Duration::from_millis(10);
/// The same for a hypervisor that lives, and does not answer, or answers somebody else: its guest may be paused, and nobody else would let
/// it run.
const SILENT_TIME_MAX: Duration = Duration::from_secs(24 * 60 * 60);
/// Pause between two tries then.
const SILENT_WAIT: Duration = Duration::from_secs(1);
/// How long the worker waits for an answer.
const ANSWER_TIME_MAX: Duration = Duration::from_secs(10);
/// How long the worker waits for the supervisor's end: longer than that one recovers. Past it, it hangs, and would
/// keep the domain's lock.
const END_TIME_MAX: Duration = Duration::from_secs(60);
/// Pause between two looks whether it has ended.
const END_WAIT: Duration = Duration::from_micros(200);
/// Most bytes of one line: a journal of the largest patch.
const LINE_BYTES_MAX: u64 = 64 << 20;

/// How the supervisor tells what the guest is like.
const EFFECTS: [(u8, Effect); 3] = [
    (b'b', Effect::AsBefore),
    (b'f', Effect::InForce),
    (b'h', Effect::HalfPatched),
];

/// Why a supervisor did not do its work.
#[derive(Debug, thiserror::Error)]
pub enum SuperviseError {
    /// The socket to vmpatch can't be taken over.
    #[error("taking over the socket to vmpatch")]
    Socket(#[source] io::Error),
    /// It can't read what it is told.
    #[error("understanding what vmpatch is about to change")]
    Message(#[source] serde_json::Error),
    /// The guest was not reached.
    #[error("reaching the guest")]
    Reach(#[from] ReachError),
    /// The guest is gone; nothing is left to be taken back.
    #[error("process {pid}, which ran the guest, has ended")]
    Ended {
        /// The process.
        pid: i32,
    },
    /// What was cut off could not be rolled back. The guest runs even so, if it ran.
    #[error("taking back a change that was cut off")]
    Commit(#[source] Box<CommitError>),
}

/// What a supervisor did where nobody else is there any more to say it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Supervised {
    /// The change is complete, and stays.
    Stayed,
    /// The change was rolled back.
    RolledBack,
}

/// One line to the supervisor.
#[derive(Debug, Serialize, Deserialize)]
struct Watch {
    journal: Journal,
    /// The process that runs the guest, and when it started. By the time that the guest is reached, another one may have its place.
    process: (i32, u64),
    /// The guest was running, and is to run again.
    running: bool,
    /// The threads that are stopped for a pause. Without them, the guest is paused through its hypervisor.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    threads: Option<VcpuThreads>,
}

/// The worker's side.
#[derive(Debug)]
pub struct Supervisor {
    /// The process that runs the guest, and when it started.
    process: (i32, u64),
    child: Child,
    socket: UnixStream,
}

impl Supervisor {
    /// Starts `program`, which is `vmpatch`, as supervisor for the guest that `route` leads to.
    pub fn start(program: &Path, route: &Route, lock: &DomainLock) -> io::Result<Self> {
        let (ours, theirs) = UnixStream::pair()?;
        ours.set_read_timeout(Some(ANSWER_TIME_MAX))?;
        let mut command = Command::new(program);
        lock.bequeath(&mut command)?;
        let child = command
            .arg("supervise")
            .arg(route.to_argument())
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            // The lock is held for as long as any descriptor of it is open.
            .stdout(Stdio::from(lock.descriptor()?))
            .stderr(Stdio::inherit())
            .process_group(0)
            .spawn()?;
        Ok(Self {
            process: lock.process(),
            child,
            socket: ours,
        })
    }

    /// Has the supervisor do now what it would do had this process died, and gives how much of the change is in the guest, which
    /// runs again if it was running. None where the supervisor did not get that far.
    ///
    /// Some ways to a guest are for one process at a time: this one must have let go of it ([`disconnect`](crate::hypervisor::Hypervisor::disconnect)).
    pub fn take_over(mut self) -> Option<Effect> {
        let mut answer = [0];
        self.socket.shutdown(Shutdown::Write).ok()?;
        self.socket.set_read_timeout(Some(END_TIME_MAX)).ok()?;
        self.socket.read_exact(&mut answer).ok()?;
        EFFECTS
            .into_iter()
            .find_map(|(byte, effect)| (answer == [byte]).then_some(effect))
    }

    fn tell(&mut self, watch: &Option<Watch>) -> io::Result<()> {
        let mut line = serde_json::to_vec(watch)?;
        line.push(b'\n');
        self.socket.write_all(&line)?;
        self.socket.read_exact(&mut [0])
    }
}

impl ChangeGuard for Supervisor {
    fn watch(&mut self, journal: &Journal, prepared: &Prepared) -> io::Result<()> {
        self.tell(&Some(Watch {
            journal: journal.clone(),
            process: self.process,
            running: prepared.running,
            threads: prepared.threads.clone(),
        }))
    }

    fn release(&mut self) -> io::Result<()> {
        self.tell(&None)
    }
}

impl Drop for Supervisor {
    fn drop(&mut self) {
        // It ends when it sees the socket closed.
        let _ = self.socket.shutdown(Shutdown::Both);
        // Where it has something to recover, it waits for what this process has of the guest, which goes when the panic goes on.
        if std::thread::panicking() {
            return;
        }
        let end = Instant::now() + END_TIME_MAX;
        while matches!(self.child.try_wait(), Ok(None)) {
            if Instant::now() >= end {
                let _ = self.child.kill();
                return;
            }
            std::thread::sleep(END_WAIT);
        }
    }
}

/// The supervisor's side: `vmpatch supervise ROUTE`, with the worker's socket as standard input. Gives what there is to
/// say, if anything.
///
/// # Errors
///
/// See [`SuperviseError`].
pub fn supervise(route: &Route) -> Result<Option<Supervised>, SuperviseError> {
    ignore_requests_to_end();
    let stdin = io::stdin();
    let mut answers = UnixStream::from(stdin_descriptor().map_err(SuperviseError::Socket)?);
    let mut lines = BufReader::new(stdin.lock());
    let mut watch: Option<Watch> = None;
    loop {
        let mut line = Vec::new();
        let read = (&mut lines).take(LINE_BYTES_MAX).read_until(b'\n', &mut line);
        // A line that was cut off was not answered, so the worker has not begun what it tells of.
        if !matches!(read, Ok(len) if len > 0) || line.last() != Some(&b'\n') {
            break;
        }
        watch = serde_json::from_slice(&line).map_err(SuperviseError::Message)?;
        if answers.write_all(b".").is_err() {
            break;
        }
    }
    let Some(watch) = watch else { return Ok(None) };
    let result = recover(route, &watch);
    let effect = match &result {
        Ok(true) => Effect::InForce,
        Ok(false) => Effect::AsBefore,
        // It was resumed even so.
        Err(SuperviseError::Commit(_)) => Effect::HalfPatched,
        Err(_) => return result.map(|_| None),
    };
    let byte = EFFECTS.iter().find_map(|(byte, of)| (*of == effect).then_some(*byte));
    let is_told = byte.is_some_and(|byte| answers.write_all(&[byte]).is_ok());
    // Whoever was told says it.
    if is_told {
        return Ok(None);
    }
    result.map(|stayed| {
        Some(match stayed {
            true => Supervised::Stayed,
            false => Supervised::RolledBack,
        })
    })
}

/// Whoever ends all processes of a service, or hangs up a terminal, means the worker; the supervisor ends behind it by itself.
pub(crate) fn ignore_requests_to_end() {
    let requests = SigSet::from_iter([Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP, Signal::SIGQUIT]);
    // Without it the supervisor works as well, as long as nobody signals it.
    let _ = requests.thread_block();
}

fn stdin_descriptor() -> io::Result<OwnedFd> {
    use std::os::fd::AsFd;
    io::stdin().as_fd().try_clone_to_owned()
}

/// Gives true where the change is complete and stays.
fn recover(route: &Route, watch: &Watch) -> Result<bool, SuperviseError> {
    // These threads run again already.
    if let Some(threads) = &watch.threads {
        match threads.end(&watch.journal) {
            Ok(is_complete) => return Ok(is_complete),
            Err(error) => tracing::debug!("{}", chain(&error).join(": ")),
        }
    }
    let start = Instant::now();
    let mut is_told = false;
    loop {
        let error = match roll_back(route, watch) {
            Err(SuperviseError::Reach(error)) => error,
            result => return result,
        };
        let Some(wait) = wait_after(error.meaning(), start.elapsed()) else {
            return Err(error.into());
        };
        if wait == SILENT_WAIT && !std::mem::replace(&mut is_told, true) {
            tracing::warn!(
                "vmpatch was killed, and the guest may be paused; it is tried on to reach it: {}",
                chain(&error).join(": ")
            );
        }
        std::thread::sleep(wait);
    }
}

/// How long to wait before the guest is tried to be reached again, after that time; None where that would be in vain.
fn wait_after(meaning: Meaning, tried: Duration) -> Option<Duration> {
    if tried < RECOVERY_TIME_MAX {
        return Some(RECOVERY_WAIT);
    }
    (meaning == Meaning::MayPass && tried < SILENT_TIME_MAX).then_some(SILENT_WAIT)
}

fn roll_back(route: &Route, watch: &Watch) -> Result<bool, SuperviseError> {
    let (pid, start_time) = watch.process;
    let is_running = || process::is_running(pid, start_time);
    if !is_running() {
        return Err(SuperviseError::Ended { pid });
    }
    let vm = route.open()?;
    if vm.identity().pid != pid || !is_running() {
        return Err(SuperviseError::Ended { pid });
    }
    let mut guest = vm.take_over()?;
    let has_run = watch.threads.is_some() || guest.has_run();
    let result = commit::roll_back(vm.memory(), guest.as_mut(), &watch.journal, has_run);
    if watch.running {
        guest
            .resume()
            .map_err(|error| ReachError::new(Meaning::MayPass, error))?;
    }
    result.map_err(|source| SuperviseError::Commit(Box::new(source)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::PermissionsExt;
    use std::panic::{AssertUnwindSafe, catch_unwind};

    /// A QEMU that was started in its place may be paused for a reason, and holds other memory.
    #[test]
    fn a_guest_whose_process_has_ended_is_not_looked_for_in_the_next_one() {
        let pid = std::process::id().cast_signed();
        let own = process::start_time(pid).unwrap();
        let recovered = |start_time| {
            let watch = Watch {
                journal: Journal::default(),
                process: (pid, start_time),
                running: true,
                threads: None,
            };
            roll_back(&Route::qmp("/none/here".into()), &watch).unwrap_err()
        };
        assert!(matches!(recovered(own), SuperviseError::Reach(_)));
        assert!(matches!(recovered(own - 1), SuperviseError::Ended { .. }));
    }

    #[test]
    fn a_guest_whose_hypervisor_lives_is_not_given_up() {
        let late = RECOVERY_TIME_MAX;
        for meaning in [Meaning::MayPass, Meaning::Gone, Meaning::Permanent] {
            assert_eq!(wait_after(meaning, Duration::ZERO), Some(RECOVERY_WAIT));
            let goes_on = (meaning == Meaning::MayPass).then_some(SILENT_WAIT);
            assert_eq!(wait_after(meaning, late), goes_on, "{meaning:?}");
        }
        assert_eq!(wait_after(Meaning::MayPass, SILENT_TIME_MAX), None);
    }

    /// QEMU's socket is for one process at a time: a worker that waits here keeps the supervisor from the guest.
    #[test]
    fn a_worker_that_panics_does_not_wait_for_its_supervisor() {
        let program = std::env::temp_dir().join(format!("vmpatch-supervisor-{}", std::process::id()));
        fs::write(&program, "#!/bin/sh\nexec sleep 15\n").unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o700)).unwrap();
        let lock = DomainLock::acquire(std::process::id().cast_signed()).unwrap();
        let supervisor = Supervisor::start(&program, &Route::qmp("/none".into()), &lock).unwrap();
        let began = Instant::now();
        let panicked = catch_unwind(AssertUnwindSafe(|| {
            let _supervisor = supervisor;
            panic!("in the pause");
        }));
        assert!(panicked.is_err() && began.elapsed() < Duration::from_secs(10));
        fs::remove_file(&program).unwrap();
    }
}
