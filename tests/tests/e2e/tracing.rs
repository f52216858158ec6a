//! vmpatch beside the guest's own use of ftrace: tracers, kprobes, livepatches. Neither may harm the other.

use std::sync::LazyLock;

use e2e::bed::{self, Lent};
use e2e::ftrace::Ftrace;
use e2e::kit::{self, Modules};
use e2e::own_livepatch::{self, OwnLivepatch};
use e2e::probe::{Seen, see};
use e2e::report::{redirects, states};
use e2e::vmpatch::Vmpatch;
use images::build::Cve;
use images::build::hand_written::Applied;
use images::kernel::Kernel;
use serde_json::json;

static MODULES: LazyLock<Modules> = LazyLock::new(|| Modules::of(&Kernel::CLOUD_6_1));
/// The patch, the function that it replaces, and the program that sees it.
static PATCH: LazyLock<String> = LazyLock::new(|| MODULES.cve(Cve::Y2026N52928));
const FUNCTION: &str = "unix_ioctl";
const PROGRAM: &str = "siocatmark";

fn guest() -> Lent {
    bed::lend(kit::guest(Kernel::CLOUD_6_1))
}

#[test]
fn a_guest_traces_all_functions_after_a_patch_and_the_fix_stays_in_force() {
    let guest = guest();
    let vmpatch = Vmpatch::on(&guest);
    let tracing = Ftrace::of(&guest);
    let applied = vmpatch.apply(&PATCH);
    assert_eq!(redirects(&applied), [(FUNCTION, "ftrace")]);

    for tracer in ["function", "function_graph"] {
        tracing.start(tracer);
        assert_eq!(see(&guest, PROGRAM), Seen::Fixed, "while {tracer} runs");
        let lines = tracing.trace().lines().count();
        assert!(lines > 1000, "{tracer} sees next to nothing: {lines} lines");
        tracing.reset();
        bed::assert_healthy(&guest);
    }
    tracing.assert_alive();
    assert_eq!(see(&guest, PROGRAM), Seen::Fixed);

    vmpatch.revert_all();
    assert_eq!(see(&guest, PROGRAM), Seen::Flawed);
    tracing.assert_alive();
}

#[test]
fn a_filter_or_a_kprobe_on_a_patched_function_does_no_harm() {
    let guest = guest();
    let vmpatch = Vmpatch::on(&guest);
    let tracing = Ftrace::of(&guest);
    vmpatch.apply(&PATCH);

    // ftrace was told to leave this function alone: whether the kernel then takes a filter with it is its own affair.
    tracing.try_set("set_ftrace_filter", FUNCTION);
    for tracer in ["function", "function_graph"] {
        tracing.start(tracer);
        assert_eq!(see(&guest, PROGRAM), Seen::Fixed, "while {tracer} runs with a filter");
        tracing.set("current_tracer", "nop");
    }
    tracing.reset();

    let taken = tracing.try_set("kprobe_events", &format!("p:late {FUNCTION}"));
    if taken.status.success() {
        tracing.try_set("events/kprobes/late/enable", "1");
    }
    assert_eq!(see(&guest, PROGRAM), Seen::Fixed, "with a kprobe");
    assert_eq!(states(&vmpatch.status())[0].2, ["patched"]);
    tracing.reset();

    vmpatch.revert_all();
    assert_eq!(see(&guest, PROGRAM), Seen::Flawed);
    tracing.assert_alive();
    // The function itself can be traced again.
    tracing.set("set_ftrace_filter", FUNCTION);
    tracing.start("function");
    see(&guest, PROGRAM);
    assert!(tracing.trace().contains(FUNCTION));
}

#[test]
fn a_patch_is_not_taken_out_from_under_a_tracer_that_came_after_it() {
    let guest = guest();
    let vmpatch = Vmpatch::on(&guest);
    let tracing = Ftrace::of(&guest);
    vmpatch.apply(&PATCH);
    // ftrace did not count this tracer in, and must not count it out.
    tracing.start("function");
    let refused = vmpatch.run(&["revert", "--all"]).expect(3);
    let complaint = refused.complaint();
    assert!(
        complaint.contains(FUNCTION) && complaint.contains("tracer"),
        "{complaint}"
    );
    assert_eq!(states(&vmpatch.status())[0].1, "applied");
    assert_eq!(see(&guest, PROGRAM), Seen::Fixed);
    tracing.reset();
    bed::assert_healthy(&guest);

    // A tracer of something else is no obstacle.
    tracing.set("set_ftrace_filter", "vfs_read");
    tracing.start("function");
    vmpatch.revert_all();
    assert_eq!(see(&guest, PROGRAM), Seen::Flawed);
    tracing.reset();
    tracing.assert_alive();
}

