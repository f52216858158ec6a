//! Integrity guards: software in the guest that checks whether its kernel was changed, and may then stop the guest.
//!
//! LKRG (the Linux Kernel Runtime Guard, module `lkrg`, `p_lkrg` before 0.9.2) hashes `_stext.._etext` and compares the hash at
//! intervals and at events. If its sysctl `lkrg.kint_validate` is 0, it does not check. `lkrg.kint_enforce` selects its
//! reaction to a difference: 0 logs it once and accepts it, 1 logs it, 2 panics (README of LKRG 1.0.1). It can hide its module from
//! the guest's list, but not its sysctls.

use super::sysctl::Directory;
use super::{KernelError, Live, modules};
use crate::addr::Gva;
use crate::memory::VirtMemory;

/// LKRG's directory of sysctls.
const LKRG: &str = "lkrg";
/// The names of its module, over time.
const LKRG_MODULES: [&str; 2] = ["lkrg", "p_lkrg"];
/// What the guest is doing when it changes the sysctls.
const CHANGING: &str = "changing its sysctls, or loading or unloading modules";
/// Name of what is read here, for errors.
const SETTING: &str = "a setting of the guest's integrity guard";

/// A guard in the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Guard {
    /// Name of the guard.
    pub name: &'static str,
    /// Its reaction to a change of the kernel.
    pub reaction: Reaction,
}

/// A guard's reaction to a change of the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reaction {
    /// It does not check.
    Off,
    /// It writes to the guest's log.
    Logs,
    /// It stops the guest.
    Panics,
    /// Its settings were not found: it may do anything.
    Unknown,
}

impl Reaction {
    /// The name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Logs => "logs",
            Self::Panics => "panics",
            Self::Unknown => "unknown",
        }
    }
}

/// A guard that would or may stop the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "the guest runs {name}, {why}; its tenant can set it to log only (`sysctl lkrg.kint_enforce=0`), and must leave it so for as long as the patch is applied"
)]
pub struct Armed {
    /// The guard's name.
    pub name: &'static str,
    why: &'static str,
}

/// Finds the guard that the guest runs, if any.
///
/// # Errors
///
/// The guest's modules or sysctls cannot be read.
pub fn find(live: &Live<'_>) -> Result<Option<Guard>, KernelError> {
    let live = &live.that_changes_when(CHANGING);
    let directory = match Directory::root(live)? {
        Some(root) => root.directory(live, LKRG)?,
        None => None,
    };
    let listed = || {
        let modules = modules::all(live)?;
        let is_it = |module: &modules::GuestModule| LKRG_MODULES.contains(&module.name.as_str());
        Ok::<_, KernelError>(modules.iter().any(is_it))
    };
    if directory.is_none() && !listed()? {
        return Ok(None);
    }
    let setting = |name| {
        let Some(directory) = directory else { return Ok(None) };
        let Some(at) = directory.value(live, name)? else {
            return Ok(None);
        };
        int(live, at).map(Some)
    };
    let reaction = match (setting("kint_validate")?, setting("kint_enforce")?) {
        (Some(0), Some(_)) => Reaction::Off,
        (Some(_), Some(0 | 1)) => Reaction::Logs,
        (Some(_), Some(_)) => Reaction::Panics,
        _ => Reaction::Unknown,
    };
    Ok(Some(Guard { name: "LKRG", reaction }))
}

impl Guard {
    /// Permits a change of the kernel's text.
    ///
    /// # Errors
    ///
    /// The guard would or may stop the guest.
    pub fn permits(&self) -> Result<(), Armed> {
        let why = match self.reaction {
            Reaction::Off | Reaction::Logs => return Ok(()),
            Reaction::Panics => "which panics when it finds the kernel's text changed",
            Reaction::Unknown => {
                "whose settings were not found, and which may panic when it finds the kernel's text changed"
            }
        };
        Err(Armed { name: self.name, why })
    }

    /// A warning for the operator; `None` if the guard does not check.
    pub fn warning(&self) -> Option<String> {
        let Self { name, reaction, .. } = self;
        match reaction {
            Reaction::Off => None,
            Reaction::Logs => Some(format!(
                "{name} in the guest logs that the kernel's text was changed; it must not be set to panic while a patch is applied"
            )),
            Reaction::Panics | Reaction::Unknown => self.permits().err().map(|armed| armed.to_string()),
        }
    }
}

fn int(live: &Live<'_>, at: Gva) -> Result<u32, KernelError> {
    let mut bytes = [0; 4];
    live.read(at, &mut bytes).map_err(|source| unreadable(at, source))?;
    Ok(u32::from_le_bytes(bytes))
}

fn unreadable(at: Gva, source: crate::memory::MemoryError) -> KernelError {
    KernelError::Unreadable {
        what: SETTING,
        at,
        source,
    }
}
