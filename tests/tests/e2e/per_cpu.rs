//! A patch's own variables on each CPU: taken from what the guest reserves for its modules, beside theirs, and given back.

use std::fs;

use e2e::bed;
use e2e::kit::{self, Modules};
use e2e::probe::{Seen, see};
use e2e::vmpatch::Vmpatch;
use images::build::hand_written::Applied;
use images::guest::Guest;
use images::kernel::Kernel;

fn load(guest: &Guest) {
    guest.text(&["insmod", "/tmp/vmpatch_percpu.ko"]).unwrap();
}

/// Whether the guest's own module still finds all that it has written to its per-CPU memory.
#[track_caller]
fn is_intact(guest: &Guest) {
    let said = guest
        .text(&["cat", "/sys/module/vmpatch_percpu/parameters/intact"])
        .unwrap();
    assert_eq!(said, "0 bytes wrong");
}

#[test]
fn a_patch_and_the_guests_own_modules_share_the_reserve_of_per_cpu_memory() {
    let kernel = Kernel::CLOUD_6_1;
    let modules = Modules::of(&kernel);
    let guest = bed::lend(kit::guest(kernel));
    let vmpatch = Vmpatch::on(&guest);
    let module = modules.applied(Applied::Sections);
    guest
        .push("/tmp/vmpatch_percpu.ko", &fs::read(modules.percpu()).unwrap(), 0o644)
        .unwrap();

    // The patch first, then the guest's module; taken out in the same order.
    vmpatch.apply(&module);
    load(&guest);
    assert_eq!(see(&guest, "sections"), Seen::Fixed);
    is_intact(&guest);
    vmpatch.revert_all();
    is_intact(&guest);
    // Now the other way round. Each time the whole reserve is there: two pieces of the module's would not fit.
    vmpatch.apply(&module);
    guest.text(&["rmmod", "vmpatch_percpu"]).unwrap();
    for _ in 0..3 {
        load(&guest);
        assert_eq!(see(&guest, "sections"), Seen::Fixed);
        is_intact(&guest);
        guest.text(&["rmmod", "vmpatch_percpu"]).unwrap();
        vmpatch.revert_all();
        vmpatch.apply(&module);
    }
    load(&guest);
    is_intact(&guest);
    vmpatch.revert_all();
    assert_eq!(see(&guest, "sections"), Seen::Flawed);
    guest.text(&["rmmod", "vmpatch_percpu"]).unwrap();
}
