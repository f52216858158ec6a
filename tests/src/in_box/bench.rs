//! Pauses of several kinds, turn by turn: vmpatch's, QEMU's own, and a bare stop of the vCPUs' threads.

use super::Result;
use crate::figures::{Figures, micros, ratio};
use crate::monitor::Monitor;
use guest_core::commit::{Committed, Model};
use host_agent::find::find;
use host_agent::session::{Changed, PatchOptions, Session};
use host_agent::target::Selector;
use kvm::Vm;
use process::Stopped;
use serde_json::json;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

/// For each apply and revert.
const TIMEOUT: Duration = Duration::from_secs(60);
/// How long the vCPUs' threads may take to stop.
const STOP_MAX: Duration = Duration::from_secs(1);

/// Opens a guest to change it, with `vmpatch` as its supervisor.
///
/// # Errors
///
/// It is not reached, or not understood.
pub fn open(name: &str, vmpatch: &Path) -> Result<Session> {
    let target = find(&Selector::Name(name.to_owned()))?;
    let mut session = Session::open(&target)?;
    session.set_supervisor(vmpatch.to_owned());
    Ok(session)
}

/// A clean cut.
pub(super) fn options() -> PatchOptions {
    PatchOptions {
        model: Model::CleanCut,
        timeout: TIMEOUT,
        grace: Duration::ZERO,
    }
}

/// Runs so many rounds, of which the first `warm_up` do not count, and prints what came of them.
///
/// # Errors
///
/// Something failed; a patch may be left in the guest.
pub fn run(name: &str, vmpatch: &Path, module: &Path, socket: &Path, (warm_up, rounds): (usize, usize)) -> Result<()> {
    let mut session = open(name, vmpatch)?;
    let mut monitor = Monitor::connect(socket)?;
    let bytes = fs::read(module)?;
    let vm = Vm::find(session.identity().pid, Duration::from_secs(5))?;
    let (mut qmp, mut bare, mut all, mut tries) = (Vec::new(), Vec::new(), Vec::<Committed>::new(), 0);
    for round in 0..warm_up + rounds {
        let stop_and_cont = stop_and_cont(&mut monitor)?;
        let threads = stop_threads(&vm)?;
        let Changed {
            record,
            committed: applied,
            ..
        } = session.apply(module, &bytes, &options())?;
        let Changed {
            committed: reverted, ..
        } = session.revert(&record.id, &options())?;
        if round >= warm_up {
            qmp.push(stop_and_cont);
            bare.push(threads);
            tries += u64::from(applied.tries) + u64::from(reverted.tries);
            all.extend([applied, reverted]);
        }
    }
    let (qmp, bare) = (Figures::of(qmp), Figures::of(bare));
    println!("  {:<36}{qmp}", "bare QMP stop + cont");
    println!("  {:<36}{bare}", "bare ptrace stop of the vCPUs");
    let pick = |pick: fn(&Committed) -> u64| Figures::of(all.iter().map(pick).collect());
    let pause = pick(|c| c.pause_us_max);
    println!(
        "  {:<36}{pause}   p50 {:.3} × stop + cont, {:.2} × bare ptrace; p99 {:.3} × p50 of stop + cont",
        "pause",
        ratio(pause.p50, qmp.p50),
        ratio(pause.p50, bare.p50),
        ratio(pause.p99, qmp.p50)
    );
    for (part, pick) in [
        ("stop", pick(|c| c.pause.stop_us)),
        ("registers", pick(|c| c.pause.registers_us)),
        ("locks and stacks", pick(|c| c.pause.check_us)),
        ("write and read back", pick(|c| c.pause.write_us)),
        ("resume", pick(|c| c.pause.resume_us)),
    ] {
        println!("  {:<36}{pick}", format!("  {part}"));
    }
    println!(
        "  {:<36}{:.2}",
        "looks for a safe moment a commit",
        ratio(tries, all.len() as u64)
    );
    Ok(())
}

fn stop_and_cont(monitor: &mut Monitor) -> Result<u64> {
    let start = Instant::now();
    monitor.call("stop", json!({}))?;
    monitor.call("cont", json!({}))?;
    Ok(micros(start.elapsed()))
}

/// How long the threads are held by a tracer that does nothing with them, measured as vmpatch's pause is.
fn stop_threads(vm: &Vm) -> Result<u64> {
    let stopped = Stopped::stop(vm.threads(), STOP_MAX)?;
    let (held, start) = (stopped.elapsed(), Instant::now());
    stopped.resume()?;
    Ok(micros(held + start.elapsed()))
}
