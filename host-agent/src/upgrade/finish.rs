//! The end of a move: checks the guest in its new process, and ends the old one.

use super::binary::Version;
use super::error::UpgradeError;
use super::prepare::Prepared;
use super::recovery;
use super::successor::Successor;
use crate::hypervisor::Route;
use crate::session::Session;
use crate::target::Target;
use qmp::migrate::{Arrival, Method};
use std::path::PathBuf;
use std::time::Duration;

/// One of the two QEMUs of a move.
#[derive(Debug, Clone)]
pub struct Qemu {
    /// Its process, where there is one.
    pub pid: Option<i32>,
    /// Its version.
    pub version: Version,
    /// Its program.
    pub program: PathBuf,
}

/// A guest that has moved, or could.
pub struct Upgraded {
    /// The guest's name.
    pub name: Option<String>,
    /// `uname -r` of its kernel.
    pub release: String,
    /// Where it was.
    pub old: Qemu,
    /// Where it is.
    pub new: Qemu,
    /// The machine type, which stays.
    pub machine: String,
    /// How its memory got there.
    pub method: Method,
    /// How many ranges of the kernel and its patches are compared before the guest runs.
    pub compared: usize,
    /// What the operator should know.
    pub warnings: Vec<String>,
    /// The guest in its new process; none where it was only checked.
    pub arrived: Option<Arrived>,
}

/// A guest in its new process.
pub struct Arrived {
    /// A session with it, which holds its lock.
    pub session: Session,
    /// How long it was paused, by the times at which the two QEMUs stopped and resumed it.
    pub downtime: Option<Duration>,
    /// From the new process's start until the guest ran there.
    pub total: Duration,
    /// Bytes sent.
    pub transferred: u64,
}

/// Figures of a move.
pub(super) struct Done {
    /// How it arrived.
    pub(super) arrival: Arrival,
    /// When it was let run in the new process, in microseconds since 1970.
    pub(super) resumed_at_us: Option<u64>,
    /// From the new process's start until then.
    pub(super) total: Duration,
    /// Bytes sent.
    pub(super) transferred: u64,
}

/// Checks the guest in its new process, ends the old one, and reports the move. `done` is `None` where the guest was only to be checked: then the
/// report says what would be done.
///
/// # Errors
///
/// The guest is not the one that was sent, or the old process can't be ended.
pub(super) fn finish(prepared: Prepared, new: &Successor, done: Option<Done>) -> Result<Upgraded, UpgradeError> {
    let mut upgraded = planned(&prepared);
    let Some(done) = done else { return Ok(upgraded) };
    let Prepared {
        old,
        socket,
        lock,
        identity,
        shown,
        pair,
        ..
    } = prepared;
    upgraded.new.pid = Some(new.pid);
    // QEMU serves one client per socket.
    drop(pair);
    let target = Target {
        name: old.name.clone(),
        pid: Some(new.pid),
        route: Route::qmp(socket),
    };
    let session = Session::open(&target)?;
    identity.confirm(&session)?;
    tracing::debug!(guest = shown, "ending process {}", old.pid);
    recovery::end_old(&old, new.pid)?;
    // Held until the old process is gone.
    drop(lock);
    let paused = done.resumed_at_us.zip(done.arrival.stopped_at_us);
    upgraded.arrived = Some(Arrived {
        session,
        downtime: paused.map(|(resumed, stopped)| Duration::from_micros(resumed.saturating_sub(stopped))),
        total: done.total,
        transferred: done.transferred,
    });
    Ok(upgraded)
}

fn planned(prepared: &Prepared) -> Upgraded {
    let Prepared { old, facts, .. } = prepared;
    let program = old.binary.as_ref().map(|binary| binary.path.clone());
    Upgraded {
        name: old.name.clone(),
        release: prepared.release.clone(),
        old: Qemu {
            pid: Some(old.pid),
            version: facts.version,
            program: program.unwrap_or_default(),
        },
        new: Qemu {
            pid: None,
            version: prepared.version,
            program: prepared.program.clone(),
        },
        machine: facts.machine.clone(),
        method: prepared.method,
        compared: prepared.identity.len(),
        warnings: prepared.warnings.clone(),
        arrived: None,
    }
}
