//! From the address that a process was given to a path at which this process can connect.

use super::address::QmpAddress;
use super::command_line::{CommandLine, Monitor};
use super::names;
use super::process::proc_path;
use nix::libc::O_NONBLOCK;
use std::ffi::{OsStr, OsString};
use std::fs::{self, OpenOptions};
use std::io::Read;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// The longest configuration file read, in bytes. Incus's, the longest ones known, have some 20 kB.
const CONFIG_LEN_MAX: u64 = 1 << 20;

/// The room for a path in a socket address (`sun_path`, `unix(7)`), and for its closing zero byte.
const SUN_PATH_LEN: usize = 108;

/// A QMP monitor of a domain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QmpSocket {
    /// Where it is, as the command line says.
    pub address: QmpAddress,
    /// Whether it is the one through which libvirt runs the guest: libvirt holds it always.
    pub libvirt: bool,
    /// Whether it spreads each message over several lines (`-qmp-pretty`).
    pub pretty: bool,
    /// What to connect to from here: a path in this process's namespace, or a zero byte and an abstract name. None
    /// where there is no such thing.
    pub path: Option<PathBuf>,
}

impl QmpSocket {
    /// What to connect to, unless libvirt holds it anyway.
    pub fn usable(&self) -> Option<&Path> {
        self.path.as_deref().filter(|_| !self.libvirt)
    }

    /// Whether connecting to `path` reaches this socket.
    pub fn is_at(&self, path: &Path) -> bool {
        let Some(own) = &self.path else { return false };
        let identity = |path: &Path| fs::metadata(path).ok().map(|found| (found.dev(), found.ino()));
        own == path || identity(own).is_some_and(|found| identity(path) == Some(found))
    }
}

/// The monitors that `line` tells of, in a process that is at `place`.
pub(super) fn sockets(place: &Place, line: &CommandLine) -> Vec<QmpSocket> {
    let socket = |monitor: &Monitor| QmpSocket {
        address: monitor.address.clone(),
        libvirt: monitor.libvirt,
        pretty: monitor.pretty,
        path: place.reach(&monitor.address),
    };
    line.monitors.iter().map(socket).collect()
}

/// From where a process's paths are to be read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Place {
    pid: i32,
    /// Whether its absolute paths mean here what they mean there.
    same_root: bool,
    /// The folder of its relative paths, as a path in its own namespace.
    folder: Option<PathBuf>,
    /// Whether that folder is still its working folder.
    folder_is_current: bool,
}

impl Place {
    /// Of the running process `pid`, whose command line is `line`.
    pub(super) fn of(pid: i32, line: &CommandLine) -> Self {
        let current = || fs::read_link(proc_path(pid, "cwd")).ok();
        // A daemon left the folder where it was started; its environment still names it.
        let start = || {
            fs::read(proc_path(pid, "environ"))
                .ok()
                .and_then(|environ| start_folder(&environ))
        };
        Self {
            pid,
            same_root: has_same_root(pid, line.chrooted),
            folder: if line.daemonized { start() } else { current() },
            folder_is_current: !line.daemonized,
        }
    }

    /// The folder of its relative paths, in its own namespace.
    pub(super) fn folder(&self) -> Option<PathBuf> {
        self.folder.clone()
    }

    fn reach(&self, address: &QmpAddress) -> Option<PathBuf> {
        match address {
            QmpAddress::Unix(path) => self.path(path).map(names::current),
            QmpAddress::Abstract { name, tight } => Some(abstract_path(name, *tight)),
            _ => None,
        }
    }

    /// A path of the process as one that leads to the same file from here.
    pub(super) fn path(&self, path: &Path) -> Option<PathBuf> {
        if path.as_os_str().is_empty() {
            return None;
        }
        if path.is_absolute() {
            Some(self.absolute(path))
        } else {
            self.relative(path)
        }
    }

    /// What is in a configuration file of the process at this place. None where it cannot be read, or is no file: a
    /// pipe has been emptied by QEMU, and reading it would wait for ever.
    pub(super) fn read_config(&self, path: &Path) -> Option<Vec<u8>> {
        let open = OpenOptions::new()
            .read(true)
            .custom_flags(O_NONBLOCK)
            .open(self.path(path)?);
        let file = open
            .ok()
            .filter(|file| file.metadata().is_ok_and(|found| found.is_file()))?;
        let mut text = Vec::new();
        file.take(CONFIG_LEN_MAX).read_to_end(&mut text).ok()?;
        Some(text)
    }

    fn absolute(&self, path: &Path) -> PathBuf {
        if self.same_root {
            return path.to_owned();
        }
        let mut seen = proc_path(self.pid, "root").into_os_string();
        seen.push(path);
        PathBuf::from(seen)
    }

