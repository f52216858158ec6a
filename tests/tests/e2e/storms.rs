//! Patches are applied and reverted while the guest changes what vmpatch reads and writes: the storms of `--bin storm`, for as long as a
//! test may take.

use std::time::Duration;

use e2e::storm::cycles::{Cycle, Length};
use e2e::storm::run::{self, Plan};
use e2e::storm::{Storm, named};
use images::kernel::Kernel;

/// For each storm, whichever comes first.
const LENGTH: Length = Length {
    cycles: 10,
    time: Duration::from_secs(20),
};

#[track_caller]
fn is_weathered(name: &str, kernel: Kernel) {
    let storm: &dyn Storm = named(name).expect("there is such a storm");
    let plan = Plan {
        kernel,
        vcpus: 2,
        length: LENGTH,
        cycle: Cycle::Patch,
        timeout: Duration::from_secs(10),
        logs: std::env::temp_dir().join("vmpatch-storms"),
    };
    let report = run::run(storm, &plan, &mut |_| {}).unwrap();
    println!("{report:#?}");
    assert_eq!(report.wrong, [""; 0]);
    assert!(report.outcomes.reverted > 0, "no patch was applied and reverted");
}

#[test]
fn a_guest_whose_tasks_fork_and_exit_is_patched() {
    is_weathered("processes", Kernel::CLOUD_6_1);
}

#[test]
fn a_guest_that_takes_cpus_offline_is_patched() {
    is_weathered("cpu-online", Kernel::CLOUD_6_1);
}

#[test]
fn a_guest_that_is_saved_and_loaded_is_patched() {
    is_weathered("snapshots", Kernel::CLOUD_6_1);
}

/// This kernel chooses its NOPs by the CPU, and stops where a branch holds another one as a key is flipped.
#[test]
fn a_guest_of_5_10_that_flips_static_keys_is_patched() {
    is_weathered("static-keys", Kernel::CLOUD_5_10);
}
