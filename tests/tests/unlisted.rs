//! Tasks that no list of the kernel names, but that still run its code.

use std::time::{Duration, Instant};

use e2e::bed::{self, assert_healthy};
use e2e::kit::{self, Modules};
use e2e::report::states;
use e2e::vmpatch::Vmpatch;
use images::kernel::Kernel;

/// The task sleeps for 25 s of the guest's time.
const AWAKE_MAX: Duration = Duration::from_secs(120);

/// A task at the end of do_exit() has left all lists, and sleeps in the new code; when it wakes, that must still be there.
fn a_task_that_sleeps_in_the_new_code_at_its_end_keeps_the_patch_in(kernel: Kernel) {
    let module = Modules::of(&kernel).exit_tail();
    let guest = bed::lend(kit::guest(kernel));
    let vmpatch = Vmpatch::on(&guest);
    vmpatch.apply(&module);
    assert_eq!(guest.text(&["/opt/exit_tail"]).unwrap(), "unlisted");
    let revert = ["revert", "--all", "--timeout", "2"];
    let refused = vmpatch.run(&revert).expect(4);
    let complaint = refused.complaint();
    assert!(
        complaint.contains("no list of tasks") && complaint.contains("the new code of test_exit_tail"),
        "{complaint}"
    );
    assert_eq!(states(&vmpatch.status())[0].1, "applied");
    let start = Instant::now();
    while vmpatch.run(&revert).code != Some(0) {
        assert!(start.elapsed() < AWAKE_MAX, "the task never ends");
    }
    std::thread::sleep(Duration::from_secs(1));
    assert_healthy(&guest);
}

#[test]
fn a_task_that_sleeps_in_the_new_code_at_its_end_keeps_the_patch_in_on_6_1() {
    a_task_that_sleeps_in_the_new_code_at_its_end_keeps_the_patch_in(Kernel::CLOUD_6_1);
}
