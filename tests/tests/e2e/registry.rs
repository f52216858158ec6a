//! What is patched is known to the guest alone: any vmpatch reads it there, and a reboot ends it.

use std::sync::LazyLock;

use e2e::bed::{self, Lent};
use e2e::kit::{self, Modules};
use e2e::probe::{Seen, see};
use e2e::report::states;
use e2e::vmpatch::Vmpatch;
use images::build::Cve;
use images::build::hand_written::Applied;
use images::kernel::Kernel;
use serde_json::{Value, json};

static MODULES: LazyLock<Modules> = LazyLock::new(|| Modules::of(&Kernel::CLOUD_6_1));

fn guest() -> Lent {
    bed::lend(kit::guest(Kernel::CLOUD_6_1))
}

#[test]
fn patches_are_listed_oldest_first_and_reverted_one_by_one() {
    let guest = guest();
    let vmpatch = Vmpatch::on(&guest);
    assert_eq!(states(&vmpatch.status()), []);
    vmpatch.apply(&MODULES.applied(Applied::Kstrtoint));
    vmpatch
        .run(&["apply", &MODULES.cve(Cve::Y2026N53249), &MODULES.cve(Cve::Y2026N52928)])
        .expect(0);

    let status = vmpatch.status();
    let patched = |id| (id, "applied", vec!["patched"]);
    let all = ["test_kstrtoint", "livepatch_cve_2026_53249", "livepatch_cve_2026_52928"];
    assert_eq!(states(&status), all.map(patched));
    assert_eq!(status["guest"]["release"], guest.kernel_release());
    assert_eq!(status["guest"]["domain"], guest.name());
    assert_eq!(status["guest"]["pid"], guest.pid());

    vmpatch.run(&["revert", all[1]]).expect(0);
    assert_eq!(states(&vmpatch.status()), [patched(all[0]), patched(all[2])]);
    assert_eq!(
        (see(&guest, "lsrr"), see(&guest, "siocatmark")),
        (Seen::Flawed, Seen::Fixed)
    );
    assert_eq!(see(&guest, "kstrtoint"), Seen::Fixed);

    let unknown = vmpatch.run(&["revert", all[2], "no_such_patch"]).expect(3);
    let complaint = unknown.complaint();
    assert!(
        complaint.contains("no patch no_such_patch") && complaint.contains(all[0]),
        "{complaint}"
    );
    assert_eq!(
        see(&guest, "siocatmark"),
        Seen::Fixed,
        "nothing is reverted if not all can be"
    );

    let reverted = vmpatch.revert_all();
    let original = |id| (id, "reverted", vec!["original"]);
    assert_eq!(
        states(&reverted),
        [original(all[2]), original(all[0])],
        "the last applied goes first"
    );
    assert_eq!(states(&vmpatch.status()), []);
    let none = vmpatch.run(&["status"]).expect(0);
    assert_eq!(
        none.stdout,
        format!("{}: kernel {}, no patches\n", guest.name(), guest.kernel_release())
    );
}

#[test]
fn a_patch_is_not_applied_twice() {
    let guest = guest();
    let vmpatch = Vmpatch::on(&guest);
    let printk = MODULES.applied(Applied::Printk);
    vmpatch.apply(&printk);
    assert_eq!(vmpatch.apply(&printk)["patches"][0]["state"], "already applied");
    assert_eq!(see(&guest, "printk"), Seen::Fixed);
}

#[test]
fn after_a_reboot_the_guest_is_not_patched_and_can_be_patched_again() {
    let guest = guest();
    let vmpatch = Vmpatch::on(&guest);
    let module = MODULES.cve(Cve::Y2026N52928);
    vmpatch.apply(&module);
    guest.reboot().unwrap();
    assert_eq!(see(&guest, "siocatmark"), Seen::Flawed);
    assert_eq!(states(&vmpatch.status()), []);
    vmpatch.apply(&module);
    assert_eq!(see(&guest, "siocatmark"), Seen::Fixed);
}

