//! A guest moves into another QEMU while it works: nothing that it wrote is lost, nobody who talks to it is cut off, and its patches
//! stay in force and can be taken out in the new process.

use std::sync::LazyLock;

use e2e::bed::assert_healthy;
use e2e::kit::{self, Modules};
use e2e::load::Outfit;
use e2e::monitor::Monitor;
use e2e::moving::{INSTALLED, Keeper, RamFile, temporary_names};
use e2e::probe::{Seen, see};
use e2e::report::states;
use e2e::vmpatch::Vmpatch;
use images::build::hand_written::Applied;
use images::guest::{Guest, GuestConfig, Ram};
use images::kernel::Kernel;
use images::qemu;
use serde_json::Value;

static MODULE: LazyLock<String> = LazyLock::new(|| Modules::of(&Kernel::CLOUD_6_1).applied(Applied::Pair));

/// The program in the guest that tells old, new, and mixed.
const PROGRAM: &str = "pair";
/// Memory that the guest writes again and again, in MiB.
const WRITTEN_MIB: u32 = 16;

fn config() -> GuestConfig {
    kit::guest(Kernel::CLOUD_6_1)
}

fn number(report: &Value, pointer: &str) -> u64 {
    let number = report.pointer(pointer).and_then(Value::as_u64);
    number.unwrap_or_else(|| panic!("no {pointer} in {report}"))
}

/// Moves a guest that works and is patched, and has all of it looked at in its new process.
fn moves(config: GuestConfig, to: &str, way: &str) {
    let outfit = Outfit::new();
    let mut guest = Guest::boot(outfit.fit(config)).unwrap_or_else(|error| panic!("{error}"));
    let _keeper = Keeper::of(&guest);
    let vmpatch = Vmpatch::on(&guest);
    vmpatch.apply(&MODULE);
    outfit.start_work(&guest, WRITTEN_MIB);
    let talk = outfit.talk();
    let (old, banner) = (guest.pid(), vmpatch.inspect()["banner"].clone());

    let checked = vmpatch
        .run(&["upgrade", "--qemu", to, "--check", "--json"])
        .expect(0)
        .json();
    assert_eq!(
        (checked["state"].as_str(), checked["method"].as_str()),
        (Some("would move"), Some(way))
    );
    assert_eq!(guest.pid(), old);
    outfit.assert_reached("after --check");
    let report = vmpatch.run(&["upgrade", "--qemu", to, "--json"]).expect(0).json();
    assert_eq!(
        (report["state"].as_str(), report["method"].as_str()),
        (Some("moved"), Some(way)),
        "{report}"
    );
    assert_eq!(states(&report), [("test_pair", "applied", vec!["patched"; 2])]);
    let silence = talk.end();
    println!(
        "{way} from QEMU {} to {}: stood for {} µs, {} ms in all, an echo took {:?} at the most of {}",
        report["old"]["qemu"],
        report["new"]["qemu"],
        number(&report, "/downtime_us"),
        number(&report, "/total_ms"),
        silence.longest,
        silence.echoes
    );

    let new = u32::try_from(number(&report, "/new/pid")).unwrap();
    assert!(
        !std::path::Path::new(&format!("/proc/{old}")).join("exe").exists(),
        "the old process has ended"
    );
    guest.follow(new).unwrap();
    let lines = vmpatch.run_bare(&["domains", "--json"]).expect(0).json();
    let ours: Vec<_> = lines
        .as_array()
        .unwrap()
        .iter()
        .filter(|line| line["name"] == guest.name())
        .collect();
    assert!(
        matches!(ours[..], [line] if line["pid"] == new && line["patches"][0] == "test_pair"),
        "{lines}"
    );
    for path in guest.qmp_paths() {
        let mut monitor = Monitor::connect(&path).unwrap();
        assert_eq!(monitor.run_state(), "running", "{}", path.display());
    }
    assert_eq!(temporary_names(&guest), [""; 0]);
    let at_socket = Vmpatch::socket(&guest.qmp_path()).status();
    assert_eq!(at_socket["guest"]["pid"], new);
    assert_eq!(vmpatch.inspect()["banner"], banner);
    assert_eq!(see(&guest, PROGRAM), Seen::Fixed);
    vmpatch.revert_all();
    assert_eq!(see(&guest, PROGRAM), Seen::Flawed);
    let done = outfit.end_work(&guest);
    println!("rounds of memory, wrong, blocks of the disk, wrong: {done:?}");
    assert_healthy(&guest);
}

#[test]
fn a_working_guest_moves_from_qemu_7_2_and_its_patch_is_taken_out_in_10_0() {
    let mut config = config();
    config.qemu = qemu::bookworm().unwrap_or_else(|error| panic!("{error}"));
    // An alias, which is another machine type in each version.
    config.machine = "q35".to_owned();
    moves(config.ram(Ram::Private), INSTALLED, "precopy");
}

#[test]
fn a_working_guest_whose_ram_is_shared_moves_without_its_ram() {
    let mut config = config();
    config.machine = "q35,aux-ram-share=on".to_owned();
    moves(config, INSTALLED, "cpr-transfer");
}

#[test]
fn a_working_guest_whose_ram_is_a_file_moves_from_qemu_7_2_and_leaves_it_there() {
    let file = RamFile::new();
    let mut config = config();
    config.qemu = qemu::bookworm().unwrap_or_else(|error| panic!("{error}"));
    moves(file.fit(config), INSTALLED, "x-ignore-shared");
}
