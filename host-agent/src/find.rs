//! Finds the guest that is meant, in the one process where it is.

use crate::domains::{self, DomainError, Domains, process};
use crate::hypervisor::Route;
use crate::outcome::{GuestState, Reason};
use crate::target::{Selector, Target};
use crate::upgrade::{self, UpgradeError};

/// Why a guest was not found.
#[derive(Debug, thiserror::Error)]
pub enum FindError {
    /// No such domain, or not one.
    #[error(transparent)]
    Domain(#[from] DomainError),
    /// It is between two processes, and could not be brought into one.
    #[error(transparent)]
    Upgrade(#[from] UpgradeError),
}

impl FindError {
    /// Why it was not found.
    pub fn reason(&self) -> Reason {
        match self {
            Self::Domain(_) => Reason::Unreachable,
            Self::Upgrade(error) => error.reason(),
        }
    }

    /// What the guest is like.
    pub fn guest_state(&self) -> GuestState {
        match self {
            Self::Domain(_) => GuestState::AsBefore,
            Self::Upgrade(error) => error.guest_state(),
        }
    }
}

/// Finds a guest. Where a migration into another QEMU was cut off on that domain, it is brought to an end first, so that the guest is in
/// one process.
///
/// # Errors
///
/// See [`FindError`].
pub fn find(selector: &Selector) -> Result<Target, FindError> {
    let domains = domains::all()?;
    let target = look_up(selector, &domains)?;
    let old = domains.iter().find(|domain| Some(domain.pid) == target.pid);
    match old.and_then(|old| Some((old, domains.successor_of(old.pid)?))) {
        None => Ok(target),
        Some((old, successor)) => {
            upgrade::resume_cut_off(old, successor)?;
            look_up(selector, &domains::all()?)
        }
    }
}

fn look_up(selector: &Selector, domains: &Domains) -> Result<Target, FindError> {
    match selector {
        Selector::QmpSocket(socket) => {
            if let Some(successor) = domains.successor_at(socket) {
                return Err(UpgradeError::UnderWay {
                    old: successor.old,
                    new: successor.domain.pid,
                }
                .into());
            }
            let pid = domains.by_qmp(socket).map(|domain| domain.pid);
            Ok(Target {
                name: None,
                pid,
                route: Route::qmp(socket.clone()),
            })
        }
        Selector::Name(name) => Ok(Target::of_domain(&domains.find(name)?)?),
        Selector::Process(pid) => {
            if let Some(successor) = domains.successors.iter().find(|one| one.domain.pid == *pid) {
                return Err(UpgradeError::UnderWay {
                    old: successor.old,
                    new: *pid,
                }
                .into());
            }
            let started = process::start_time(*pid).map_err(|cause| DomainError::NoProcess { pid: *pid, cause })?;
            Ok(Target {
                name: None,
                pid: Some(*pid),
                route: Route::process(*pid, started),
            })
        }
    }
}
