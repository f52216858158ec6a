//! Why a domain was not found.

use super::{Domain, Domains};
use std::io;
use std::path::PathBuf;
use thiserror::Error;

/// Names listed in a message; a host may run hundreds of guests.
const LISTED_MAX: usize = 20;

/// Why there is no domain to work on. Each message also says what can be done.
#[derive(Debug, Error)]
pub enum DomainError {
    /// The processes could not be listed.
    #[error("the running processes could not be listed in /proc")]
    Proc(#[source] io::Error),
    /// No QEMU has that name.
    #[error("no running QEMU has the name `{name}`: {running}")]
    NoneOfThatName {
        /// The name looked for.
        name: String,
        /// Those that are running, and what could not be looked at.
        running: String,
    },
    /// Several have it.
    #[error("{} running QEMUs have the name `{name}`: {them}; choose one with --qmp SOCKET", pids.len())]
    SeveralOfThatName {
        /// The name looked for.
        name: String,
        /// Their pids.
        pids: Vec<i32>,
        /// Their pids and QMP sockets, for people.
        them: String,
    },
    /// It has no QMP socket at all, or none that can be connected to.
    #[error(
        "{domain} has no QMP socket that vmpatch can connect to ({found}); \
         start it with `-qmp unix:PATH,server=on,wait=off`"
    )]
    NoQmpSocket {
        /// The domain's name and pid.
        domain: String,
        /// What there is instead.
        found: String,
    },
    /// Its only QMP socket is libvirt's own.
    #[error(
        "{domain} is managed by libvirt, which holds its only QMP socket; add another one for vmpatch to the domain's \
         XML: `<qemu:arg value='-qmp'/>` and `<qemu:arg value='unix:PATH,server=on,wait=off'/>` in `<qemu:commandline>`"
    )]
    OnlyLibvirts {
        /// The domain's name and pid.
        domain: String,
    },
    /// There is no process of that number, or it may not be looked at.
    #[error("no process {pid} in /proc")]
    NoProcess {
        /// The number.
        pid: i32,
        /// What /proc said.
        #[source]
        cause: io::Error,
    },
    /// The process at the other end of a QMP socket could not be looked at.
    #[error("pid {pid}, which listens at {}, could not be looked at in /proc", path.display())]
    Peer {
        /// The process.
        pid: i32,
        /// The socket.
        path: PathBuf,
        /// What /proc said.
        #[source]
        cause: io::Error,
    },
}

impl DomainError {
    pub(super) fn none_of_that_name(name: &str, domains: &Domains) -> Self {
        let name_of = |domain: &Domain| match &domain.name {
            Some(name) => name.clone(),
            None => format!("pid {} without a name", domain.pid),
        };
        let mut running = match list(&domains.found, name_of) {
            names if names.is_empty() => "none is running".to_owned(),
            names => format!("running are {names}"),
        };
        if domains.hidden {
            running += "; processes of other users do not show: run vmpatch as root";
        } else if domains.unreadable > 0 {
            running += &format!(
                "; {} processes of other users could not be looked at: run vmpatch as root",
                domains.unreadable
            );
        }
        Self::NoneOfThatName {
            name: name.to_owned(),
            running,
        }
    }

    pub(super) fn several_of_that_name(name: &str, domains: &[Domain]) -> Self {
        Self::SeveralOfThatName {
            name: name.to_owned(),
            pids: domains.iter().map(|domain| domain.pid).collect(),
            them: list(domains, |domain| match domain.qmp_paths().next() {
                Some(path) => format!("pid {} at {}", domain.pid, path.display()),
                None => format!("pid {} without a usable QMP socket", domain.pid),
            }),
        }
    }

    /// For a domain none of whose monitors can be used.
    pub(super) fn no_socket(domain: &Domain) -> Self {
        let name = domain.to_string();
        if !domain.qmp.is_empty() && domain.qmp.iter().all(|socket| socket.libvirt) {
            return Self::OnlyLibvirts { domain: name };
        }
        let mut found = match list(&domain.qmp, |socket| socket.address.to_string()) {
            none if none.is_empty() => "it has no QMP monitor".to_owned(),
            found => format!("it has {found}"),
        };
        if !domain.unread.is_empty() {
            found += "; not read: ";
            found += &list(&domain.unread, |path| path.display().to_string());
        }
        Self::NoQmpSocket { domain: name, found }
    }
}

fn list<T>(items: &[T], show: impl Fn(&T) -> String) -> String {
    let shown: Vec<_> = items.iter().take(LISTED_MAX).map(show).collect();
    let more = items.len().saturating_sub(LISTED_MAX);
    let more = if more > 0 {
        format!(" and {more} more")
    } else {
        String::new()
    };
    shown.join(", ") + &more
}
