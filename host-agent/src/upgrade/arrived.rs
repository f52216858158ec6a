//! After the move: the guest is looked at in its new process, and the old one ended.

use super::binary;
use super::error::UpgradeError;
use super::prepare::Prepared;
use super::run::Done;
use super::settle;
use super::successor::Successor;
use crate::commands::status;
use crate::error::Failure;
use crate::progress::Progress;
use crate::report::{Guest, Process, Upgrade};
use crate::session::{Session, Target};

/// Looks at the guest in its new process, ends the old one, and says how it was. Where it was not to be moved, says how it would
/// have been.
pub(super) fn finish(
    prepared: Prepared,
    new: &Successor,
    done: Option<Done>,
    progress: &Progress,
) -> Result<Upgrade, Failure> {
    let mut report = planned(&prepared);
    let Some(done) = done else { return Ok(report) };
    let Prepared {
        old,
        socket,
        lock,
        identity,
        shown,
        pair,
        ..
    } = prepared;
    report.guest.pid = new.pid;
    report.new.pid = Some(new.pid);
    report.state = "moved".to_owned();
    let stood = done.resumed_at_us.zip(done.arrival.stopped_at_us);
    report.downtime_us = stood.map(|(resumed, stopped)| resumed.saturating_sub(stopped));
    report.total_ms = u64::try_from(done.total.as_millis()).ok();
    report.transferred = Some(done.transferred);
    // QEMU serves one client per socket.
    drop(pair);
    let target = Target {
        name: old.name.clone(),
        pid: Some(new.pid),
        socket,
    };
    let session = Session::open(&target, progress)?;
    identity.confirm(&session).map_err(UpgradeError::from)?;
    report.patches = status::patches(&session);
    progress.step(&format!("{shown}: ending process {}", old.pid));
    settle::end_old(&old, new.pid)?;
    // Held until the old process is gone.
    drop(lock);
    Ok(report)
}

fn planned(prepared: &Prepared) -> Upgrade {
    let Prepared { old, facts, .. } = prepared;
    let program = old.binary.as_ref().map(|binary| binary.path.display().to_string());
    Upgrade {
        guest: Guest {
            domain: old.name.clone(),
            pid: old.pid,
            release: prepared.release.clone(),
            integrity_guard: None,
        },
        state: "would move".to_owned(),
        old: Process {
            pid: Some(old.pid),
            qemu: binary::spell(facts.version),
            program: program.unwrap_or_default(),
        },
        new: Process {
            pid: None,
            qemu: binary::spell(prepared.version),
            program: prepared.program.display().to_string(),
        },
        machine: facts.machine.clone(),
        way: prepared.way.name().to_owned(),
        downtime_us: None,
        total_ms: None,
        transferred: None,
        compared: prepared.identity.len(),
        patches: Vec::new(),
        warnings: prepared.warnings.clone(),
    }
}
