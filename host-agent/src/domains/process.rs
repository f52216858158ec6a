//! A process, as /proc shows it: `proc_pid_stat(5)`, `proc_pid_cmdline(5)`, `proc_pid_exe(5)`.

use std::fs::{self, File};
use std::io::{self, ErrorKind, Read};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// No command line is longer: the kernel lets all arguments together have at most three quarters of 8 MiB
/// (`fs/exec.c`, Linux 4.13 and later).
const COMMAND_LINE_LEN_MAX: u64 = 6 << 20;

/// Longest /proc/PID/stat: some fifty numbers and a short name.
const STAT_BYTES_MAX: u64 = 4096;

/// Bytes that nearly all files of /proc that are read here fit in.
const PROC_FILE_BYTES: usize = 4096;

/// What /proc adds to the name of a file that is gone, or was replaced by an update.
const DELETED: &[u8] = b" (deleted)";

/// The variable in the environment of a QEMU that vmpatch started to take over a guest: the process that it takes it from, and
/// whether the guest ran, as `PID-START_TIME-running` or `…-paused`.
pub(crate) const MARKER: &str = "VMPATCH_UPGRADE_OF";

/// The variable with that process's tap devices, and how it uses them (`upgrade::tap`).
pub(crate) const TAPS: &str = "VMPATCH_UPGRADE_TAPS";

const RUNNING: &str = "running";
const PAUSED: &str = "paused";

/// The program file of a process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Binary {
    /// Its path, in the process's own mount namespace.
    pub path: PathBuf,
    /// Whether that path no longer names the file that runs: it was deleted, or replaced by a package update.
    pub deleted: bool,
}

/// A running process.
#[derive(Debug, Clone)]
pub(super) struct Process {
    pub(super) pid: i32,
    pub(super) parent: i32,
    /// In clock ticks since the host's boot.
    pub(super) start_time: u64,
    /// The words of its command line.
    pub(super) words: Vec<Vec<u8>>,
    /// None where /proc does not say it: another user's process.
    pub(super) binary: Option<Binary>,
}

/// The fields of /proc/PID/stat that matter here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stat {
    parent: i32,
    start_time: u64,
}

/// True for a process of this process's own user, whose memory /proc shows to root alone: its files there belong to root
/// (`proc(5)`, "dumpable").
pub fn is_undumpable_own(pid: i32) -> bool {
    let maps = PathBuf::from(format!("/proc/{pid}/maps"));
    let owner = |path: &Path| fs::metadata(path).ok().map(|found| found.uid());
    let (own, user) = (owner(Path::new("/proc/self")), user(pid));
    own.is_some() && own == user && own != Some(0) && owner(&maps) == Some(0)
}

/// The user that a process runs as (its effective one).
pub(crate) fn user(pid: i32) -> Option<u32> {
    effective("Uid:", &fs::read_to_string(format!("/proc/{pid}/status")).ok()?)
}

/// The same for its group.
pub(crate) fn group(pid: i32) -> Option<u32> {
    effective("Gid:", &fs::read_to_string(format!("/proc/{pid}/status")).ok()?)
}

/// The second number of that line of /proc/PID/status.
fn effective(name: &str, status: &str) -> Option<u32> {
    let line = status.lines().find_map(|line| line.strip_prefix(name))?;
    line.split_whitespace().nth(1)?.parse().ok()
}

impl Process {
    /// Reads one process. None when it vanished meanwhile, or has no command line (a kernel thread, a zombie).
    pub(super) fn read(pid: i32) -> io::Result<Option<Self>> {
        match Self::read_all(pid) {
            Err(cause) if is_gone(&cause) => Ok(None),
            other => other,
        }
    }

    /// The same for a process that may be a QEMU. None for most others: of a process that is none, as nearly all of a host's, little is
    /// read.
    pub(super) fn read_qemu(pid: i32) -> io::Result<Option<Self>> {
        match Self::may_be_qemu(pid) {
            Ok(true) => Self::read(pid),
            Err(cause) if !is_gone(&cause) => Err(cause),
            _ => Ok(None),
        }
    }

    fn may_be_qemu(pid: i32) -> io::Result<bool> {
        let line = command_line(pid)?;
        if line.is_empty() {
            return Ok(false);
        }
        let called = line.split(|byte| *byte == 0).next().is_some_and(is_qemu_name);
        Ok(called || binary(pid)?.is_some_and(|binary| binary.is_qemu()))
    }

    fn read_all(pid: i32) -> io::Result<Option<Self>> {
        let before = stat(pid)?;
        let line = command_line(pid)?;
        let binary = binary(pid)?;
        // The same number may be another process by now.
        let same = stat(pid)?.start_time == before.start_time;
        Ok((same && !line.is_empty()).then(|| Self {
            pid,
            parent: before.parent,
            start_time: before.start_time,
            words: words(&line),
            binary,
        }))
    }

