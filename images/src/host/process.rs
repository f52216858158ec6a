//! A program on this machine: started so that it can't outlive this one, and ended by its process id.

use std::fs::File;
use std::io;
use std::path::Path;
use std::process::{self, Command, ExitStatus, Stdio};
use std::sync::{Mutex, OnceLock, PoisonError, mpsc};
use std::thread;

use super::Process;

/// A running program of this machine; dropped, it is killed.
#[derive(Debug)]
pub(super) struct Child {
    child: Mutex<process::Child>,
    /// A process that is not this program's child, and has taken the child's place.
    follower: Option<u32>,
    pid: u32,
}

impl Child {
    /// Starts `program`; what it writes goes to `log`.
    pub(super) fn start(program: &Path, args: &[String], log: &Path) -> io::Result<Self> {
        let log = File::create(log)?;
        // The kernel kills QEMU when its parent dies, however that dies. `setpriv` replaces itself by QEMU, so that the
        // process id and the command line are QEMU's own.
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "--"]).arg(program).args(args);
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let child = spawn_in_lasting_thread(command)?;
        Ok(Self {
            pid: child.id(),
            follower: None,
            child: Mutex::new(child),
        })
    }

    /// Kills it and waits for its end.
    fn kill(&self) -> io::Result<ExitStatus> {
        let mut child = self.child.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(pid) = self.follower
            && runs(pid)
        {
            Command::new("kill").args(["-KILL", &pid.to_string()]).status()?;
        }
        child.kill()?;
        child.wait()
    }
}

impl Process for Child {
    fn pid(&self) -> u32 {
        self.pid
    }

    /// That one is killed with the guest, but not where this program is.
    fn follow(&mut self, pid: u32) {
        self.follower = Some(pid);
        self.pid = pid;
    }

    fn ended(&self) -> io::Result<Option<ExitStatus>> {
        if let Some(pid) = self.follower {
            return Ok((!runs(pid)).then(ExitStatus::default));
        }
        self.child.lock().unwrap_or_else(PoisonError::into_inner).try_wait()
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        // Nobody is left to tell about a failure, and the parent's death signal stays in force.
        drop(self.kill());
    }
}

/// Whether that process is a QEMU that has not ended.
fn runs(pid: u32) -> bool {
    let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    String::from_utf8_lossy(&line).contains("qemu-system")
}

type Job = (Command, mpsc::Sender<io::Result<process::Child>>);

/// Starts a program from a thread that lives as long as this program: to the kernel, the parent in "parent death signal"
/// is the starting *thread*, and a test's thread ends before the guest that it shares with other tests.
fn spawn_in_lasting_thread(command: Command) -> io::Result<process::Child> {
    static JOBS: OnceLock<mpsc::Sender<Job>> = OnceLock::new();
    let jobs = JOBS.get_or_init(|| {
        let (sender, receiver) = mpsc::channel::<Job>();
        thread::spawn(move || {
            for (mut command, answer) in receiver {
                // Whoever asked may have gone; then the child is killed with this program.
                drop(answer.send(command.spawn()));
            }
        });
        sender
    });
    let (answer, child) = mpsc::channel();
    let ended = || io::Error::other("the thread that starts programs has ended");
    jobs.send((command, answer)).map_err(|_| ended())?;
    child.recv().map_err(|_| ended())?
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn start(script: &str) -> (Child, std::path::PathBuf) {
        static NUMBER: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let log = std::env::temp_dir().join(format!("vmpatch-process-{}-{number}", std::process::id()));
        (
            Child::start(Path::new("sh"), &["-c".into(), script.into()], &log).unwrap(),
            log,
        )
    }

    #[test]
    fn a_process_outlives_the_thread_that_started_it_and_ends_when_dropped() {
        let (process, log) = thread::spawn(|| start("sleep 100")).join().unwrap();
        assert_eq!(process.wait(Duration::from_millis(100)).unwrap(), None);
        let proc = format!("/proc/{}", process.pid());
        assert!(Path::new(&proc).exists());
        drop(process);
        assert!(!Path::new(&proc).exists());
        std::fs::remove_file(log).unwrap();
    }

    #[test]
    fn what_a_process_writes_is_in_its_log() {
        let (process, log) = start("echo out; echo err >&2; exit 3");
        assert_eq!(process.wait(Duration::from_secs(10)).unwrap().unwrap().code(), Some(3));
        assert_eq!(std::fs::read_to_string(&log).unwrap(), "out\nerr\n");
        std::fs::remove_file(log).unwrap();
    }
}
