//! Published flaws of a Debian kernel: there before, gone after apply, back after revert, and no trace left in the guest.

use std::sync::LazyLock;

use e2e::bed::{self, Lent};
use e2e::kit::{self, Modules};
use e2e::monitor::Monitor;
use e2e::probe::{Seen, see};
use e2e::ram::{KernelPlace, Ram};
use e2e::report::{pause_us, redirects, states};
use e2e::vmpatch::Vmpatch;
use images::build::Cve;
use images::build::hand_written::Applied;
use images::kernel::Kernel;

static MODULES: LazyLock<Modules> = LazyLock::new(|| Modules::of(&Kernel::CLOUD_6_1));

fn guest() -> Lent {
    bed::lend(kit::guest(Kernel::CLOUD_6_1))
}

fn is_fixed_and_flawed_again(cve: Cve) {
    let guest = guest();
    let vmpatch = Vmpatch::on(&guest);
    let module = MODULES.cve(cve);
    assert_eq!(see(&guest, cve.program()), Seen::Flawed);
    let id = cve.module_name().replace('-', "_");
    let one = |state, functions| vec![(id.as_str(), state, vec![functions])];

    let checked = vmpatch.run(&["check", "--json", &module]).expect(0).json();
    assert_eq!(states(&checked), one("would apply", "original"));
    assert_eq!(redirects(&checked), [(cve.functions()[0], "ftrace")]);
    assert_eq!(see(&guest, cve.program()), Seen::Flawed);

    let applied = vmpatch.apply(&module);
    assert_eq!(states(&applied), one("applied", "patched"));
    assert_eq!(redirects(&applied), redirects(&checked));
    assert_eq!(see(&guest, cve.program()), Seen::Fixed);
    assert_eq!(states(&vmpatch.status()), states(&applied));

    let reverted = vmpatch.revert_all();
    assert_eq!(states(&reverted), one("reverted", "original"));
    assert_eq!(see(&guest, cve.program()), Seen::Flawed);

    for report in [&applied, &reverted] {
        let parts = ["stop_us", "registers_us", "check_us", "write_us", "resume_us"];
        let parts: u64 = parts.iter().map(|part| pause_us(report, part)).sum();
        assert!(parts <= pause_us(report, "total_us"), "{report}");
        assert!(
            pause_us(report, "total_us") <= pause_us(report, "pause_us_max"),
            "{report}"
        );
    }
}

#[test]
fn siocatmark_on_a_datagram_socket_is_flawed_fixed_by_apply_and_flawed_after_revert() {
    is_fixed_and_flawed_again(Cve::Y2026N52928);
}

#[test]
fn a_source_route_of_any_user_is_flawed_fixed_by_apply_and_flawed_after_revert() {
    is_fixed_and_flawed_again(Cve::Y2026N53249);
}

#[test]
fn apply_and_revert_leave_not_one_byte_changed_in_a_guest_that_stands_still() {
    let guest = guest();
    let vmpatch = Vmpatch::on(&guest);
    let mut monitor = Monitor::second(&guest);
    let modules = [
        MODULES.cve(Cve::Y2026N52928),
        MODULES.cve(Cve::Y2026N53249),
        MODULES.applied(Applied::Kstrtoint),
    ];

    monitor.stop();
    let before = Ram::save(&guest, &mut monitor).unwrap();
    let applied = vmpatch.run(&["apply", &modules[0], &modules[1], &modules[2]]);
    let between = Ram::save(&guest, &mut monitor).unwrap();
    let reverted = vmpatch.run(&["revert", "--all"]);
    let after = Ram::save(&guest, &mut monitor).unwrap();
    assert_eq!(
        monitor.run_state(),
        "paused",
        "a guest that its operator has paused stays paused"
    );
    monitor.cont();

    applied.expect(0);
    reverted.expect(0);
    assert_ne!(
        before.pages_unlike(&between, 1),
        [""; 0],
        "the patches are in the guest's memory"
    );
    assert_eq!(
        before.pages_unlike(&after, 20),
        [""; 0],
        "pages that revert has not put back"
    );
    assert_eq!(see(&guest, "siocatmark"), Seen::Flawed);
}

#[test]
fn revert_gives_a_running_guest_its_kernel_page_tables_and_ftrace_records_back() {
    let guest = guest();
    let vmpatch = Vmpatch::on(&guest);
    let mut monitor = Monitor::second(&guest);
    let place = KernelPlace::of(&guest, &vmpatch.inspect());
    // What a program's first run makes the kernel change in itself is done before.
    assert_eq!(see(&guest, "lsrr"), Seen::Flawed);
    let mut look = || {
        monitor.stop();
        let ram = Ram::save(&guest, &mut monitor).unwrap();
        monitor.cont();
        (place.image(&ram), place.page_tables(&ram), place.ftrace_records(&ram))
    };

    let before = look();
    vmpatch
        .run(&["apply", &MODULES.cve(Cve::Y2026N52928), &MODULES.cve(Cve::Y2026N53249)])
        .expect(0);
    assert_eq!(see(&guest, "lsrr"), Seen::Fixed);
    let between = look();
    vmpatch.revert_all();
    assert_eq!(see(&guest, "lsrr"), Seen::Flawed);
    let after = look();

    let unlike = |one: &[u8], other: &[u8]| one.iter().zip(other).filter(|(one, other)| one != other).count();
    assert_eq!(
        unlike(&before.2, &between.2),
        2,
        "each function's record has one flag more, in one byte"
    );
    assert!(
        unlike(&before.0, &between.0) > 8192,
        "the new code lies in the kernel's text, and two jumps"
    );
    assert_ne!(before.1, between.1, "page tables map the new code");
    assert_eq!(unlike(&before.0, &after.0), 0, "bytes of text and read-only data");
    assert_eq!(before.1, after.1);
    assert_eq!(unlike(&before.2, &after.2), 0, "bytes of ftrace records");
}
