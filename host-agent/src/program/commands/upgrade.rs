//! `upgrade`.

use super::status::patches;
use super::target::{selector, target};
use crate::program::cli::{Options, UpgradeOptions};
use crate::program::failure::Failure;
use crate::program::report::{Guest, Process, Upgrade};
use host_agent::upgrade::{self, Qemu, Upgraded};

/// Moves the guest into another QEMU, or says how it would be moved.
pub fn upgrade(options: &Options, wanted: &UpgradeOptions) -> Result<Upgrade, Failure> {
    upgrade::refuse_libvirts(&selector(options)?)?;
    Ok(report(upgrade::run(&target(options)?, &wanted.options())?))
}

fn report(upgraded: Upgraded) -> Upgrade {
    let pid = upgraded.new.pid.or(upgraded.old.pid);
    let arrived = upgraded.arrived.as_ref();
    Upgrade {
        guest: Guest {
            domain: upgraded.name.clone(),
            pid: pid.unwrap_or(0),
            release: upgraded.release.clone(),
            integrity_guard: None,
        },
        state: match arrived {
            Some(_) => "moved".to_owned(),
            None => "would move".to_owned(),
        },
        old: process(&upgraded.old),
        new: process(&upgraded.new),
        machine: upgraded.machine.clone(),
        method: upgraded.method.name().to_owned(),
        downtime_us: arrived.and_then(|arrived| u64::try_from(arrived.downtime?.as_micros()).ok()),
        total_ms: arrived.and_then(|arrived| u64::try_from(arrived.total.as_millis()).ok()),
        transferred: arrived.map(|arrived| arrived.transferred),
        compared: upgraded.compared,
        patches: arrived.map(|arrived| patches(&arrived.session)).unwrap_or_default(),
        warnings: upgraded.warnings.clone(),
    }
}

fn process(qemu: &Qemu) -> Process {
    Process {
        pid: qemu.pid,
        qemu: upgrade::binary::spell(qemu.version),
        program: qemu.program.display().to_string(),
    }
}