    /// The process whose guest this one was started to take over, while that one lives, and whether the guest ran.
    pub(super) fn predecessor(&self) -> Option<(i32, bool)> {
        let environment = fs::read(proc_path(self.pid, "environ")).ok()?;
        let (pid, start, was_running) = parse_marker(&environment)?;
        is_running(pid, start).then_some((pid, was_running))
    }

    /// Whether this is QEMU's system emulator, by the name of its file or the one that it was called by (a
    /// distribution's wrapper may rename the file).
    pub(super) fn is_qemu(&self) -> bool {
        let called = self.words.first().is_some_and(|word| is_qemu_name(word));
        called || self.binary.as_ref().is_some_and(Binary::is_qemu)
    }
}

impl Binary {
    fn is_qemu(&self) -> bool {
        is_qemu_name(self.path.as_os_str().as_bytes())
    }

    fn of_link(link: &Path) -> Self {
        let bytes = link.as_os_str().as_bytes();
        let kept = bytes.strip_suffix(DELETED);
        Self {
            path: PathBuf::from(std::ffi::OsStr::from_bytes(kept.unwrap_or(bytes))),
            deleted: kept.is_some(),
        }
    }
}

/// When a process started, in clock ticks since the host's boot: with its pid it names a process for good, as the
/// pid alone does not.
///
/// Errors: no such process (`NotFound`), or it may not be looked at.
pub(crate) fn start_time(pid: i32) -> io::Result<u64> {
    stat(pid).map(|stat| stat.start_time)
}

/// Whether that very process still runs: it has not ended, and is not just waiting for its parent to notice.
pub(crate) fn is_running(pid: i32, start: u64) -> bool {
    let found = Process::read(pid);
    found.is_ok_and(|process| process.is_some_and(|process| process.start_time == start))
}

/// The value of [`MARKER`].
pub(crate) fn marker(pid: i32, start: u64, was_running: bool) -> String {
    format!("{pid}-{start}-{}", if was_running { RUNNING } else { PAUSED })
}

/// A process's tap devices as the vmpatch that started it knew them; nothing where there are none.
pub(crate) fn taps(pid: i32) -> String {
    let environment = fs::read(proc_path(pid, "environ")).unwrap_or_default();
    variable(&environment, TAPS).unwrap_or_default().to_owned()
}

fn variable<'a>(environment: &'a [u8], name: &str) -> Option<&'a str> {
    let mut variables = environment.split(|byte| *byte == 0);
    let value = variables.find_map(|variable| variable.strip_prefix(name.as_bytes())?.strip_prefix(b"="))?;
    str::from_utf8(value).ok()
}

fn parse_marker(environment: &[u8]) -> Option<(i32, u64, bool)> {
    let mut words = variable(environment, MARKER)?.split('-');
    let (pid, start, state) = (words.next()?, words.next()?, words.next()?);
    Some((pid.parse().ok()?, start.parse().ok()?, state == RUNNING))
}

/// The numbers of all processes.
pub(super) fn pids() -> io::Result<Vec<i32>> {
    let mut pids = Vec::new();
    for entry in fs::read_dir("/proc")? {
        pids.extend(entry?.file_name().to_str().and_then(|name| name.parse::<i32>().ok()));
    }
    pids.sort_unstable();
    Ok(pids)
}

/// A file of a process in /proc.
pub(crate) fn proc_path(pid: i32, name: &str) -> PathBuf {
    PathBuf::from(format!("/proc/{pid}/{name}"))
}

/// Whether an error on a file of /proc means that its process is gone.
pub(super) fn is_gone(cause: &io::Error) -> bool {
    cause.kind() == ErrorKind::NotFound || cause.raw_os_error() == Some(nix::errno::Errno::ESRCH as i32)
}

