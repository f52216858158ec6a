//! What becomes of a move whose vmpatch was killed: the guest runs on in exactly one process, and the other one is ended.
//!
//! All that is needed is found anew: the new process says in its environment which one it takes the guest from, its command line
//! has its temporary names, and both tell how far the move is. The new one never runs the guest before a vmpatch that has
//! compared it says so; and once it has run it, the old one never may again.

use super::error::UpgradeError;
use super::line::{self, Context, Rewritten};
use super::owner::Owner;
use super::successor;
use super::tap::Taps;
use crate::domains::names::{Name, own};
use crate::domains::{self, Domain, Successor, process};
use crate::lock::{DomainLock, LOCK_TIME_MAX};
use qmp::RunState;
use qmp::migrate::{MigrateError, Pair, Status};
use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

/// How long a QEMU has to greet. The killed vmpatch's connections are closed by then.
const CONNECT_TIME_MAX: Duration = Duration::from_secs(5);
/// How long giving a move up may take.
const CANCEL_TIME_MAX: Duration = Duration::from_secs(20);

/// How long it is tried to let the guest run in its old process again: somebody may just have taken one of its disks.
pub(super) const TAKE_BACK_TIME_MAX: Duration = Duration::from_secs(30);

/// Where the guest is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Settled {
    /// In the old process; the new one was ended.
    InOld,
    /// In the new one; the old one was ended.
    InNew,
}

impl fmt::Display for Settled {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::InOld => "the guest was not moved, and is in its old process as before",
            Self::InNew => "the guest has moved, and is in its new process",
        })
    }
}

/// Brings a move to one of its two ends. Only for one who holds the old process's lock. `was_running`: the guest ran when
/// the move began.
pub fn settle(old: &Domain, new: &Domain, was_running: bool) -> Result<Settled, UpgradeError> {
    let names = names_of(new)?;
    let Some((mut pair, name)) = meeting_point(old, new, &names)? else {
        // Names are taken over only once the guest has run in the new process.
        return forward(old, new, &names);
    };
    let alive = || process::is_running(new.pid, new.start_time);
    let arrived = match name.temporary.exists() {
        true => pair.connect(&name.temporary, CONNECT_TIME_MAX, alive),
        // It had not come that far.
        false => Err(MigrateError::NoDestination),
    };
    let arrived = arrived.and_then(|()| pair.destination_state());
    if matches!(arrived, Ok(RunState::Running)) {
        return forward(old, new, &names);
    }
    let sent = pair.cancel(CANCEL_TIME_MAX)?;
    match arrived {
        Err(source) if sent == Status::Completed && alive() => Err(UpgradeError::Stranded {
            old: old.pid,
            new: new.pid,
            source,
        }),
        _ => back(old, new, pair, sent, was_running, &names),
    }
}

/// Brings a move to an end whose vmpatch was killed, together with the process that watched over it, and says so.
///
/// Errors: its vmpatch is still at work, or one of [`settle`]'s.
pub fn resume_cut_off(old: &Domain, new: &Successor) -> Result<(), UpgradeError> {
    // While somebody works on it, it was not cut off.
    let lock = DomainLock::acquire_within(old.pid, LOCK_TIME_MAX)?;
    // It may have come to its end meanwhile.
    let survey = domains::all()?;
    if survey
        .successor_of(old.pid)
        .is_some_and(|found| found.domain.pid == new.domain.pid)
    {
        let settled = settle(old, &new.domain, new.was_running)?;
        let (old, new) = (old.pid, new.domain.pid);
        tracing::warn!("a move from process {old} to {new} had been cut off: {settled}");
    }
    drop(lock);
    Ok(())
}

