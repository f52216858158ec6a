//! Guests that run an integrity guard: here a module with LKRG's name and settings. The real one was run by hand
//! (docs/operating.md).

use std::fs;
use std::sync::LazyLock;

use e2e::bed::{self, Lent};
use e2e::kit::{self, Modules};
use e2e::report::states;
use e2e::vmpatch::Vmpatch;
use images::build::hand_written::Applied;
use images::guest::Guest;
use images::kernel::Kernel;
use serde_json::Value;

static MODULES: LazyLock<Modules> = LazyLock::new(|| Modules::of(&Kernel::CLOUD_6_1));

fn guest() -> Lent {
    bed::lend(kit::guest(Kernel::CLOUD_6_1))
}

/// Loads the guard into the guest; without it the guest is as any other.
struct Guarded<'a>(&'a Guest);

impl<'a> Guarded<'a> {
    fn load(guest: &'a Guest, parameters: &[&str]) -> Self {
        let file = fs::read(MODULES.lkrg()).unwrap();
        guest.push("/tmp/lkrg.ko", &file, 0o644).unwrap();
        guest.text(&[&["insmod", "/tmp/lkrg.ko"], parameters].concat()).unwrap();
        Self(guest)
    }

    /// Sets one of its sysctls.
    fn set(&self, name: &str, value: u32) {
        let command = format!("echo {value} >/proc/sys/lkrg/{name}");
        self.0.text(&["sh", "-c", &command]).unwrap();
    }

    fn unload(self) {
        self.0.text(&["rmmod", "lkrg"]).unwrap();
    }
}

fn reaction(report: &Value) -> &Value {
    &report["guest"]["integrity_guard"]["reaction"]
}

#[test]
fn a_guard_that_panics_keeps_a_patch_out() {
    let guest = guest();
    let vmpatch = Vmpatch::on(&guest);
    let module = MODULES.applied(Applied::Pause);
    assert!(vmpatch.status()["guest"].get("integrity_guard").is_none());

    let guard = Guarded::load(&guest, &[]);
    for command in ["check", "apply"] {
        let refused = vmpatch.run(&[command, &module]).expect(3);
        let complaint = refused.complaint();
        assert!(complaint.contains("the guest runs LKRG, which panics"), "{refused}");
        assert!(complaint.contains("sysctl lkrg.kint_enforce=0"), "{refused}");
    }
    assert_eq!(reaction(&vmpatch.status()), "panics");
    let status = vmpatch.run(&["status"]).expect(0);
    assert!(status.stdout.contains("LKRG"), "{status}");
    guard.unload();
    vmpatch.apply(&module);
}

#[test]
fn a_guard_that_logs_or_does_not_check_lets_a_patch_in_with_a_warning() {
    let guest = guest();
    let vmpatch = Vmpatch::on(&guest);
    let module = MODULES.applied(Applied::Pause);
    let guard = Guarded::load(&guest, &["kint_enforce=1"]);
    let applied = vmpatch.run(&["apply", &module]).expect(0);
    assert!(applied.stdout.contains("LKRG in the guest logs"), "{applied}");
    vmpatch.revert_all();

    guard.set("kint_enforce", 2);
    guard.set("kint_validate", 0);
    let applied = vmpatch.apply(&module);
    assert_eq!(reaction(&applied), "off");
    vmpatch.revert_all();
    guard.unload();
}

#[test]
fn a_guard_that_came_after_the_patch_keeps_it_from_being_reverted() {
    let guest = guest();
    let vmpatch = Vmpatch::on(&guest);
    let applied = vmpatch.apply(&MODULES.applied(Applied::Pause));
    let guard = Guarded::load(&guest, &[]);
    let refused = vmpatch.run(&["revert", "--all"]).expect(3);
    assert!(
        refused.complaint().contains("the guest runs LKRG, which panics"),
        "{refused}"
    );
    let status = vmpatch.status();
    assert_eq!(
        (states(&status), reaction(&status)),
        (states(&applied), &Value::from("panics"))
    );
    guard.set("kint_enforce", 0);
    vmpatch.revert_all();
    guard.unload();
}

#[test]
fn a_guard_without_the_settings_that_are_known_is_taken_for_one_that_panics() {
    let guest = guest();
    let vmpatch = Vmpatch::on(&guest);
    let guard = Guarded::load(&guest, &["settings=0"]);
    let refused = vmpatch.run(&["apply", &MODULES.applied(Applied::Pause)]).expect(3);
    assert!(
        refused.complaint().contains("whose settings were not found"),
        "{refused}"
    );
    assert_eq!(reaction(&vmpatch.status()), "unknown");
    guard.unload();
}
