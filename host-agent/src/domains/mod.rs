//! Finding domains: the QEMU processes of this host, their names, and where their QMP sockets are.
//!
//! All that is known comes from /proc, so a domain is found whoever started it. What a process was told on its command
//! line may not be so any more; that the process at a socket's other end is the one meant is for the one who connects
//! to check (`qmp::Client::peer_pid`).

mod address;
pub(crate) mod command_line;
mod config;
mod error;
mod kvm_guest;
pub(crate) mod names;
pub(crate) mod params;
pub(crate) mod process;
mod socket;
mod uuid;

pub use address::QmpAddress;
pub use error::DomainError;
pub use kvm_guest::{KvmGuest, KvmGuests};
pub use process::{Binary, is_undumpable_own};
pub use socket::QmpSocket;
pub use uuid::{Uuid, UuidError};

use command_line::CommandLine;
use process::Process;
use socket::Place;
use std::fmt;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

/// A running QEMU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Domain {
    /// The guest's name (`-name`).
    pub name: Option<String>,
    /// The guest's UUID (`-uuid`), as spelled on the command line.
    pub uuid: Option<String>,
    /// The process.
    pub pid: i32,
    /// When the process started, in clock ticks since the host's boot: another process may get its pid later.
    pub start_time: u64,
    /// The program. None where another user's process does not show it.
    pub binary: Option<Binary>,
    /// Its QMP monitors, in the order of the command line.
    pub qmp: Vec<QmpSocket>,
    /// Files with more of its options (`-readconfig`) that could not be read: it may have monitors, or a name, that
    /// are not known.
    pub unread: Vec<PathBuf>,
}

impl Domain {
    /// Whether libvirt runs it.
    pub fn is_libvirts(&self) -> bool {
        self.qmp.iter().any(|socket| socket.libvirt)
    }

    /// What to connect to for QMP, in the order of the command line, but pretty ones last; libvirt's own is left out.
    pub fn qmp_paths(&self) -> impl Iterator<Item = &Path> {
        let (pretty, plain): (Vec<_>, Vec<_>) = self.qmp.iter().partition(|socket| socket.pretty);
        plain.into_iter().chain(pretty).filter_map(QmpSocket::usable)
    }

    /// What to connect to for QMP: the first of [`Domain::qmp_paths`].
    ///
    /// Errors: there is none ([`DomainError::NoQmpSocket`], [`DomainError::OnlyLibvirts`]).
    pub fn qmp_socket(&self) -> Result<PathBuf, DomainError> {
        let first = self.qmp_paths().next();
        first.map(Path::to_owned).ok_or_else(|| DomainError::no_socket(self))
    }

    /// Where vmpatch reaches its monitor: at the first of [`Domain::qmp_paths`], else through libvirt, where that runs the guest.
    ///
    /// Errors: there is neither ([`DomainError::NoQmpSocket`], [`DomainError::OnlyLibvirts`]).
    pub fn monitor(&self) -> Result<MonitorPlace, DomainError> {
        match self.qmp_socket() {
            Ok(socket) => Ok(MonitorPlace::Socket(socket)),
            Err(error @ DomainError::OnlyLibvirts { .. }) => {
                let uuid = self.uuid.as_deref().and_then(|uuid| uuid.parse().ok());
                uuid.map(MonitorPlace::Libvirt).ok_or(error)
            }
            Err(error) => Err(error),
        }
    }

    /// The domain of the process `pid`, found at the other end (`qmp::Client::peer_pid`) of the QMP socket `path`;
    /// that socket comes first in [`Domain::qmp`].
    ///
    /// Errors: [`DomainError::Peer`].
    pub fn of_peer(pid: i32, path: &Path) -> Result<Self, DomainError> {
        let failed = |cause| DomainError::Peer {
            pid,
            path: path.to_owned(),
            cause,
        };
        let gone = || io::Error::new(ErrorKind::NotFound, "the process has ended");
        let process = Process::read(pid).map_err(failed)?.ok_or_else(|| failed(gone()))?;
        let mut domain = Self::of_process(process);
        domain.qmp.retain(|socket| !socket.is_at(path));
        let given = QmpSocket {
            address: QmpAddress::Unix(path.to_owned()),
            libvirt: false,
            pretty: false,
            path: Some(path.to_owned()),
        };
        domain.qmp.insert(0, given);
        Ok(domain)
    }

    fn of_process(process: Process) -> Self {
        let parse = |read_config: &dyn Fn(&Path) -> Option<Vec<u8>>| {
            CommandLine::parse(process.words.iter().map(Vec::as_slice), read_config)
        };
        // Where the process's files are must be known before they are read.
        let mut line = parse(&|_| None);
        let place = Place::of(process.pid, &line);
        let configs: Vec<_> = line
            .configs
            .iter()
            .map(|path| (path.clone(), place.read_config(path)))
            .collect();
        if !configs.is_empty() {
            line = parse(&|path| configs.iter().find(|(known, _)| known == path)?.1.clone());
        }
        let unread = configs.into_iter().filter(|(_, text)| text.is_none());
        Self {
            qmp: socket::sockets(&place, &line),
            name: line.name,
            uuid: line.uuid,
            pid: process.pid,
            start_time: process.start_time,
            binary: process.binary,
            unread: unread.map(|(path, _)| path).collect(),
        }
    }
}

/// Where vmpatch reaches a domain's monitor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MonitorPlace {
    /// At a QMP socket.
    Socket(PathBuf),
    /// Through libvirt, which knows the guest by this UUID.
    Libvirt(Uuid),
}