/// Reads a file of /proc, which does not tell its length, up to a number of bytes.
fn read_proc(pid: i32, name: &str, bytes_max: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::with_capacity(PROC_FILE_BYTES);
    File::open(proc_path(pid, name))?
        .take(bytes_max)
        .read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn command_line(pid: i32) -> io::Result<Vec<u8>> {
    read_proc(pid, "cmdline", COMMAND_LINE_LEN_MAX)
}

/// The program of a process. None for another user's.
fn binary(pid: i32) -> io::Result<Option<Binary>> {
    match fs::read_link(proc_path(pid, "exe")) {
        Ok(link) => Ok(Some(Binary::of_link(&link))),
        Err(cause) if cause.kind() == ErrorKind::PermissionDenied => Ok(None),
        Err(cause) => Err(cause),
    }
}

fn stat(pid: i32) -> io::Result<Stat> {
    let text = read_proc(pid, "stat", STAT_BYTES_MAX)?;
    Stat::parse(&text).ok_or_else(|| {
        let text = String::from_utf8_lossy(&text).into_owned();
        io::Error::new(
            ErrorKind::InvalidData,
            format!("/proc/{pid}/stat is not understood: {text}"),
        )
    })
}

impl Stat {
    /// The command's name, in parentheses, may itself hold spaces and parentheses: fields count from the last one.
    fn parse(text: &[u8]) -> Option<Self> {
        let end = text.iter().rposition(|&byte| byte == b')')?;
        let (_, after) = text.split_at_checked(end + 1)?;
        let mut fields = str::from_utf8(after).ok()?.split_ascii_whitespace();
        // The state is field 3, the parent field 4, the start time field 22.
        let parent = fields.nth(1)?.parse().ok()?;
        let start_time = fields.nth(17)?.parse().ok()?;
        Some(Self { parent, start_time })
    }
}

/// Each word ends with a zero byte.
fn words(line: &[u8]) -> Vec<Vec<u8>> {
    let line = line.strip_suffix(b"\0").unwrap_or(line);
    line.split(|&byte| byte == 0).map(<[u8]>::to_vec).collect()
}

fn is_qemu_name(path: &[u8]) -> bool {
    let name = path.rsplit(|&byte| byte == b'/').next().unwrap_or(path);
    name == b"qemu-kvm" || name == b"kvm" || name.starts_with(b"qemu-system-")
}

#[cfg(test)]
mod tests {
    use super::{
        Binary, MARKER, Process, Stat, effective, is_qemu_name, marker, parse_marker, pids, start_time, words,
    };
    use std::path::{Path, PathBuf};

    #[test]
    fn the_user_of_a_process_is_its_effective_one() {
        let status = "Name:\tqemu\nUmask:\t0027\nUid:\t0\t64055\t64055\t64055\nGid:\t0\t103\t103\t103\n";
        assert_eq!(effective("Uid:", status), Some(64055));
        assert_eq!(effective("Uid:", "Name:\tqemu\n"), None);
    }

    #[test]
    fn a_program_is_qemu_by_the_last_part_of_its_path() {
        for name in [
            "/usr/bin/qemu-system-x86_64",
            "qemu-system-aarch64",
            "/usr/libexec/qemu-kvm",
            "kvm",
        ] {
            assert!(is_qemu_name(name.as_bytes()), "{name}");
        }
        for name in [
            "/usr/bin/qemu-img",
            "qemu-nbd",
            "/opt/qemu-system-x86_64/run",
            "mykvm",
            "kvm-spice",
            "",
        ] {
            assert!(!is_qemu_name(name.as_bytes()), "{name}");
        }
    }

    #[test]
    fn a_binary_that_was_replaced_is_marked() {
        let path = PathBuf::from("/usr/bin/qemu-system-x86_64");
        let gone = Binary::of_link(Path::new("/usr/bin/qemu-system-x86_64 (deleted)"));
        assert_eq!(
            gone,
            Binary {
                path: path.clone(),
                deleted: true
            }
        );
        assert_eq!(Binary::of_link(&path), Binary { path, deleted: false });
    }

    #[test]
    fn a_marker_names_a_process_for_good() {
        let environment = format!("A=1\0{MARKER}={}\0", marker(7, 123, true));
        assert_eq!(parse_marker(environment.as_bytes()), Some((7, 123, true)));
        assert_eq!(parse_marker(b"A=1\0"), None);
        assert_eq!(parse_marker(b"VMPATCH_UPGRADE_OF=x\0"), None);
    }

    #[test]
    fn stat_is_read_behind_a_name_full_of_parentheses() {
        let text = b"77 (a) R 1 (x y) S 42 77 77 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 3 0 123456 9 10";
        assert_eq!(
            Stat::parse(text),
            Some(Stat {
                parent: 42,
                start_time: 123456
            })
        );
        assert_eq!(Stat::parse(b"77 (a) S 42"), None);
        assert_eq!(Stat::parse(b"77 (a"), None);
    }

    #[test]
    fn empty_words_of_a_command_line_are_kept() {
        assert_eq!(
            words(b"qemu\0-append\0\0-S\0"),
            [b"qemu".to_vec(), b"-append".to_vec(), vec![], b"-S".to_vec()]
        );
    }

    #[test]
    fn this_very_process_is_read() {
        let pid = i32::try_from(std::process::id()).unwrap();
        assert!(pids().unwrap().contains(&pid));
        let process = Process::read(pid).unwrap().unwrap();
        let exe = std::env::current_exe().unwrap();
        assert_eq!(
            process.binary,
            Some(Binary {
                path: exe,
                deleted: false
            })
        );
        assert_eq!(process.start_time, start_time(pid).unwrap());
        assert!(!process.is_qemu());
    }

    #[test]
    fn a_process_that_is_not_there_is_none() {
        // Above the kernel's highest pid (PID_MAX_LIMIT, 2^22).
        assert!(Process::read(1 << 22).unwrap().is_none());
    }
}
