//! Processes of this host, by their command lines, and signals to them.

use std::fs;
use std::path::Path;

use nix::errno::Errno;
use nix::sys::signal::{self, Signal};
use nix::unistd::Pid;

/// All processes whose arguments, without the program's name, begin with these.
pub fn with_arguments(arguments: &[&str]) -> Vec<u32> {
    all().filter(|pid| has_arguments(*pid, arguments)).collect()
}

/// All processes that this one has started, and that have not been waited for.
pub fn children(parent: u32) -> Vec<u32> {
    let parent_of = |pid: &u32| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The name may hold anything; behind it come the state and the parent (proc(5)).
        stat.rsplit_once(") ")?.1.split(' ').nth(1)?.parse().ok()
    };
    all().filter(|pid| parent_of(pid) == Some(parent)).collect()
}

/// All processes that run this program.
pub fn of_program(program: &Path) -> Vec<u32> {
    all()
        .filter(|pid| fs::read_link(format!("/proc/{pid}/exe")).is_ok_and(|path| path == program))
        .collect()
}

/// What each thread of a process is at, in the kernel's words: for a message about one that hangs.
pub fn threads_at(pid: u32) -> Vec<String> {
    let read = |path: String| fs::read_to_string(path).unwrap_or_default();
    let words = read(format!("/proc/{pid}/cmdline")).replace('\0', " ");
    let threads = fs::read_dir(format!("/proc/{pid}/task"))
        .into_iter()
        .flatten()
        .flatten();
    let at = threads.map(|thread| {
        let own = |file: &str| read(format!("{}/{file}", thread.path().display()));
        let status = own("status");
        let fields = status
            .lines()
            .filter(|line| line.starts_with("State:") || line.starts_with("TracerPid:"));
        let (fields, call, stack) = (fields.collect::<Vec<_>>(), own("syscall"), own("stack"));
        let thread = thread.file_name();
        format!(
            "{pid}/{} ({words}): {fields:?}, system call {call:?}, stack {stack:?}",
            thread.display()
        )
    });
    at.collect()
}

/// The numbers of all processes.
fn all() -> impl Iterator<Item = u32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

/// False for a process that has ended.
fn has_arguments(pid: u32, wanted: &[&str]) -> bool {
    let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let mut words = line.split(|byte| *byte == 0).skip(1);
    wanted.iter().all(|word| words.next() == Some(word.as_bytes()))
}

/// Sends a signal to a process, which may have ended.
///
/// # Panics
///
/// If it is not ours to signal.
pub fn kill(pid: u32, signal: Signal) {
    sent(signal::kill(as_pid(pid), signal));
}

/// Sends a signal to a process group, all of which may have ended.
///
/// # Panics
///
/// If it is not ours to signal.
pub fn kill_group(leader: u32, signal: Signal) {
    sent(signal::killpg(as_pid(leader), signal));
}

/// True for a process that a signal has stopped.
pub fn is_stopped(pid: u32) -> bool {
    // The name may hold anything, a bracket too; the state is behind it (proc(5)).
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let behind = stat.rsplit_once(") ").map(|(_, behind)| behind);
    behind.is_some_and(|behind| behind.starts_with('T'))
}

fn sent(result: nix::Result<()>) {
    assert!(matches!(result, Ok(()) | Err(Errno::ESRCH)), "{result:?}");
}

/// A process as the kernel's interfaces take it.
pub(crate) fn as_pid(pid: u32) -> Pid {
    Pid::from_raw(pid.try_into().expect("the host's pids are small"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};
    use std::time::{Duration, Instant};

    #[test]
    fn a_process_is_found_by_its_arguments_and_ended_by_a_signal() {
        let mut child = Command::new("sleep")
            .arg("86399")
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        // A program that has just been started has no arguments for an instant.
        let start = Instant::now();
        while with_arguments(&["86399"]).is_empty() && start.elapsed() < Duration::from_secs(5) {
            std::thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(with_arguments(&["86399"]), [child.id()]);
        let program = fs::read_link(format!("/proc/{}/exe", child.id())).unwrap();
        assert!(of_program(&program).contains(&child.id()));
        let at = threads_at(child.id()).join("\n");
        assert!(at.contains("86399") && at.contains(r"State:\tS"), "{at}");
        kill(child.id(), Signal::SIGKILL);
        assert_eq!(child.wait().unwrap().code(), None);
        assert_eq!(with_arguments(&["86399"]), [0; 0]);
    }
}