impl fmt::Display for Domain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.name {
            Some(name) => write!(f, "domain `{name}` (pid {})", self.pid),
            None => write!(f, "the domain without a name (pid {})", self.pid),
        }
    }
}

/// A process that is to take over a guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Successor {
    /// The process that has, or had, the guest.
    pub old: i32,
    /// Whether the guest ran when this one was started.
    pub was_running: bool,
    /// The process itself.
    pub domain: Domain,
}

/// The domains of this host at one time.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Domains {
    /// Those found, by rising pid.
    pub found: Vec<Domain>,
    /// Processes that were started to take over the guest of one of them, which still lives.
    pub successors: Vec<Successor>,
    /// How many processes could not be looked at, because they are other users' (/proc mounted with `hidepid=1`).
    pub unreadable: usize,
    /// Whether there may be processes of other users that do not even show (`hidepid=2` or `4`).
    pub hidden: bool,
}

impl Domains {
    /// Those found, by rising pid.
    pub fn iter(&self) -> impl Iterator<Item = &Domain> {
        self.found.iter()
    }

    /// The one domain of that name, or of that UUID where none has the name, with a monitor that can be reached.
    ///
    /// Errors: see [`find`].
    pub fn find(&self, name: &str) -> Result<Domain, DomainError> {
        let named = |domain: &&Domain| domain.name.as_deref() == Some(name);
        let mut found: Vec<Domain> = self.found.iter().filter(named).cloned().collect();
        if let (true, Ok(uuid)) = (found.is_empty(), name.parse::<Uuid>()) {
            let is_it = |domain: &&Domain| domain.uuid.as_deref().and_then(|own| own.parse().ok()) == Some(uuid);
            found = self.found.iter().filter(is_it).cloned().collect();
        }
        match found.as_slice() {
            [] => Err(DomainError::none_of_that_name(name, self)),
            [domain] => domain.monitor().map(|_| domain.clone()),
            several => Err(DomainError::several_of_that_name(name, several)),
        }
    }

    /// The process that is to take over the guest of the process `pid`.
    pub fn successor_of(&self, pid: i32) -> Option<&Successor> {
        self.successors.iter().find(|successor| successor.old == pid)
    }

    /// The process that listens for QMP at `path` and is to take over a guest.
    pub fn successor_at(&self, path: &Path) -> Option<&Successor> {
        let is_at = |successor: &&Successor| successor.domain.qmp_paths().any(|own| own == path);
        self.successors.iter().find(is_at)
    }

    /// The domain that was told to listen for QMP at `path`, where one is known: without connecting, so that whoever
    /// is connected there is not disturbed. See [`Domain::of_peer`] for what is known after connecting.
    pub fn by_qmp(&self, path: &Path) -> Option<&Domain> {
        let mut domains = self.found.iter();
        domains.find(|domain| domain.qmp.iter().any(|socket| socket.is_at(path)))
    }
}

/// The words of a process's command line, and the folder in which its relative paths begin.
///
/// Errors: it is gone, or may not be looked at.
pub(crate) fn command_line_of(pid: i32) -> io::Result<(Vec<Vec<u8>>, PathBuf)> {
    let gone = || io::Error::new(ErrorKind::NotFound, "the process has ended");
    let process = Process::read(pid)?.ok_or_else(gone)?;
    let line = CommandLine::parse(process.words.iter().map(Vec::as_slice), &|_| None);
    let folder = Place::of(pid, &line)
        .folder()
        .ok_or_else(|| io::Error::new(ErrorKind::NotFound, "the folder in which it was started is not known"))?;
    Ok((process.words, folder))
}

/// All domains of this host.
///
/// Errors: [`DomainError::Proc`]. A process that ends while it is read is left out.
pub fn all() -> Result<Domains, DomainError> {
    let pids = process::pids().map_err(DomainError::Proc)?;
    let mut domains = Domains {
        // There is always a process 1.
        hidden: !pids.contains(&1),
        ..Domains::default()
    };
    let mut processes = Vec::new();
    for pid in pids {
        match Process::read_qemu(pid) {
            Ok(Some(process)) if process.is_qemu() => processes.push(process),
            Ok(_) => {}
            Err(cause) if cause.kind() == ErrorKind::PermissionDenied => domains.unreadable += 1,
            Err(cause) => return Err(DomainError::Proc(cause)),
        }
    }
    let own: Vec<Process> = processes
        .iter()
        .filter(|one| !is_helper(one, &processes))
        .cloned()
        .collect();
    for process in own {
        match process.predecessor() {
            Some((old, was_running)) => domains.successors.push(Successor {
                old,
                was_running,
                domain: Domain::of_process(process),
            }),
            None => domains.found.push(Domain::of_process(process)),
        }
    }
    Ok(domains)
}

/// Whether a process is a child of one of `others` that still has its parent's command line: QEMU's asynchronous
/// teardown (`system/async-teardown.c`, QEMU 7.2 and later), or a child just before it becomes another program.
fn is_helper(process: &Process, others: &[Process]) -> bool {
    others
        .iter()
        .any(|other| other.pid == process.parent && other.words == process.words)
}

/// The one running domain of that name or UUID, with a monitor that can be reached.
///
/// Errors: none or several have the name; it has no QMP socket that can be connected to, and libvirt does not run it; /proc
/// could not be read.
pub fn find(name: &str) -> Result<Domain, DomainError> {
    all()?.find(name)
}

#[cfg(test)]
mod tests;
