//! Which guest is meant, and how it is reached.

use crate::domains::{Domain, DomainError, MonitorPlace};
use crate::hypervisor::{PauseMethod, Route};
use std::path::PathBuf;
use std::time::Duration;

/// Which guest is meant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Selector {
    /// By the name that its QEMU was started with, or by its UUID.
    Name(String),
    /// By its QMP socket.
    QmpSocket(PathBuf),
    /// By the process that runs it under KVM, whatever program that is.
    Process(i32),
}

/// A guest, and how it is reached.
#[derive(Debug, Clone)]
pub struct Target {
    /// Its name, where it was found by name.
    pub name: Option<String>,
    /// Its process, where that is known before connecting.
    pub pid: Option<i32>,
    /// How it is reached.
    pub route: Route,
}

impl Target {
    /// A domain that was found.
    ///
    /// # Errors
    ///
    /// It has no monitor that can be reached.
    pub fn of_domain(domain: &Domain) -> Result<Self, DomainError> {
        Ok(Self {
            name: domain.name.clone(),
            pid: Some(domain.pid),
            route: match domain.monitor()? {
                MonitorPlace::Socket(socket) => Route::qmp(socket),
                MonitorPlace::Libvirt(uuid) => Route::libvirt(uuid, domain.pid),
            },
        })
    }

    /// The same guest, to be paused by that method.
    #[must_use]
    pub fn paused_by(self, method: PauseMethod) -> Self {
        let route = self.route.paused_by(method);
        Self { route, ..self }
    }

    /// The same guest, whose QEMU may take that long for each answer.
    #[must_use]
    pub fn answered_within(self, within: Duration) -> Self {
        let route = self.route.answered_within(within);
        Self { route, ..self }
    }
}
