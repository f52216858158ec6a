//! What a patch has handed to the guest outlives it: code that the guest may still call stays when the patch is reverted.

use std::fs;
use std::sync::LazyLock;
use std::thread::sleep;
use std::time::{Duration, Instant};

use e2e::bed::{self, Lent};
use e2e::kit::{self, Modules};
use e2e::probe::{Seen, see};
use e2e::report::states;
use e2e::vmpatch::Vmpatch;
use images::build::hand_written::Applied;
use images::guest::Guest;
use images::kernel::Kernel;
use serde_json::Value;

static MODULES: LazyLock<Modules> = LazyLock::new(|| Modules::of(&Kernel::CLOUD_6_1));
/// Longer than the module's delay of 20 s, in a guest whose clock stops while it is paused, on a busy host.
const FIRED_MAX: Duration = Duration::from_secs(120);

fn guest() -> Lent {
    bed::lend(kit::guest(Kernel::CLOUD_6_1))
}

/// How often the patch's code was called: by its timer, work, RCU callback and notifier.
fn calls(guest: &Guest) -> [u64; 4] {
    let said = guest.text(&["cat", "/proc/vmpatch_outlives"]).unwrap();
    let numbers: Vec<u64> = said.split(' ').filter_map(|word| word.parse().ok()).collect();
    numbers.try_into().unwrap_or_else(|_| panic!("{said}"))
}

/// Waits until timer and work were called that often.
fn wait_for_calls(guest: &Guest, count: u64) {
    let start = Instant::now();
    while calls(guest)[..2] != [count; 2] {
        assert!(start.elapsed() < FIRED_MAX, "{:?}", calls(guest));
        sleep(Duration::from_millis(500));
    }
}

fn listed(guest: &Guest) -> Vec<String> {
    let modules = guest.text(&["cat", "/proc/modules"]).unwrap();
    let names = modules.lines().filter_map(|line| line.split(' ').next());
    names.map(str::to_owned).collect()
}

#[test]
fn code_that_the_guest_calls_after_a_revert_is_still_there() {
    let guest = guest();
    let vmpatch = Vmpatch::on(&guest);
    let module = MODULES.applied(Applied::Outlives);
    let target = fs::read(MODULES.target()).unwrap();
    guest.push("/tmp/vmpatch_target.ko", &target, 0o644).unwrap();
    let name = "test_outlives";
    let warning = "revert will put the old functions back, but keep this patch's code and variables in the guest until it reboots";
    let checked = vmpatch.run(&["check", "--json", &module]).expect(0).json();
    assert!(
        checked["patches"][0]["warnings"].to_string().contains(warning),
        "{checked}"
    );
    let escapes = checked["patches"][0]["escapes"].as_array().unwrap();
    for function in ["on_timer", "on_work", "on_grace_period", "on_module", "show"] {
        assert!(escapes.contains(&function.into()), "{checked}");
    }

    for round in 1..=2 {
        vmpatch.apply(&module);
        assert_eq!(listed(&guest).first().map(String::as_str), Some(name));
        assert_eq!(see(&guest, "outlives"), Seen::Fixed);
        let before = calls(&guest);
        let reverted = vmpatch.revert_all();
        let (called, status) = (calls(&guest), vmpatch.status());
        assert_eq!(called[..2], [round - 1; 2], "the delay was too short for this host");
        assert_eq!(see(&guest, "outlives"), Seen::Flawed);
        let kept = [(name, "reverted, code kept", vec!["original"])];
        assert_eq!((states(&reverted), states(&status)), (kept.to_vec(), kept.to_vec()));
        assert_eq!(status["patches"][0]["warnings"], Value::Null, "{status}");
        assert_eq!(listed(&guest).first().unwrap(), "reverted_1_test_outlives");
        // The notifier, and in their time the others.
        guest.text(&["insmod", "/tmp/vmpatch_target.ko"]).unwrap();
        guest.text(&["rmmod", "vmpatch_target"]).unwrap();
        wait_for_calls(&guest, round);
        let after = calls(&guest);
        assert!(after[2] == round && after[3] > before[3], "{before:?} {after:?}");
    }
    let unknown = vmpatch.run(&["revert", name]).expect(3);
    assert!(unknown.complaint().contains("it has: none"), "{unknown}");

    // What is kept is in nobody's way: another patch of the same function comes and goes, and nothing of that one stays.
    vmpatch.apply(&MODULES.applied(Applied::Printk));
    assert_eq!(see(&guest, "printk"), Seen::Fixed);
    let reverted = vmpatch.revert_all();
    assert_eq!(states(&reverted), [("test_printk", "reverted", vec!["original"])]);
    assert_eq!(states(&vmpatch.status()).len(), 1);
    guest.reboot().unwrap();
    assert_eq!(states(&vmpatch.status()), []);
    bed::assert_healthy(&guest);
}