#[test]
fn inspect_tells_what_was_found_and_by_what() {
    // No other test asks for such a guest, so this one was never patched.
    let guest = bed::lend(kit::guest(Kernel::CLOUD_6_1).append("never_patched"));
    let vmpatch = Vmpatch::on(&guest);
    let found = vmpatch.inspect();
    assert_eq!(found["guest"]["release"], guest.kernel_release());
    assert_eq!(found["vcpus"], guest.config().vcpus);
    // Less what lies behind the ROMs below 1 MiB.
    let size = u64::from(guest.config().memory_mib) << 20;
    assert!(
        (size - (512 << 10)..=size).contains(&found["ram"].as_u64().unwrap()),
        "{found}"
    );
    assert_eq!(
        found["banner"].as_str().unwrap().trim_end(),
        guest.text(&["cat", "/proc/version"]).unwrap()
    );
    assert_eq!(found["registry"], Value::Null);
    let sources = found["sources"].to_string();
    for source in ["interrupt table", "symbols", "VMCOREINFO"] {
        assert!(sources.contains(source), "{sources}");
    }
    let cave: u64 = found["caves"]
        .as_array()
        .unwrap()
        .iter()
        .map(|cave| cave["len"].as_u64().unwrap())
        .sum();
    assert!(cave >= 1 << 20, "{found}");
    vmpatch.apply(&MODULES.cve(Cve::Y2026N52928));
    assert_ne!(vmpatch.inspect()["registry"], Value::Null);
    let text = vmpatch.run(&["inspect"]).expect(0).stdout;
    assert!(
        text.contains(guest.kernel_release()) && text.contains("registry"),
        "{text}"
    );
}

#[test]
fn a_guest_is_reached_by_name_or_by_socket_and_listed_among_the_domains() {
    let guest = guest();
    let by_socket = Vmpatch::socket(&guest.qmp_path());
    by_socket.apply(&MODULES.cve(Cve::Y2026N52928));
    assert_eq!(states(&Vmpatch::on(&guest).status()), states(&by_socket.status()));
    let domains = by_socket.run_bare(&["domains", "--json"]).expect(0).json();
    let ours = domains
        .as_array()
        .unwrap()
        .iter()
        .find(|domain| domain["pid"] == guest.pid());
    let ours = ours.unwrap_or_else(|| panic!("{domains}"));
    assert_eq!(ours["name"], guest.name());
    assert_eq!(ours["kernel"], guest.kernel_release());
    assert_eq!(ours["patches"], json!(["livepatch_cve_2026_52928"]));
}

#[test]
fn the_bare_command_applies_every_module_of_the_directory_that_is_for_this_kernel() {
    let guest = guest();
    let vmpatch = Vmpatch::on(&guest);
    let folder = guest.folder().join("patches");
    std::fs::create_dir(&folder).unwrap();
    let put = |name: &str, module: &str| std::fs::copy(module, folder.join(name)).unwrap();
    put("b.ko", &MODULES.cve(Cve::Y2026N52928));
    put("a.ko", &MODULES.cve(Cve::Y2026N53249));
    put("elsewhere.ko", &Modules::of(&Kernel::GENERIC_6_1).cve(Cve::Y2026N52928));
    let patches = ["--patches", folder.to_str().unwrap()];
    let bare = [&patches[..], &["--json"]].concat();

    let report = vmpatch.run(&bare).expect(0).json();
    let patched = |id| (id, "applied", vec!["patched"]);
    assert_eq!(
        states(&report),
        ["livepatch_cve_2026_52928", "livepatch_cve_2026_53249"].map(patched),
        "oldest first"
    );
    assert_eq!(
        (see(&guest, "lsrr"), see(&guest, "siocatmark")),
        (Seen::Fixed, Seen::Fixed)
    );

    std::fs::write(folder.join("broken.ko"), "not a module").unwrap();
    put("kstrtoint.ko", &MODULES.applied(Applied::Kstrtoint));
    let answer = vmpatch.run(&bare).expect(3);
    let (complaint, report) = (answer.complaint(), answer.json());
    let states: Vec<_> = states(&report).into_iter().map(|(id, state, _)| (id, state)).collect();
    let known = |id| (id, "already applied");
    let expected = [
        known("livepatch_cve_2026_52928"),
        known("livepatch_cve_2026_53249"),
        ("broken", "not applied"),
        ("test_kstrtoint", "applied"),
    ];
    assert_eq!(states, expected);
    assert!(
        report["patches"][2]["reason"]
            .as_str()
            .unwrap()
            .contains("not an ELF file"),
        "{report}"
    );
    assert!(complaint.contains("1 of 4 modules"), "{complaint}");
    assert_eq!(see(&guest, "kstrtoint"), Seen::Fixed);
    std::fs::remove_dir_all(folder).unwrap();
}

#[test]
fn a_command_line_that_makes_no_sense_ends_with_2() {
    let nobody = Vmpatch::domain("nobody");
    for line in [
        &["status"][..],
        &["--qmp", "/no", "--domain", "no", "status"],
        &["--domain", "no", "revert"],
    ] {
        let answer = nobody.run_bare(line).expect(2);
        assert!(answer.stdout.is_empty() && !answer.stderr.is_empty(), "{answer}");
    }
    assert_eq!(nobody.run(&["apply"]).code, Some(2));
    assert_eq!(nobody.run(&["status", "--timeout", "soon"]).code, Some(2));
}