/// The old process, at the first QMP socket that it still has, and that socket's name. None where the new one has taken
/// them over.
fn meeting_point<'a>(old: &Domain, new: &Domain, names: &'a [Name]) -> Result<Option<(Pair, &'a Name)>, UpgradeError> {
    let mut taken_over = false;
    let mut problem = None;
    for path in new.qmp_paths() {
        let own = own(path);
        let Some(name) = names.iter().find(|name| name.own == own) else {
            continue;
        };
        match Pair::new(&name.own, CONNECT_TIME_MAX) {
            Ok(pair) if pair.source_pid() == Some(old.pid) => return Ok(Some((pair, name))),
            Ok(pair) => taken_over |= pair.source_pid() == Some(new.pid),
            Err(error) => problem = Some(error),
        }
    }
    match (taken_over, problem) {
        (true, _) => Ok(None),
        (false, Some(error)) => Err(error.into()),
        (false, None) => Err(UpgradeError::unfit(
            format!("the old process (pid {}) and the new one (pid {})", old.pid, new.pid),
            "none of their QMP sockets leads to either",
        )),
    }
}

/// The temporary names on a process's command line.
fn names_of(new: &Domain) -> Result<Vec<Name>, UpgradeError> {
    let failed = || UpgradeError::host(format!("reading the command line of process {}", new.pid));
    let (words, folder) = domains::command_line_of(new.pid).map_err(failed())?;
    let context = Context {
        machine: String::new(),
        old_program: PathBuf::new(),
        new_program: PathBuf::new(),
        data: Vec::new(),
        taps: Vec::new(),
        generation: None,
    };
    let Rewritten { names, .. } = line::rewrite(&words, &context)?;
    Ok(names.iter().map(|name| name.in_folder(&folder)).collect())
}

/// The user of both: they have the same. One that has just ended tells it no more.
fn owner_of(old: &Domain, new: &Domain) -> Result<Owner, UpgradeError> {
    Ok(Owner::of(old.pid).or_else(|_| Owner::of(new.pid))?)
}

fn forward(old: &Domain, new: &Domain, names: &[Name]) -> Result<Settled, UpgradeError> {
    take_over(new.pid, &owner_of(old, new)?, names)?;
    end_old(old, new.pid)?;
    Ok(Settled::InNew)
}

/// The guest runs in the new process `new`: gives it its names, in this order, with the rights of its owner.
pub(super) fn take_over(new: i32, owner: &Owner, names: &[Name]) -> Result<(), UpgradeError> {
    for name in names {
        let done = owner.act(|| name.take_over()).flatten();
        done.map_err(|source| UpgradeError::Unfinished {
            pid: new,
            left: format!(
                "{} could not take over {}",
                name.temporary.display(),
                name.own.display()
            ),
            source,
        })?;
    }
    Ok(())
}

/// Removes the names of a new process that is no more, with the rights of its owner. What can't be removed harms nobody.
pub(super) fn remove_temporary(owner: &Owner, names: &[Name]) {
    let _ = owner.act(|| names.iter().for_each(Name::remove_temporary));
}

/// Ends the old process, whose guest runs in the process `new`.
pub(super) fn end_old(old: &Domain, new: i32) -> Result<(), UpgradeError> {
    successor::end(old.pid, old.start_time).map_err(|source| UpgradeError::Unfinished {
        pid: new,
        left: format!("the old one (pid {}) could not be ended", old.pid),
        source,
    })
}

/// Sets the tap devices of the old process to what it needs. That it can't must not keep the guest from running there.
pub(super) fn set_back(old: i32, taps: &str) {
    if let Ok(taps) = Taps::spelled(old, taps) {
        taps.set_back();
    }
}

fn back(
    old: &Domain,
    new: &Domain,
    mut pair: Pair,
    sent: Status,
    was_running: bool,
    names: &[Name],
) -> Result<Settled, UpgradeError> {
    let ending = UpgradeError::host(format!("ending the new process (pid {})", new.pid));
    let taps = process::taps(new.pid);
    let owner = owner_of(old, new)?;
    successor::end(new.pid, new.start_time).map_err(ending)?;
    set_back(old.pid, &taps);
    remove_temporary(&owner, names);
    // A guest that is copied standing was stopped by the vmpatch that was killed.
    if was_running && (sent == Status::Completed || pair.source_state()? == RunState::Paused) {
        pair.take_back(TAKE_BACK_TIME_MAX)
            .map_err(|source| UpgradeError::Stranded {
                old: old.pid,
                new: new.pid,
                source,
            })?;
    }
    Ok(Settled::InOld)
}
