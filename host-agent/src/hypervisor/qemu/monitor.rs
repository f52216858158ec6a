//! Where the monitor of a QEMU is: at a socket of its own, or behind libvirt.

use super::AttachError;
use crate::domains::Uuid;
use crate::domains::process;
use qmp::machine::AttachError as ConnectError;
use qmp::{Client, LibvirtError, LibvirtGuest, Machine};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Time-out of QEMU's QMP greeting. QEMU sends it at once, unless another client holds the socket.
const CONNECT_TIME_MAX: Duration = Duration::from_secs(3);
/// Names of the sockets of libvirt's daemons: that for QEMU alone, and the older one for all hypervisors.
const LIBVIRT_SOCKETS: [&str; 2] = ["virtqemud-sock", "libvirt-sock"];

/// Where the monitor of a QEMU is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Monitor {
    /// At a QMP socket of QEMU's own.
    Socket(PathBuf),
    /// libvirt holds it.
    Libvirt {
        /// The guest's UUID.
        uuid: Uuid,
        /// Its QEMU.
        pid: i32,
    },
}

impl Monitor {
    /// Connects.
    pub fn connect(&self) -> Result<Machine, AttachError> {
        match self {
            Self::Socket(socket) => Machine::attach(socket, CONNECT_TIME_MAX).map_err(|source| AttachError::Connect {
                socket: socket.clone(),
                source,
            }),
            Self::Libvirt { uuid, pid } => through_libvirt(*uuid, *pid),
        }
    }
}

/// Connects to the daemon of libvirt that has the guest: there may be one of the system and one of the user's.
fn through_libvirt(uuid: Uuid, pid: i32) -> Result<Machine, AttachError> {
    let mut result = Err(AttachError::OtherProcess { uuid, pid });
    // What a daemon says that runs says more than that another one does not.
    let mut has_answered = false;
    for guest in daemons(uuid, process::user(pid)) {
        let (socket, connecting) = (
            guest.socket.clone(),
            Client::connect_libvirt(&guest, pid, CONNECT_TIME_MAX),
        );
        match Machine::attach_by(connecting) {
            Ok(machine) if owns_vcpus(&machine, pid)? => return Ok(machine),
            Ok(_) => (result, has_answered) = (Err(AttachError::OtherProcess { uuid, pid }), true),
            Err(source) if is_not_running(&source) && has_answered => {}
            Err(source) => {
                has_answered = !is_not_running(&source);
                let is_elsewhere = is_elsewhere(&source);
                result = Err(AttachError::Connect { socket, source });
                if !is_elsewhere {
                    break;
                }
            }
        }
    }
    result
}

fn of_libvirt(error: &ConnectError) -> Option<&LibvirtError> {
    match error {
        ConnectError::Connect(qmp::ConnectError::Libvirt(error)) => Some(error),
        _ => None,
    }
}

fn is_not_running(error: &ConnectError) -> bool {
    matches!(of_libvirt(error), Some(LibvirtError::NotRunning { .. }))
}

/// Whether another daemon may have the guest.
fn is_elsewhere(error: &ConnectError) -> bool {
    is_not_running(error) || matches!(of_libvirt(error), Some(LibvirtError::NoGuest { .. }))
}

/// Where the guest may be, most likely first. Those of the system come last, as every host with libvirt has them: their error is the one that is told.
fn daemons(uuid: Uuid, user: Option<u32>) -> Vec<LibvirtGuest> {
    let session = user.map(|user| (format!("/run/user/{user}/libvirt"), "qemu:///session"));
    let places = session
        .into_iter()
        .chain([("/run/libvirt".to_owned(), "qemu:///system")]);
    places
        .flat_map(|(folder, uri)| {
            LIBVIRT_SOCKETS.map(|name| LibvirtGuest {
                socket: Path::new(&folder).join(name),
                uri: uri.to_owned(),
                uuid: uuid.0,
            })
        })
        .collect()
}

/// Whether the guest's vCPUs are threads of the process `pid`. libvirt names no process.
fn owns_vcpus(machine: &Machine, pid: i32) -> Result<bool, AttachError> {
    let threads = machine.vcpu_threads()?;
    let is_own = |thread: &i64| Path::new(&format!("/proc/{pid}/task/{thread}")).exists();
    Ok(!threads.is_empty() && threads.iter().all(is_own))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_user_s_own_daemon_is_asked_before_the_system_s() {
        let sockets = |user| {
            let daemons = daemons(Uuid([7; 16]), user);
            daemons
                .into_iter()
                .map(|daemon| (daemon.socket.display().to_string(), daemon.uri))
                .collect::<Vec<_>>()
        };
        let expected = |folder: &str, uri: &str| {
            ["virtqemud-sock", "libvirt-sock"].map(|name| (format!("{folder}/{name}"), uri.to_owned()))
        };
        let system = expected("/run/libvirt", "qemu:///system");
        assert_eq!(sockets(None), system);
        assert_eq!(
            sockets(Some(1000)),
            [expected("/run/user/1000/libvirt", "qemu:///session"), system].concat()
        );
    }
}
