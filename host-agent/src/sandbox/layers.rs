//! The layers, in the order in which they are taken on.

use super::calls;
use caps::CapSet;
use landlock::{ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, Ruleset, RulesetAttr, RulesetStatus, Scope};
use nix::sys::prctl;
use nix::sys::signal::Signal;
use nix::unistd::{Gid, Pid, Uid, geteuid, getppid, setgroups, setresgid, setresuid};
use std::error::Error;
use std::fmt;
use std::fs;
use std::os::fd::RawFd;

/// The newest landlock that is asked for; older kernels have less, and are asked for that.
const LANDLOCK: ABI = ABI::V6;
/// The user and group of nobody, which own nothing.
const NOBODY: u32 = 65534;

/// Whom a process becomes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct User {
    /// The user.
    pub user: u32,
    /// The group.
    pub group: u32,
}

impl User {
    /// Nobody, in place of root.
    #[must_use]
    pub fn or_nobody(self) -> Self {
        let nobody_for = |id| if id == 0 { NOBODY } else { id };
        Self {
            user: nobody_for(self.user),
            group: nobody_for(self.group),
        }
    }
}

/// Why a layer was not taken on.
type Cause = Box<dyn Error + Send + Sync>;
/// Takes a layer on.
type TakeOn<'a> = &'a dyn Fn() -> Result<(), Cause>;

/// One of the layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layer {
    /// Descriptors closed.
    Descriptors,
    /// Another user, no capability.
    User,
    /// Files, ports, processes.
    Landlock,
    /// System calls.
    Seccomp,
}

impl fmt::Display for Layer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Descriptors => "closing descriptors",
            Self::User => "giving up user and capabilities",
            Self::Landlock => "landlock",
            Self::Seccomp => "seccomp",
        })
    }
}

/// A layer that the host did not give.
#[derive(Debug, thiserror::Error)]
#[error("{layer}")]
pub struct Missing {
    /// Which.
    pub layer: Layer,
    /// Why.
    #[source]
    pub cause: Cause,
}

/// Why the process that reads a guest could not give up all of its rights. Nothing was changed.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// A layer is missing.
    #[error("this host does not give a part of the sandbox (--sandbox require)")]
    Layer(#[from] Missing),
    /// The process can't be divided.
    #[error("dividing vmpatch into a process with rights and one without (--sandbox require)")]
    Divide(#[source] Box<dyn Error + Send + Sync>),
}

/// Gives up all rights of this process, which must have one thread. The descriptors of `keep` stay open, and those of standard input, output
/// and error. As root, it becomes `user`. It ends with `parent`, where that is given. Gives the layers that the host did not give.
///
/// Objects that own a descriptor which is not kept must not be used any more, nor dropped.
pub fn restrict(keep: &[RawFd], user: User, parent: Option<Pid>) -> Vec<Missing> {
    let layers: [(Layer, TakeOn<'_>); 4] = [
        (Layer::Descriptors, &|| close_others(keep)),
        (Layer::User, &|| {
            let user = become_user(user);
            // Also where it stays the user that it is.
            end_with(parent)?;
            prctl::set_dumpable(false)?;
            user
        }),
        (Layer::Landlock, &reach_nothing),
        (Layer::Seccomp, &call_little),
    ];
    let tried = layers.map(|(layer, take_on)| take_on().map_err(|cause| Missing { layer, cause }));
    tried.into_iter().filter_map(Result::err).collect()
}

fn close_others(keep: &[RawFd]) -> Result<(), Cause> {
    let open: Vec<RawFd> = fs::read_dir("/proc/self/fd")?
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect();
    for descriptor in open {
        if descriptor > 2 && !keep.contains(&descriptor) {
            // That of the folder itself is closed already.
            let _ = nix::unistd::close(descriptor);
        }
    }
    Ok(())
}

fn become_user(user: User) -> Result<(), Cause> {
    prctl::set_no_new_privs()?;
    if geteuid().is_root() {
        // In a user namespace that has no such user the capabilities go all the same.
        let is_changed = setgroups(&[])
            .and_then(|()| set_group(Gid::from_raw(user.group)))
            .and_then(|()| set_user(Uid::from_raw(user.user)));
        drop_capabilities()?;
        return Ok(is_changed?);
    }
    drop_capabilities()
}

/// Changing the user undoes it, so that it comes after that.
fn end_with(parent: Option<Pid>) -> Result<(), Cause> {
    let Some(parent) = parent else { return Ok(()) };
    prctl::set_pdeathsig(Signal::SIGKILL)?;
    if getppid() != parent {
        // It has ended before.
        std::process::exit(1);
    }
    Ok(())
}

fn set_user(user: Uid) -> nix::Result<()> {
    setresuid(user, user, user)
}

fn set_group(group: Gid) -> nix::Result<()> {
    setresgid(group, group, group)
}

/// Of all sets but the bounding one, which has a meaning only where a program is started.
fn drop_capabilities() -> Result<(), Cause> {
    for set in [
        CapSet::Ambient,
        CapSet::Inheritable,
        CapSet::Effective,
        CapSet::Permitted,
    ] {
        caps::clear(None, set)?;
    }
    Ok(())
}

fn reach_nothing() -> Result<(), Cause> {
    let status = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(LANDLOCK))?
        .handle_access(AccessNet::from_all(LANDLOCK))?
        .scope(Scope::from_all(LANDLOCK))?
        .create()?
        .restrict_self()?;
    match status.ruleset {
        RulesetStatus::FullyEnforced => Ok(()),
        // Files and processes at least; seccomp keeps it from sockets and signals.
        RulesetStatus::PartiallyEnforced => {
            tracing::debug!("this kernel's landlock is an older one: no files and no ptrace");
            Ok(())
        }
        RulesetStatus::NotEnforced => Err("this kernel has none, or it is switched off".into()),
    }
}

fn call_little() -> Result<(), Cause> {
    let filter = calls::filter(std::process::id())?;
    Ok(seccompiler::apply_filter(&filter)?)
}
