//! Functions patched together change at one instant, whatever the vCPUs are doing.
//!
//! The two functions of the module see whether the other one is of their own age, and the program in the guest counts what each
//! call finds: old, new, or mixed. The cycles run in this process, through vmpatch's own library: as many of them through the
//! program would start it twice as often.

use guest_core::commit::Model;
use guest_core::guest::PatchOptions;
use std::path::Path;
use std::time::{Duration, Instant};

use host_agent::chain::chain;
use images::build::hand_written::Applied;
use images::kernel::Kernel;

use crate::bed::{self, assert_healthy};
use crate::kit::{self, Modules};
use crate::probe::{Calls, Seen, see};
use crate::session;

/// Cycles between two lines that say how far it is.
const CYCLES_SAID: u64 = 50;
/// Tasks that do nothing but call the functions: one for each vCPU.
const TASKS: &str = "2";
/// How long the program may take to start and to end on a guest that is all busy.
const PROGRAM_LIMIT: Duration = Duration::from_secs(30);
/// Time for one safe moment; the default of the command line is made for guests that do not call the function all the time.
const TIMEOUT: Duration = Duration::from_secs(60);

/// Applies and reverts that often, with that model.
///
/// # Panics
///
/// If a call found a mix or was lost, an apply or a revert failed, or too few calls were made between them to tell.
pub fn run(cycles: u64, model: Model) {
    // With QEMU's HPET as clock, which sysinfo() asks, both vCPUs would nearly always stand in that one access.
    let guest = bed::lend(kit::guest(Kernel::CLOUD_6_1).append("tsc=reliable clocksource=tsc"));
    let modules = Modules::of(&Kernel::CLOUD_6_1);
    // Only functions with ftrace sites can be in transition.
    let (module, load) = match model {
        Model::Hybrid => (modules.rusage_pair(), "rusage"),
        Model::CleanCut | Model::None => (modules.applied(Applied::Pair), "load"),
    };
    let bytes = std::fs::read(&module).unwrap();
    assert_eq!(see(&guest, "pair"), Seen::Flawed);
    let load = guest.spawn(&["/opt/pair", load, "0", TASKS]).unwrap();
    load.wait_for_stdout("started", PROGRAM_LIMIT).unwrap();

    let options = PatchOptions {
        model,
        ..session::options(TIMEOUT)
    };
    let mut session = session::open(&guest).unwrap();
    session.recover().unwrap();
    let start = Instant::now();
    let (mut tries, mut by_task) = ([0; 2], [0; 2]);
    for cycle in 0..cycles {
        let applied = session.apply(Path::new(&module), &bytes, &options);
        let applied = applied.unwrap_or_else(|error| panic!("cycle {cycle}: {:?}", chain(&error)));
        let reverted = session.revert(&applied.record.id, &options);
        let reverted = reverted.unwrap_or_else(|error| panic!("cycle {cycle}: {:?}", chain(&error)));
        for (index, changed) in [applied, reverted].iter().enumerate() {
            tries[index] += changed.committed.tries;
            by_task[index] += u64::from(changed.by_task);
        }
        if (cycle + 1) % CYCLES_SAID == 0 {
            println!("{} cycles after {:?}, {tries:?} pauses", cycle + 1, start.elapsed());
        }
    }
    let took = start.elapsed();
    drop(session);

    guest.text(&["kill", &load.pid().to_string()]).unwrap();
    let output = load.wait(PROGRAM_LIMIT).unwrap();
    let calls = Calls::of(&String::from_utf8_lossy(&output.stdout)).unwrap_or_else(|| panic!("{output:?}"));
    println!(
        "{cycles} cycles in {took:?}, {tries:?} pauses, {by_task:?} of the applies and reverts task by task; {calls:?}"
    );
    // A vCPU is inside in many pauses.
    let is_seen = by_task.iter().all(|times| *times > cycles / 20);
    assert!(model != Model::Hybrid || is_seen, "{by_task:?}");
    assert_eq!((calls.mixed, calls.lost), (0, 0), "{calls:?}");
    assert!(output.status.success(), "{output:?}");
    let calls_min = cycles / 10;
    assert!(calls.old > calls_min && calls.new > calls_min, "{calls:?}");
    assert_eq!(see(&guest, "pair"), Seen::Flawed);
    assert_healthy(&guest);
}