#[test]
fn a_traced_function_is_patched_behind_the_tracer_which_goes_on_seeing_it() {
    let guest = guest();
    let vmpatch = Vmpatch::on(&guest);
    let tracing = Ftrace::of(&guest);
    let is_seen = || {
        let seen = see(&guest, PROGRAM);
        (seen, tracing.trace().contains(FUNCTION))
    };
    tracing.set("set_ftrace_filter", FUNCTION);
    tracing.start("function");
    assert_eq!(is_seen(), (Seen::Flawed, true));

    let applied = vmpatch.apply(&PATCH);
    assert_eq!(redirects(&applied), [(FUNCTION, "body")]);
    assert_eq!(is_seen(), (Seen::Fixed, true));
    // The tracer may go, and come back.
    tracing.set("current_tracer", "nop");
    assert_eq!(is_seen(), (Seen::Fixed, false));
    tracing.start("function_graph");
    assert_eq!(is_seen(), (Seen::Fixed, true));
    tracing.start("function");
    assert_eq!(is_seen(), (Seen::Fixed, true));

    vmpatch.revert_all();
    assert_eq!(is_seen(), (Seen::Flawed, true));
    tracing.assert_alive();
}

#[test]
fn a_function_with_a_kprobe_on_its_entry_is_patched_behind_it_and_the_kprobe_goes_on_being_hit() {
    let guest = guest();
    let vmpatch = Vmpatch::on(&guest);
    let tracing = Ftrace::of(&guest);
    let is_hit = || {
        let before = tracing.kprobe_hits("entry");
        let seen = see(&guest, PROGRAM);
        (seen, tracing.kprobe_hits("entry") > before)
    };
    tracing.probe("entry", FUNCTION);
    assert_eq!(is_hit(), (Seen::Flawed, true));

    let applied = vmpatch.apply(&PATCH);
    assert_eq!(redirects(&applied), [(FUNCTION, "body")]);
    assert_eq!(is_hit(), (Seen::Fixed, true));
    tracing.reset();
    assert_eq!(see(&guest, PROGRAM), Seen::Fixed);
    tracing.probe("entry", FUNCTION);
    assert_eq!(is_hit(), (Seen::Fixed, true));

    vmpatch.revert_all();
    assert_eq!(is_hit(), (Seen::Flawed, true));
    tracing.assert_alive();
}

#[test]
fn a_kprobe_where_the_jump_would_stand_is_a_refusal() {
    let guest = guest();
    let vmpatch = Vmpatch::on(&guest);
    let tracing = Ftrace::of(&guest);
    // One holds the site, the other one the bytes behind it.
    tracing.probe("entry", FUNCTION);
    tracing.probe("behind", &format!("{FUNCTION}+5"));
    let refused = vmpatch.run(&["apply", &PATCH]).expect(3);
    let complaint = refused.complaint();
    assert!(
        complaint.contains(FUNCTION) && complaint.contains("kprobe"),
        "{complaint}"
    );
    assert_eq!(states(&vmpatch.status()), []);
    assert_eq!(see(&guest, PROGRAM), Seen::Flawed);
    tracing.reset();
    vmpatch.apply(&PATCH);
    assert_eq!(see(&guest, PROGRAM), Seen::Fixed);
}

