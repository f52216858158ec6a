//! Recovers a move whose vmpatch was killed: the guest runs on in exactly one process, and the other one is ended.
//!
//! Nothing is kept on disk. The new process's environment names the old one, its command line has its temporary names, and both processes tell how far
//! the move is. The new process does not run the guest before a vmpatch has compared it. Once the new process has run the guest, the old one must not.

use super::argv::{self, Context, Rewritten};
use super::error::UpgradeError;
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

/// How long a resume in the old process is tried: another process may hold one of the guest's disks for a moment.
pub(super) const RESUME_TIME_MAX: Duration = Duration::from_secs(30);

/// Where the guest is after the recovery of a move.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Recovered {
    /// In the old process; the new one was ended.
    InOld,
    /// In the new one; the old one was ended.
    InNew,
}

impl fmt::Display for Recovered {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::InOld => "the guest was not moved, and is in its old process as before",
            Self::InNew => "the guest has moved, and is in its new process",
        })
    }
}

/// Brings a move to one of its two ends. The caller must hold the old process's lock. `was_running`: the guest ran when the move
/// began.
///
/// # Errors
///
/// One of the processes can't be reached or ended, or the guest can't be resumed.
pub fn recover(old: &Domain, new: &Domain, was_running: bool) -> Result<Recovered, UpgradeError> {
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

/// Recovers a move whose vmpatch was killed together with its watcher, and logs a warning.
///
/// # Errors
///
/// Another vmpatch is at work on the guest, or [`recover`] failed.
pub fn resume_cut_off(old: &Domain, new: &Successor) -> Result<(), UpgradeError> {
    // A vmpatch that still works on the move holds the lock.
    let lock = DomainLock::acquire_within(old.pid, LOCK_TIME_MAX)?;
    // The move may have ended meanwhile.
    let domains = domains::all()?;
    if domains
        .successor_of(old.pid)
        .is_some_and(|found| found.domain.pid == new.domain.pid)
    {
        let recovered = recover(old, &new.domain, new.was_running)?;
        let (old, new) = (old.pid, new.domain.pid);
        tracing::warn!("a move from process {old} to {new} had been cut off: {recovered}");
    }
    drop(lock);
    Ok(())
}

/// The old process, at the first QMP socket that it still has, and that socket's name. `None` if the new process has taken over
/// all of them.
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
    let Rewritten { names, .. } = argv::rewrite(&words, &context)?;
    Ok(names.iter().map(|name| name.in_folder(&folder)).collect())
}

/// The user of both processes, which is the same. A process that has just ended does not tell it.
fn owner_of(old: &Domain, new: &Domain) -> Result<Owner, UpgradeError> {
    Ok(Owner::of(old.pid).or_else(|_| Owner::of(new.pid))?)
}

fn forward(old: &Domain, new: &Domain, names: &[Name]) -> Result<Recovered, UpgradeError> {
    take_over(new.pid, &owner_of(old, new)?, names)?;
    end_old(old, new.pid)?;
    Ok(Recovered::InNew)
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

/// Removes the temporary names of a new process that has ended, with the rights of its owner. Names that are left do no harm.
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

/// Sets the tap devices to what the old process needs. A failure is ignored, because the guest must run there in any case.
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
) -> Result<Recovered, UpgradeError> {
    let ending = UpgradeError::host(format!("ending the new process (pid {})", new.pid));
    let taps = process::taps(new.pid);
    let owner = owner_of(old, new)?;
    successor::end(new.pid, new.start_time).map_err(ending)?;
    set_back(old.pid, &taps);
    remove_temporary(&owner, names);
    // A guest that is migrated while paused was stopped by the killed vmpatch.
    if was_running && (sent == Status::Completed || pair.source_state()? == RunState::Paused) {
        pair.resume_source(RESUME_TIME_MAX)
            .map_err(|source| UpgradeError::Stranded {
                old: old.pid,
                new: new.pid,
                source,
            })?;
    }
    Ok(Recovered::InOld)
}
