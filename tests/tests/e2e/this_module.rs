//! A patch that uses `THIS_MODULE`: the guest's own `struct module` of it.

use e2e::bed;
use e2e::kit::{self, Modules};
use e2e::probe::{Seen, see};
use e2e::report::states;
use e2e::vmpatch::Vmpatch;
use images::build::hand_written::Applied;
use images::kernel::Kernel;

/// The references to a module, as the guest lists them: its own to itself among them.
fn references(guest: &images::guest::Guest, name: &str) -> Option<u32> {
    let modules = guest.text(&["cat", "/proc/modules"]).expect("the guest runs a program");
    let line = modules.lines().find_map(|line| line.strip_prefix(name))?;
    line.split_whitespace().nth(1)?.parse().ok()
}

/// The kernel's own selftest (tools/testing/selftests/livepatch/test-livepatch.sh) but for who loads the module.
fn runs_the_selftest(kernel: &Kernel) {
    let module = Modules::of(kernel).selftest();
    let guest = bed::lend(kit::guest(kernel.clone()));
    let vmpatch = Vmpatch::on(&guest);
    let says = || guest.text(&["cat", "/proc/cmdline"]).expect("the guest runs a program");
    let before = says();
    vmpatch.apply(&module);
    assert_eq!(says(), "test_klp_livepatch: this has been live patched");
    assert_eq!(references(&guest, "test_klp_livepatch"), Some(1));
    let reverted = vmpatch.revert_all();
    assert_eq!(
        states(&reverted),
        [("test_klp_livepatch", "reverted", vec!["original"])]
    );
    assert_eq!(says(), before);
}

#[test]
fn the_kernels_selftest_prints_the_name_of_its_module_on_6_1() {
    runs_the_selftest(&Kernel::CLOUD_6_1);
}

#[test]
fn the_kernels_selftest_prints_the_name_of_its_module_on_7_2() {
    runs_the_selftest(&Kernel::CLOUD_7_2);
}

#[test]
fn a_patch_that_holds_a_reference_to_its_module_is_in_use_until_it_gives_it_back() {
    let guest = bed::lend(kit::guest(Kernel::CLOUD_6_1));
    let vmpatch = Vmpatch::on(&guest);
    let (module, program) = (
        Modules::of(&Kernel::CLOUD_6_1).applied(Applied::References),
        Applied::References.program(),
    );
    let checked = vmpatch.run(&["check", "--json", &module]).expect(0).json();
    let patch = &checked["patches"][0];
    assert_eq!(patch["escapes"], serde_json::Value::Null, "{checked}");
    assert!(
        patch["warnings"]
            .to_string()
            .contains("vmpatch_default keeps its value"),
        "{checked}"
    );
    vmpatch.apply(&module);
    assert_eq!(references(&guest, "test_references"), Some(1));
    assert_eq!(see(&guest, program), Seen::Fixed);
    assert_eq!(references(&guest, "test_references"), Some(2));
    let refused = vmpatch.run(&["revert", "--all"]).expect(3);
    assert!(
        refused
            .complaint()
            .contains("test_references is in use: the guest holds 1 references"),
        "{refused}"
    );
    assert_eq!(see(&guest, program), Seen::Fixed, "it gives the reference back");
    assert_eq!(references(&guest, "test_references"), Some(1));
    let reverted = vmpatch.revert_all();
    assert_eq!(states(&reverted), [("test_references", "reverted", vec!["original"])]);
    assert_eq!(see(&guest, program), Seen::Flawed);
}
