//! Another QMP client that saves, stops, resumes, migrates or resets the guest within vmpatch's pause.

use std::path::PathBuf;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use e2e::bed::assert_healthy;
use e2e::cut::{Call, Side, let_go, run_to};
use e2e::kit::{self, Modules};
use e2e::monitor::Monitor;
use e2e::probe::{Seen, see};
use e2e::vmpatch::{Answer, Vmpatch};
use images::build::hand_written::Applied;
use images::guest::Guest;
use images::kernel::Kernel;
use serde_json::json;

/// The program in the guest that tells old, new, and mixed.
const PROGRAM: &str = "pair";

/// How long QEMU may take to cancel a migration, and between two looks.
const CANCEL_LIMIT: Duration = Duration::from_secs(30);
const CANCEL_WAIT: Duration = Duration::from_millis(20);

struct Scene {
    guest: Guest,
    vmpatch: Vmpatch,
    monitor: Monitor,
    module: String,
    folder: PathBuf,
}

impl Scene {
    /// A guest that can be saved, as it has a disk that takes snapshots.
    fn new(name: &str) -> Self {
        let folder = std::env::temp_dir().join(format!("vmpatch-meddling-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let disk = folder.join("disk.qcow2").display().to_string();
        let made = Command::new("qemu-img")
            .args(["create", "-q", "-f", "qcow2", &disk, "4M"])
            .status();
        assert!(made.unwrap().success());
        let drive = format!("file={disk},if=none,id=disk0,format=qcow2");
        let words = ["-drive", &drive, "-device", "virtio-blk-pci,drive=disk0"];
        let config = kit::guest(Kernel::CLOUD_6_1);
        let guest = Guest::boot(words.iter().fold(config, |config, word| config.qemu_arg(word))).unwrap();
        Self {
            vmpatch: Vmpatch::on(&guest),
            monitor: Monitor::second(&guest),
            guest,
            module: Modules::of(&Kernel::CLOUD_6_1).applied(Applied::Pair),
            folder,
        }
    }

    /// A command of QEMU's monitor for people, which says nothing where it is done.
    #[track_caller]
    fn human(&mut self, line: &str) {
        let said = self
            .monitor
            .call("human-monitor-command", json!({ "command-line": line }));
        assert_eq!(said.unwrap(), "", "{line}");
    }

    /// Applies the module; on that side of the write in its pause, somebody else gives QEMU a command.
    #[track_caller]
    fn apply_while(&mut self, side: Side, line: &str) -> Answer {
        let args = ["apply", self.module.as_str()];
        let child = self.vmpatch.start(&args);
        run_to(&child, Call::WriteMemory, 1, side);
        let said = self
            .monitor
            .call("human-monitor-command", json!({ "command-line": line }));
        let_go(&child);
        let answer = self.vmpatch.finish(&args, child);
        println!("{side:?} {line}: {said:?}\n{answer}");
        answer
    }

    /// Cancelling takes its time, and vmpatch refuses until it is done.
    #[track_caller]
    fn wait_for_the_migrations_end(&mut self) {
        let start = Instant::now();
        while self.monitor.call("query-migrate", json!({})).unwrap()["status"] != "cancelled" {
            assert!(start.elapsed() < CANCEL_LIMIT, "the migration is not cancelled");
            thread::sleep(CANCEL_WAIT);
        }
    }

    /// The guest runs, wholly old or wholly new.
    #[track_caller]
    fn assert_seen(&mut self, seen: Seen) {
        assert_eq!(self.monitor.run_state(), "running");
        assert_eq!(see(&self.guest, PROGRAM), seen);
        assert_healthy(&self.guest);
    }

    #[track_caller]
    fn revert(&mut self) {
        self.vmpatch.run(&["revert", "--all"]).expect(0);
        self.assert_seen(Seen::Flawed);
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

#[test]
fn a_guest_that_is_saved_in_the_pause_is_patched_and_what_was_saved_is_wholly_old_or_new_and_can_be_taken_back() {
    let mut scene = Scene::new("saved");
    for (side, saved) in [(Side::Before, Seen::Flawed), (Side::Behind, Seen::Fixed)] {
        scene.apply_while(side, "savevm s").expect(0);
        scene.assert_seen(Seen::Fixed);
        scene.revert();
        scene.human("loadvm s");
        scene.assert_seen(saved);
        let status = scene.vmpatch.run(&["status"]).expect(0);
        assert!(status.stdout.contains("half applied"), "{status}");
        scene.revert();
    }
}

#[test]
fn what_else_is_done_to_a_guest_in_the_pause() {
    let mut scene = Scene::new("else");
    for line in ["system_powerdown", "stop"] {
        scene.apply_while(Side::Before, line).expect(0);
        scene.assert_seen(Seen::Fixed);
        scene.revert();
    }
    scene.apply_while(Side::Before, "cont").expect(1);
    scene.assert_seen(Seen::Flawed);

    scene.human("migrate_set_parameter max-bandwidth 1M");
    let answer = scene
        .apply_while(Side::Before, "migrate -d exec:cat>/dev/null")
        .expect(0);
    assert!(answer.stdout.contains("may have begun in the pause"), "{answer}");
    scene.human("migrate_cancel");
    scene.wait_for_the_migrations_end();
    scene.assert_seen(Seen::Fixed);
    scene.revert();

    for side in [Side::Before, Side::Behind] {
        let boots = scene.guest.boots();
        scene.apply_while(side, "system_reset");
        scene.guest.wait_for_boot(boots + 1).unwrap();
        scene.assert_seen(Seen::Flawed);
        scene.vmpatch.apply(&scene.module);
        scene.assert_seen(Seen::Fixed);
        scene.revert();
    }
}

/// Whether the guest's memory becomes another one before or after the write: what vmpatch says of the guest is true of it.
#[test]
fn a_guest_that_is_loaded_in_the_pause_is_patched_in_its_new_memory() {
    let mut scene = Scene::new("loaded");
    scene.human("savevm clean");
    for side in [Side::Before, Side::Behind] {
        scene.apply_while(side, "loadvm clean").expect(0);
        scene.assert_seen(Seen::Fixed);
        let status = scene.vmpatch.run(&["status"]).expect(0);
        assert!(status.stdout.contains("test_pair: applied"), "{status}");
        scene.human("loadvm clean");
        scene.assert_seen(Seen::Flawed);
    }
}
