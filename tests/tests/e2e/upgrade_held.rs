//! What the running QEMU holds decides about its move, and not what its command line leads to by now: a file that was replaced, deleted or
//! changed since keeps the guest where it is, with `--check` as well.

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use e2e::kit;
use e2e::moving::{INSTALLED, Keeper, successors};
use e2e::vmpatch::{Answer, Vmpatch};
use images::guest::{Guest, GuestConfig};
use images::kernel::Kernel;

/// Files of a guest; removed when it is dropped.
struct Place(PathBuf);

impl Place {
    fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let folder = std::env::temp_dir().join(format!("vmpatch-held-{}-{number}", std::process::id()));
        fs::create_dir(&folder).unwrap();
        Self(folder)
    }

    fn path(&self, name: &str) -> String {
        self.0.join(name).display().to_string()
    }

    fn write(&self, name: &str, text: &str) -> String {
        let path = self.path(name);
        fs::write(&path, text).unwrap();
        path
    }

    fn image(&self, name: &str, options: &[&str]) -> String {
        let path = self.path(name);
        let words = [&["create", "-q", "-f"], options, &[&path, "1M"]].concat();
        assert!(Command::new("qemu-img").args(words).status().unwrap().success());
        path
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        drop(fs::remove_dir_all(&self.0));
    }
}

fn with(config: GuestConfig, words: &[&str]) -> GuestConfig {
    words.iter().fold(config, |config, word| config.qemu_arg(word))
}

fn check(guest: &Guest, code: i32) -> Answer {
    let answer = Vmpatch::on(guest)
        .run(&["upgrade", "--qemu", INSTALLED, "--check"])
        .expect(code);
    assert_eq!(successors(guest.name()), [0; 0], "{answer}");
    assert!(guest.is_running(), "{answer}");
    answer
}

/// A guest with images, a backing image, and files that QEMU read when it began.
fn start(place: &Place) -> Guest {
    let base = place.image("base.qcow2", &["qcow2"]);
    let overlay = place.image("overlay.qcow2", &["qcow2", "-b", &base, "-F", "qcow2"]);
    let raw = place.image("raw.img", &["raw"]);
    let (table, secret) = (place.write("table", "table"), place.write("secret", "secret"));
    let config = with(
        kit::guest(Kernel::CLOUD_6_1),
        &[
            "-blockdev",
            &format!("qcow2,node-name=d0,file.driver=file,file.filename={overlay}"),
            "-device",
            "virtio-blk-pci,drive=d0,id=block0",
            "-drive",
            &format!("file={raw},if=none,id=d1,format=raw"),
            "-device",
            "virtio-blk-pci,drive=d1,id=block1",
            "-fw_cfg",
            &format!("name=opt/org.vmpatch/table,file={table}"),
            "-object",
            &format!("secret,id=secret0,file={secret}"),
        ],
    );
    Guest::boot(config).unwrap_or_else(|error| panic!("{error}"))
}

#[test]
fn a_file_that_was_replaced_under_its_name_keeps_the_guest_where_it_is() {
    let place = Place::new();
    let guest = start(&place);
    let _keeper = Keeper::of(&guest);
    check(&guest, 0);
    for name in ["overlay.qcow2", "base.qcow2", "raw.img"] {
        let (path, aside) = (place.path(name), place.path("aside"));
        // The open file is renamed, and a copy has its name.
        fs::rename(&path, &aside).unwrap();
        fs::copy(&aside, &path).unwrap();
        let complaint = check(&guest, 3).complaint().to_owned();
        if name == "base.qcow2" {
            // The command line does not name it, so only the new process's files tell.
            let words = format!("another file open than the old one ({path}, not {aside})");
            assert!(complaint.contains(&words), "{complaint}");
        } else {
            assert!(complaint.starts_with(&format!("the file {path} (`-")), "{complaint}");
        }
        fs::rename(&aside, &path).unwrap();
        check(&guest, 0);
    }
    // The latter comes first on the command line.
    for name in ["secret", "table"] {
        let (path, aside) = (place.path(name), place.path("aside"));
        fs::copy(&path, &aside).unwrap();
        fs::rename(&aside, &path).unwrap();
        let answer = check(&guest, 3);
        assert!(
            answer.complaint().starts_with(&format!("the file {path} (`-")),
            "{answer}"
        );
    }
}

#[test]
fn an_open_file_that_was_deleted_or_exchanged_keeps_the_guest_where_it_is() {
    let place = Place::new();
    let guest = start(&place);
    let _keeper = Keeper::of(&guest);
    let raw = place.path("raw.img");
    let copy = place.path("copy");
    fs::copy(&raw, &copy).unwrap();
    fs::rename(&copy, &raw).unwrap();
    for options in [&["--check"][..], &[]] {
        let line = [&["upgrade", "--qemu", INSTALLED], options].concat();
        let answer = Vmpatch::on(&guest).run(&line).expect(3);
        let words = format!("the file {raw} (deleted): process {} has it open", guest.pid());
        assert!(answer.complaint().starts_with(&words), "{answer}");
    }
    assert!(guest.is_running());
}

#[test]
fn a_log_that_a_device_writes_is_kept_and_one_that_qemu_would_empty_keeps_the_guest_where_it_is() {
    let place = Place::new();
    let (copy, log) = (place.path("copy"), place.path("log"));
    let device = format!("null,id=copied,logfile={copy}");
    let config = with(
        kit::guest(Kernel::CLOUD_6_1),
        &["-chardev", &device, "-device", "isa-debugcon,chardev=copied,id=debug0"],
    );
    let mut guest = Guest::boot(config).unwrap_or_else(|error| panic!("{error}"));
    let _keeper = Keeper::of(&guest);
    let written = "what the guest has put out\n";
    fs::write(&copy, written).unwrap();
    check(&guest, 0);
    assert_eq!(fs::read_to_string(&copy).unwrap(), written, "after --check");
    let report = Vmpatch::on(&guest)
        .run(&["upgrade", "--qemu", INSTALLED, "--json"])
        .expect(0)
        .json();
    assert_eq!(fs::read_to_string(&copy).unwrap(), written, "after the move");
    guest
        .follow(u32::try_from(report["new"]["pid"].as_u64().unwrap()).unwrap())
        .unwrap();
    drop(guest);

    let guest = Guest::boot(with(kit::guest(Kernel::CLOUD_6_1), &["-D", &log, "-d", "guest_errors"])).unwrap();
    fs::write(&log, written).unwrap();
    let answer = check(&guest, 3);
    assert!(
        answer.complaint().starts_with(&format!("the log file {log} (`-D`)")),
        "{answer}"
    );
    assert_eq!(fs::read_to_string(&log).unwrap(), written);
}
