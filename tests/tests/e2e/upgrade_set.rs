//! What was set through QMP since QEMU began: it is there after a move, or keeps the guest where it is, by its name.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use e2e::kit;
use e2e::monitor::Monitor;
use e2e::moving::{INSTALLED, Keeper, successors};
use e2e::vmpatch::Vmpatch;
use images::guest::{Guest, Ram};
use images::kernel::Kernel;
use serde_json::{Value, json};

/// A folder for a disk; removed when it is dropped.
struct Place(PathBuf);

impl Place {
    fn new() -> Self {
        let folder = std::env::temp_dir().join(format!("vmpatch-set-{}", std::process::id()));
        fs::create_dir(&folder).unwrap();
        Self(folder)
    }

    fn path(&self, name: &str) -> String {
        self.0.join(name).display().to_string()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        drop(fs::remove_dir_all(&self.0));
    }
}

/// A guest with what can be set: a disk, a balloon, an iothread, and a port for another device.
fn start(place: &Place) -> Guest {
    let disk = place.path("disk");
    let image = Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2", "-o", "preallocation=full", &disk, "16M"])
        .status();
    assert!(image.unwrap().success());
    let drive = format!("file={disk},if=none,id=d1,format=qcow2");
    let words = [
        "-drive",
        &drive,
        "-object",
        "iothread,id=io1",
        "-device",
        "virtio-blk-pci,drive=d1,id=block1,iothread=io1",
        "-device",
        "virtio-balloon-pci,id=balloon1",
        "-device",
        "pcie-root-port,id=port1",
    ];
    let config = kit::guest(Kernel::CLOUD_6_1).ram(Ram::Private);
    let config = words.iter().fold(config, |config, word| config.qemu_arg(word));
    Guest::boot(config).unwrap_or_else(|error| panic!("{error}"))
}

const BALLOON: &str = "/machine/peripheral/balloon1";

fn get(monitor: &mut Monitor, path: &str, property: &str) -> Value {
    monitor
        .call("qom-get", json!({"path": path, "property": property}))
        .unwrap()
}

fn set(monitor: &mut Monitor, path: &str, property: &str, value: Value) {
    let arguments = json!({"path": path, "property": property, "value": value});
    monitor.call("qom-set", arguments).unwrap();
}

#[test]
fn what_was_set_while_the_guest_ran_moves_with_it_or_keeps_it_where_it_is() {
    let place = Place::new();
    let mut guest = start(&place);
    let _keeper = Keeper::of(&guest);
    let vmpatch = Vmpatch::on(&guest);
    let refused = |guest: &Guest, words: &str| {
        let answer = vmpatch.run(&["upgrade", "--qemu", INSTALLED, "--check"]).expect(3);
        assert!(answer.complaint().contains(words), "{words:?} is not in: {answer}");
        // After a move the guest's own process has that word on its command line, too.
        let others = successors(guest.name()).into_iter().filter(|pid| *pid != guest.pid());
        assert_eq!(others.count(), 0, "{answer}");
    };
    let mut monitor = Monitor::second(&guest);
    for (command, arguments, words, undo, back) in [
        (
            "block-dirty-bitmap-add",
            json!({"node": "d1", "name": "b1"}),
            "the dirty bitmap `b1` of ",
            "block-dirty-bitmap-remove",
            json!({"node": "d1", "name": "b1"}),
        ),
        (
            "drive-backup",
            json!({"device": "d1", "job-id": "j1", "target": place.path("copy"), "sync": "full", "speed": 1}),
            "the job `j1` (backup, running)",
            "block-job-cancel",
            json!({"device": "j1", "force": true}),
        ),
        (
            "migrate-set-capabilities",
            json!({"capabilities": [{"capability": "auto-converge", "state": true}]}),
            "the capability `auto-converge` of migration",
            "migrate-set-capabilities",
            json!({"capabilities": [{"capability": "auto-converge", "state": false}]}),
        ),
        (
            "object-add",
            json!({"qom-type": "iothread", "id": "io2"}),
            "another object than the old one (no other, not io2 (iothread))",
            "object-del",
            json!({"id": "io2"}),
        ),
        (
            "chardev-add",
            json!({"id": "c1", "backend": {"type": "null", "data": {}}}),
            "another character device than the old one (no other, not c1)",
            "chardev-remove",
            json!({"id": "c1"}),
        ),
    ] {
        monitor.call(command, arguments).unwrap();
        refused(&guest, words);
        monitor.call(undo, back).unwrap();
    }
    let address = json!({"type": "unix", "data": {"path": place.path("nbd")}});
    monitor.call("nbd-server-start", json!({"addr": address})).unwrap();
    let export = json!({"type": "nbd", "id": "e1", "node-name": "", "name": "e1"});
    let node = monitor.call("query-block", json!({})).unwrap();
    let node = node
        .as_array()
        .unwrap()
        .iter()
        .find(|block| block["device"] == "d1")
        .unwrap();
    let mut export = export;
    export["node-name"] = node["inserted"]["node-name"].clone();
    monitor.call("block-export-add", export).unwrap();
    refused(&guest, "the nbd export `e1` of ");
    monitor.call("nbd-server-stop", json!({})).unwrap();

    let limits = json!({"device": "d1", "bps": 0, "bps_rd": 0, "bps_wr": 0, "iops": 1000, "iops_rd": 0, "iops_wr": 0, "iops_max": 2000});
    monitor.call("block_set_io_throttle", limits).unwrap();
    set(&mut monitor, BALLOON, "guest-stats-polling-interval", json!(7));
    set(&mut monitor, "/objects/io1", "poll-max-ns", json!(12345));
    drop(monitor);
    let report = vmpatch
        .run(&["upgrade", "--qemu", INSTALLED, "--json"])
        .expect(0)
        .json();
    guest
        .follow(u32::try_from(report["new"]["pid"].as_u64().unwrap()).unwrap())
        .unwrap();
    let mut monitor = Monitor::second(&guest);
    let blocks = monitor.call("query-block", json!({})).unwrap();
    let block = blocks
        .as_array()
        .unwrap()
        .iter()
        .find(|block| block["device"] == "d1")
        .unwrap();
    assert_eq!(
        (&block["inserted"]["iops"], &block["inserted"]["iops_max"]),
        (&json!(1000), &json!(2000)),
        "{block}"
    );
    assert_eq!(get(&mut monitor, BALLOON, "guest-stats-polling-interval"), 7);
    assert_eq!(get(&mut monitor, "/objects/io1", "poll-max-ns"), 12345);

    // It can't be taken out again.
    monitor
        .call("device_add", json!({"driver": "virtio-rng-pci", "bus": "port1"}))
        .unwrap();
    refused(&guest, "another list of devices without an id than the old one");
    assert_eq!(monitor.run_state(), "running");
}
