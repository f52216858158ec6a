//! A guest that loads and unloads modules all the time stays whole while patches come and go.
//!
//! What a patch adds to the guest's lists of modules, to their tree and to ftrace's chain of records has the guest's own modules as
//! neighbours, which come and go between plan and pause.

use guest_core::guest::Changed;
use std::path::Path;
use std::time::{Duration, Instant};

use e2e::bed::{self, assert_healthy};
use e2e::kit::{self, Modules};
use e2e::session;
use host_agent::chain::chain;
use images::build::hand_written::Applied;
use images::kernel::Kernel;

/// How long patches come and go, in seconds; the environment may say a longer time.
const SECONDS: &str = "VMPATCH_STORM_SECONDS";
const SECONDS_SHORT: u64 = 25;
/// vCPUs, likewise.
const VCPUS: &str = "VMPATCH_STORM_VCPUS";
/// For each apply and revert.
const TIMEOUT: Duration = Duration::from_secs(20);
/// Loads and unloads the module until it is told to stop, and counts.
const STORM: &str = "n=0; while [ ! -e /tmp/stop ]; do insmod /tmp/vmpatch_target.ko && rmmod vmpatch_target && n=$((n+1)); done; echo $n";
/// How long the last load and unload may take.
const END_LIMIT: Duration = Duration::from_secs(30);
/// The fewest cycles of both sides that show anything.
const CYCLES_MIN: u64 = 10;
/// How long they are tried for at the most. Where the host is busy, the guest loads its next module while a plan is being made.
const BUSY_HOST_MAX: Duration = Duration::from_secs(240);

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

#[test]
fn modules_and_patches_come_and_go_at_the_same_time() {
    let vcpus = number(VCPUS).and_then(|count| u32::try_from(count).ok()).unwrap_or(2);
    let guest = bed::lend(kit::guest(Kernel::CLOUD_6_1).vcpus(vcpus));
    let modules = Modules::of(&Kernel::CLOUD_6_1);
    let target = std::fs::read(modules.target()).unwrap();
    guest.push("/tmp/vmpatch_target.ko", &target, 0o644).unwrap();
    let module = modules.applied(Applied::StaticKey);
    let bytes = std::fs::read(&module).unwrap();
    let storm = guest.spawn(&["sh", "-c", STORM]).unwrap();

    let options = session::options(TIMEOUT);
    let mut session = session::open(&guest).unwrap();
    session.recover().unwrap();
    let (start, seconds) = (Instant::now(), number(SECONDS).unwrap_or(SECONDS_SHORT));
    let (mut cycles, mut pauses, mut pause_us_max) = (0, 0, 0);
    let is_over = |cycles| {
        let enough = if cycles < CYCLES_MIN {
            BUSY_HOST_MAX
        } else {
            Duration::from_secs(seconds)
        };
        start.elapsed() >= enough
    };
    while !is_over(cycles) {
        let applied = session.apply(Path::new(&module), &bytes, &options);
        let Changed {
            record,
            committed: applied,
            ..
        } = applied.unwrap_or_else(|error| panic!("cycle {cycles}: {:?}", chain(&error)));
        let reverted = session.revert(&record.id, &options);
        let Changed {
            committed: reverted, ..
        } = reverted.unwrap_or_else(|error| panic!("cycle {cycles}: {:?}", chain(&error)));
        cycles += 1;
        pauses += applied.tries + reverted.tries;
        pause_us_max = applied.pause_us_max.max(reverted.pause_us_max).max(pause_us_max);
    }
    drop(session);

    guest.text(&["touch", "/tmp/stop"]).unwrap();
    let output = storm.wait(END_LIMIT).unwrap();
    let loads: u64 = String::from_utf8_lossy(&output.stdout)
        .trim()
        .parse()
        .unwrap_or_else(|_| panic!("{output:?}"));
    println!("{cycles} cycles of patches with {pauses} pauses of {pause_us_max} µs at the most, {loads} of modules");
    assert!(cycles >= CYCLES_MIN && loads >= CYCLES_MIN, "{cycles} and {loads}");
    guest.text(&["rm", "/tmp/stop"]).unwrap();
    assert_healthy(&guest);
}