/// The new functions are in ftrace's records like those of any module, in a group between the kernel's own and those of modules
/// that the guest loads afterwards.
#[test]
fn new_functions_are_traced_and_probed_and_hold_the_patch_while_they_are() {
    const CALLER: &str = "livepatch_sysinfo";
    const CALLEE: &str = "livepatch_si_meminfo";
    let guest = guest();
    let vmpatch = Vmpatch::on(&guest);
    let tracing = Ftrace::of(&guest);
    let is_held = |by: &str| {
        let refused = vmpatch.run(&["revert", "--all"]).expect(3);
        let complaint = refused.complaint();
        assert!(
            complaint.contains(by) && complaint.contains("traces or probes"),
            "{complaint}"
        );
    };
    vmpatch.apply(&MODULES.applied(Applied::Pair));
    guest
        .push(
            "/tmp/vmpatch_target.ko",
            &std::fs::read(MODULES.target()).unwrap(),
            0o644,
        )
        .unwrap();
    guest.text(&["insmod", "/tmp/vmpatch_target.ko"]).unwrap();

    tracing.set("set_ftrace_filter", CALLEE);
    tracing.start("function");
    assert_eq!(see(&guest, "pair"), Seen::Fixed);
    let trace = tracing.trace();
    assert!(trace.contains(&format!("{CALLEE} <-{CALLER}")), "{trace}");
    is_held(CALLEE);
    tracing.reset();

    tracing.set("set_graph_function", CALLER);
    tracing.start("function_graph");
    assert_eq!(see(&guest, "pair"), Seen::Fixed);
    let trace = tracing.trace();
    assert!(trace.contains(&format!("{CALLER} [test_pair]() {{")), "{trace}");
    assert!(trace.contains(&format!("  {CALLEE} [test_pair]()")), "{trace}");
    tracing.reset();

    let hits = |event| {
        assert_eq!(see(&guest, "pair"), Seen::Fixed);
        tracing.kprobe_hits(event)
    };
    tracing.probe("new", CALLEE);
    assert!(hits("new") > 0, "the kprobe is not hit");
    // The kprobe also holds a reference to the module.
    let refused = vmpatch.run(&["revert", "--all"]).expect(3);
    assert!(
        refused.complaint().contains("kprobe") || refused.complaint().contains("in use"),
        "{refused}"
    );
    tracing.reset();

    // The guest's module that came later stays traceable when the patch goes, and the other way round.
    vmpatch.revert_all();
    assert_eq!(see(&guest, "pair"), Seen::Flawed);
    tracing.set("set_ftrace_filter", "vmpatch_target_get");
    tracing.start("function");
    guest
        .text(&["cat", "/sys/module/vmpatch_target/parameters/value"])
        .unwrap();
    assert!(tracing.trace().contains("vmpatch_target_get"));
    vmpatch.apply(&MODULES.applied(Applied::Pair));
    tracing.reset();
    guest.text(&["rmmod", "vmpatch_target"]).unwrap();
    tracing.set("set_ftrace_filter", CALLEE);
    tracing.start("function");
    assert_eq!(see(&guest, "pair"), Seen::Fixed);
    assert!(tracing.trace().contains(CALLEE));
    tracing.reset();
    vmpatch.revert_all();
    tracing.assert_alive();
}

/// A tracer that was there first has not been counted in the new functions' records, and does not see them.
#[test]
fn a_patch_that_is_applied_while_all_functions_are_traced_does_no_harm() {
    let guest = guest();
    let vmpatch = Vmpatch::on(&guest);
    let tracing = Ftrace::of(&guest);
    tracing.start("function");
    vmpatch.apply(&MODULES.applied(Applied::Pair));
    assert_eq!(see(&guest, "pair"), Seen::Fixed);
    tracing.set("current_tracer", "nop");
    bed::assert_healthy(&guest);
    vmpatch.revert_all();
    tracing.assert_alive();
    assert_eq!(see(&guest, "pair"), Seen::Flawed);
}

#[test]
fn a_function_without_an_ftrace_site_is_patched_at_its_entry() {
    let guest = guest();
    let vmpatch = Vmpatch::on(&guest);
    let tracing = Ftrace::of(&guest);
    assert_eq!(see(&guest, "kstrtoint"), Seen::Flawed);
    let applied = vmpatch.apply(&MODULES.applied(Applied::Kstrtoint));
    assert_eq!(redirects(&applied), [("kstrtoint", "body")]);
    assert_eq!(see(&guest, "kstrtoint"), Seen::Fixed);
    tracing.assert_alive();
    assert_eq!(see(&guest, "kstrtoint"), Seen::Fixed);
    vmpatch.revert_all();
    assert_eq!(see(&guest, "kstrtoint"), Seen::Flawed);
}

