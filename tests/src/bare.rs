//! The migration that `vmpatch upgrade` makes, without vmpatch: QEMU's own commands and nothing checked. What vmpatch is measured by.

use std::fs::{self, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use images::guest::Guest;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::libc;
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::monitor::Monitor;
use crate::processes;

/// What vmpatch's names end with until the guest has moved; it knows them again on a command line.
const SUFFIX: &str = "~vmpatch";
/// How long anything may take.
const LIMIT: Duration = Duration::from_secs(120);
/// Between two looks.
const POLL: Duration = Duration::from_millis(1);

/// A move that is over.
#[derive(Clone, Copy, Debug)]
pub struct Move {
    /// The new process.
    pub pid: u32,
    /// Between the two QEMUs' STOP and RESUME events.
    pub stood: Duration,
    /// From the new process's start until the guest runs there.
    pub total: Duration,
}

/// Moves the guest, which has a tap device, into another process of that QEMU, and ends the old one.
///
/// # Panics
///
/// If QEMU does not do as told.
pub fn upgrade(guest: &Guest, qemu: &str, way: &str) -> io::Result<Move> {
    let folder = guest.folder();
    let (ram, main) = (folder.join("bare-ram"), folder.join("bare-main"));
    for path in [&ram, &main] {
        drop(fs::remove_file(path));
    }
    let mut old = Monitor::connect(&guest.qmp_path())?;
    let socket = |path: &Path| json!({"transport": "socket", "type": "unix", "path": path});
    let start = Instant::now();
    let mut incoming = vec!["defer".to_owned()];
    if way == "cpr-transfer" {
        incoming.push(json!({"channel-type": "cpr", "addr": socket(&ram)}).to_string());
    }
    let pid = start_new(guest, qemu, &incoming)?;
    set_capabilities(&mut old, way);
    if way == "cpr-transfer" {
        tell(&mut old, "migrate-set-parameters", json!({"mode": "cpr-transfer"}));
        let channels = json!({"channels": [
            {"channel-type": "main", "addr": socket(&main)}, {"channel-type": "cpr", "addr": socket(&ram)},
        ]});
        retry(|| old.call("migrate", channels.clone()).map_err(io::Error::other))?;
    } else {
        tell(
            &mut old,
            "migrate-set-parameters",
            json!({"max-bandwidth": 1_u64 << 40}),
        );
    }
    let mut new = retry(|| Monitor::connect(&temporary(&guest.qmp_path())))?;
    set_capabilities(&mut new, way);
    let uri = json!({"uri": format!("unix:{}", main.display())});
    tell(&mut new, "migrate-incoming", uri.clone());
    if way != "cpr-transfer" {
        tell(&mut old, "migrate", uri);
    }
    let resumed = new
        .time_of_event("RESUME", LIMIT)
        .expect("the guest runs in the new process");
    let total = start.elapsed();
    let stopped = old.time_of_event("STOP", LIMIT).expect("it stood in the old one");
    processes::kill(guest.pid(), Signal::SIGKILL);
    for name in fs::read_dir(&folder)?.flatten().map(|entry| entry.path()) {
        if let Some(own) = name.to_str().and_then(|name| name.strip_suffix(SUFFIX)) {
            fs::rename(&name, own)?;
        }
    }
    let stood = resumed.saturating_sub(stopped);
    Ok(Move { pid, stood, total })
}

/// With the old one's command line: names that are not in its way, and its tap device.
fn start_new(guest: &Guest, qemu: &str, incoming: &[String]) -> io::Result<u32> {
    let line = fs::read_to_string(format!("/proc/{}/cmdline", guest.pid()))?;
    let tap = tap_of(guest.pid())?;
    // The new process inherits it under this number.
    fcntl(&tap, FcntlArg::F_SETFD(FdFlag::empty()))?;
    let log = OpenOptions::new().append(true).open(guest.folder().join("qemu.log"))?;
    let mut command = Command::new(qemu);
    let mut words = line.trim_end_matches('\0').split('\0').skip(1);
    while let Some(word) = words.next() {
        match word {
            "-S" => {}
            "-incoming" => drop(words.next()),
            "-netdev" => {
                words.next();
                command.args([word, &format!("tap,id=net0,fd={}", tap.as_raw_fd())]);
            }
            word => drop(command.arg(renamed(word))),
        }
    }
    for source in incoming {
        command.args(["-incoming", source]);
    }
    let child = command
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()?;
    Ok(child.id())
}

fn renamed(word: &str) -> String {
    let own = word.replace(SUFFIX, "");
    own.replace(".sock", &format!(".sock{SUFFIX}"))
}

fn temporary(path: &Path) -> PathBuf {
    PathBuf::from(format!("{}{SUFFIX}", path.display()))
}

fn tell(monitor: &mut Monitor, command: &str, arguments: Value) {
    monitor
        .call(command, arguments)
        .unwrap_or_else(|error| panic!("{error}"));
}

fn set_capabilities(monitor: &mut Monitor, way: &str) {
    let capability = |name: &str, state: bool| json!({"capability": name, "state": state});
    let wanted = [
        capability("events", true),
        capability("x-ignore-shared", way == "x-ignore-shared"),
    ];
    tell(monitor, "migrate-set-capabilities", json!({"capabilities": wanted}));
}

fn retry<T>(mut work: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    let end = Instant::now() + LIMIT;
    loop {
        match work() {
            Err(_) if Instant::now() < end => sleep(POLL),
            result => return result,
        }
    }
}

/// A copy of the descriptor of a process's tap device.
fn tap_of(pid: u32) -> io::Result<OwnedFd> {
    let is_tap = |path: &Path| fs::read_to_string(path).is_ok_and(|text| text.contains("\niff:"));
    let entries = fs::read_dir(format!("/proc/{pid}/fdinfo"))?.flatten();
    let mut taps = entries.map(|entry| entry.path()).filter(|path| is_tap(path));
    let number: Option<RawFd> = taps.find_map(|path| path.file_name()?.to_str()?.parse().ok());
    let number = number.ok_or_else(|| io::Error::other(format!("process {pid} has no tap device")))?;
    // SAFETY: both system calls take numbers alone and touch no memory; what they return is a new descriptor, or -1.
    let process = owned(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) })?;
    // SAFETY: as above; `process` is open for as long as the call takes.
    owned(unsafe { libc::syscall(libc::SYS_pidfd_getfd, process.as_raw_fd(), number, 0) })
}

fn owned(result: libc::c_long) -> io::Result<OwnedFd> {
    match RawFd::try_from(result) {
        // SAFETY: the kernel has just made this descriptor for the caller, and nobody else knows it.
        Ok(number) if number >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(number) }),
        _ => Err(io::Error::last_os_error()),
    }
}