    fn relative(&self, path: &Path) -> Option<PathBuf> {
        let full = self.folder.as_ref()?.join(path);
        let fits = full.as_os_str().len() < SUN_PATH_LEN;
        if self.folder_is_current && !(self.same_root && fits) {
            return Some(proc_path(self.pid, "cwd").join(path));
        }
        Some(self.absolute(&full))
    }
}

/// Whether a process sees the same files under the same absolute paths, as far as this one may know: for another
/// user's process yes is the best guess, and connecting tells.
fn has_same_root(pid: i32, chrooted: bool) -> bool {
    let namespace = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/mnt")).ok();
    let root = |path: PathBuf| fs::metadata(path).ok().map(|found| (found.dev(), found.ino()));
    let Some(other) = namespace(&pid.to_string()) else {
        return true;
    };
    if namespace("self").is_some_and(|own| own != other) {
        return false;
    }
    // QEMU's own chroot comes after its sockets were made, so their paths begin at the root before.
    chrooted || root(proc_path(pid, "root")).is_none_or(|other| root(PathBuf::from("/")) == Some(other))
}

/// The folder in which a shell started a process, from the process's environment.
fn start_folder(environ: &[u8]) -> Option<PathBuf> {
    let mut variables = environ.split(|&byte| byte == 0);
    let folder = variables.find_map(|variable| variable.strip_prefix(b"PWD="))?;
    Some(PathBuf::from(OsStr::from_bytes(folder))).filter(|folder| folder.is_absolute())
}

/// An abstract name as a path for `connect`: a zero byte, then the name, which fills the address where it is not tight.
fn abstract_path(name: &[u8], tight: bool) -> PathBuf {
    let mut path = vec![0];
    path.extend_from_slice(name);
    if !tight {
        path.resize(path.len().max(SUN_PATH_LEN), 0);
    }
    PathBuf::from(OsString::from_vec(path))
}

#[cfg(test)]
mod tests {
    use super::{Place, QmpAddress, abstract_path, start_folder};
    use std::os::unix::ffi::OsStrExt;
    use std::path::{Path, PathBuf};

    fn place(same_root: bool, folder: &str, folder_is_current: bool) -> Place {
        let folder = Some(PathBuf::from(folder));
        Place {
            pid: 7,
            same_root,
            folder,
            folder_is_current,
        }
    }

    fn reach(place: &Place, path: &str) -> PathBuf {
        place.reach(&QmpAddress::Unix(PathBuf::from(path))).unwrap()
    }

    #[test]
    fn a_path_of_another_mount_namespace_leads_through_the_process() {
        let inside = place(false, "/var", true);
        assert_eq!(reach(&inside, "/run/q.sock"), Path::new("/proc/7/root/run/q.sock"));
        assert_eq!(reach(&inside, "q.sock"), Path::new("/proc/7/cwd/q.sock"));
        let daemon = place(false, "/var", false);
        assert_eq!(reach(&daemon, "q.sock"), Path::new("/proc/7/root/var/q.sock"));
    }

    #[test]
    fn a_relative_path_begins_at_the_working_folder() {
        assert_eq!(
            reach(&place(true, "/var/lib", true), "q.sock"),
            Path::new("/var/lib/q.sock")
        );
        let deep = format!("/{}", "d".repeat(100));
        assert_eq!(
            reach(&place(true, &deep, true), "long.sock"),
            Path::new("/proc/7/cwd/long.sock")
        );
        let unknown = Place {
            folder: None,
            ..place(true, "/", false)
        };
        assert_eq!(unknown.reach(&QmpAddress::Unix(PathBuf::from("q.sock"))), None);
        assert_eq!(reach(&unknown, "/q.sock"), Path::new("/q.sock"));
    }

    #[test]
    fn the_folder_of_a_daemon_is_the_one_its_shell_named() {
        assert_eq!(
            start_folder(b"HOME=/root\0PWD=/srv/vm\0X=1\0"),
            Some(PathBuf::from("/srv/vm"))
        );
        assert_eq!(start_folder(b"OLDPWD=/srv\0"), None);
        assert_eq!(start_folder(b"PWD=here\0"), None);
    }

    #[test]
    fn an_abstract_name_that_is_not_tight_fills_its_address() {
        assert_eq!(abstract_path(b"vm42", true).as_os_str().as_bytes(), b"\0vm42");
        let padded = abstract_path(b"vm42", false);
        let padded = padded.as_os_str().as_bytes();
        assert_eq!(padded.len(), 108);
        assert!(padded.starts_with(b"\0vm42\0\0") && padded.ends_with(b"\0"));
    }
}