#[test]
fn a_function_that_the_guests_own_livepatch_holds_is_refused_by_name_until_that_is_gone() {
    let guest = guest();
    let vmpatch = Vmpatch::on(&guest);
    let own = OwnLivepatch::load(&guest, &MODULES.applied(Applied::Printk), "test_printk");
    assert_eq!(see(&guest, "printk"), Seen::Fixed);

    let patch = MODULES.applied(Applied::Faults);
    for command in ["apply", "check"] {
        let refused = vmpatch.run(&[command, &patch]).expect(3);
        let complaint = refused.complaint();
        assert!(
            complaint.contains("__x64_sys_sysinfo")
                && complaint.contains("held by test_printk, a livepatch of the guest's own"),
            "{complaint}"
        );
    }
    assert_eq!(states(&vmpatch.status()), []);
    // Another function is free.
    vmpatch.apply(&MODULES.cve(Cve::Y2026N53249));
    assert_eq!(see(&guest, "lsrr"), Seen::Fixed);

    own.unload();
    assert_eq!(see(&guest, "printk"), Seen::Flawed);
    vmpatch.apply(&patch);
    assert_eq!(see(&guest, "faults"), Seen::Fixed);
    Ftrace::of(&guest).assert_alive();
}

#[test]
fn a_livepatch_that_the_guest_loads_onto_a_patched_function_does_no_harm() {
    let guest = guest();
    let vmpatch = Vmpatch::on(&guest);
    vmpatch.apply(&MODULES.applied(Applied::Printk));
    let own = OwnLivepatch::load(&guest, &MODULES.applied(Applied::Faults), "test_faults");
    assert_eq!(see(&guest, "printk"), Seen::Fixed);

    let status = vmpatch.status();
    let function = &status["patches"][0]["functions"][0];
    assert_eq!(
        (&function["state"], &function["livepatch"]),
        (&json!("patched"), &json!("test_faults"))
    );
    let warning = status["patches"][0]["warnings"][0].as_str().unwrap();
    assert!(
        warning.contains("__x64_sys_sysinfo") && warning.contains("test_faults"),
        "{warning}"
    );
    let refused = vmpatch.run(&["revert", "--all"]).expect(3);
    assert!(refused.complaint().contains("wanted by test_faults"), "{refused}");

    own.unload();
    assert_eq!(see(&guest, "printk"), Seen::Fixed);
    assert_eq!(states(&vmpatch.status())[0].2, ["patched"]);
    vmpatch.revert_all();
    assert_eq!(see(&guest, "printk"), Seen::Flawed);
    Ftrace::of(&guest).assert_alive();
}

#[test]
fn a_livepatch_that_the_guest_loads_comes_before_a_redirect_behind_the_site() {
    let guest = guest();
    let vmpatch = Vmpatch::on(&guest);
    let tracing = Ftrace::of(&guest);
    tracing.set("set_ftrace_filter", "__x64_sys_sysinfo");
    tracing.start("function");
    let applied = vmpatch.apply(&MODULES.applied(Applied::Printk));
    assert_eq!(redirects(&applied), [("__x64_sys_sysinfo", "body")]);
    tracing.reset();
    assert_eq!(see(&guest, "printk"), Seen::Fixed);

    let own = OwnLivepatch::load(&guest, &MODULES.applied(Applied::Faults), "test_faults");
    assert_eq!(see(&guest, "faults"), Seen::Fixed);
    assert_eq!(see(&guest, "printk"), Seen::Flawed);
    let status = vmpatch.status();
    assert_eq!(states(&status)[0].2, ["overridden"]);
    assert_eq!(status["patches"][0]["functions"][0]["livepatch"], "test_faults");
    let said = vmpatch.run(&["status"]).expect(0);
    assert!(said.stdout.contains("runs the code of test_faults"), "{said}");

    own.unload();
    assert_eq!(states(&vmpatch.status())[0].2, ["patched"]);
    assert_eq!(see(&guest, "printk"), Seen::Fixed);
    vmpatch.revert_all();
    tracing.assert_alive();
}

#[test]
fn a_guest_does_not_load_the_livepatch_that_it_has_already() {
    let guest = guest();
    let vmpatch = Vmpatch::on(&guest);
    vmpatch.apply(&PATCH);
    let refused = own_livepatch::insert(&guest, &PATCH).unwrap_err();
    assert!(refused.contains("File exists"), "{refused}");
    vmpatch.revert_all();

    let own = OwnLivepatch::load(&guest, &PATCH, &Cve::Y2026N52928.module_name());
    let refused = vmpatch.run(&["apply", &PATCH]).expect(3);
    assert!(
        refused.complaint().contains("is already loaded in the guest"),
        "{refused}"
    );
    own.unload();
}
