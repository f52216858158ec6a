//! Branches on static keys in a patch: brought into their keys' state when it is applied, and rewritten by the guest's own kernel
//! when somebody flips a key afterwards.

use std::sync::LazyLock;

use e2e::bed::{self, Lent};
use e2e::kit::{self, Modules};
use e2e::probe::{Seen, ask};
use e2e::vmpatch::Vmpatch;
use images::build::hand_written::Applied;
use images::guest::Guest;
use images::kernel::Kernel;

static MODULES: LazyLock<Modules> = LazyLock::new(|| Modules::of(&Kernel::CLOUD_6_1));

fn guest() -> Lent {
    bed::lend(kit::guest(Kernel::CLOUD_6_1))
}

/// Has the guest's kernel flip its key.
fn flip(guest: &Guest, to: &str) {
    let write = format!("echo {to} >/proc/sys/kernel/sched_schedstats");
    guest.text(&["sh", "-c", &write]).unwrap();
}

#[track_caller]
fn says(guest: &Guest, kernel: &str, own_before: &str, own_after: &str) {
    let line = format!("fixed: the kernel's key is {kernel}, the module's own was {own_before} and is {own_after}");
    assert_eq!(ask(guest, "static_key"), (Seen::Fixed, line));
}

#[test]
fn branches_follow_the_kernels_key_and_the_modules_own() {
    let guest = guest();
    let vmpatch = Vmpatch::on(&guest);
    let module = MODULES.applied(Applied::StaticKey);
    for start in ["0", "1"] {
        flip(&guest, start);
        vmpatch.apply(&module);
        let (first, second) = if start == "1" { ("on", "off") } else { ("off", "on") };
        says(&guest, first, "off", "on");
        flip(&guest, if start == "1" { "0" } else { "1" });
        says(&guest, second, "on", "off");
        flip(&guest, start);
        says(&guest, first, "off", "on");
        vmpatch.revert_all();
        assert_eq!(ask(&guest, "static_key").0, Seen::Flawed);
        // The kernel's own list of branches is whole again.
        flip(&guest, "1");
        flip(&guest, "0");
    }
}

#[test]
fn two_patches_on_one_key_are_taken_out_in_any_order() {
    let guest = guest();
    let vmpatch = Vmpatch::on(&guest);
    let [first, second] = [Applied::StaticKey, Applied::StaticKeyToo].map(|module| MODULES.applied(module));
    vmpatch.run(&["apply", &first, &second]).expect(0);
    flip(&guest, "1");
    says(&guest, "on", "off", "on");
    // The node for the kernel's own branches came with the first patch, and the second is in front of it.
    let refused = vmpatch.run(&["revert", "test_static_key"]).expect(3);
    assert!(refused.complaint().contains("sched_schedstats"), "{refused}");
    vmpatch.run(&["revert", "test_static_key_too"]).expect(0);
    flip(&guest, "0");
    says(&guest, "off", "on", "off");
    vmpatch.revert_all();
    flip(&guest, "1");
    flip(&guest, "0");
}
