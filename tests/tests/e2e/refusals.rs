//! What vmpatch refuses: one clear line, the right exit code, and a guest that nobody has touched.

use std::fs;
use std::path::Path;
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use e2e::bed::{self, Lent};
use e2e::kit::{self, Modules};
use e2e::monitor::Monitor;
use e2e::probe::{Seen, see};
use e2e::ram::Ram;
use e2e::vmpatch::{Answer, Vmpatch};
use images::build::Cve;
use images::build::hand_written::Refused;
use images::guest::{Guest, GuestConfig};
use images::kernel::Kernel;
use images::packages;
use serde_json::{Value, json};

/// How long vmpatch may take to say that it can't do anything; a second on an idle host.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);
/// How long a guest may take to boot, on a busy host.
const BOOT_LIMIT: Duration = Duration::from_secs(120);

static MODULES: LazyLock<Modules> = LazyLock::new(|| Modules::of(&Kernel::CLOUD_6_1));

fn guest() -> Lent {
    bed::lend(kit::guest(Kernel::CLOUD_6_1))
}

/// Has `apply` refused each file, with its exit code and words, by a paused guest: all of its memory is as it was.
fn are_refused(files: &[(String, i32, &str)]) {
    let guest = guest();
    let vmpatch = Vmpatch::on(&guest);
    let mut monitor = Monitor::second(&guest);
    monitor.stop();
    let before = Ram::save(&guest, &mut monitor).unwrap();
    let answers: Vec<Answer> = files.iter().map(|(file, ..)| vmpatch.run(&["apply", file])).collect();
    let checked: Vec<Answer> = files.iter().map(|(file, ..)| vmpatch.run(&["check", file])).collect();
    let after = Ram::save(&guest, &mut monitor).unwrap();
    assert_eq!(monitor.run_state(), "paused");
    monitor.cont();

    assert_eq!(before.pages_unlike(&after, 20), [""; 0]);
    for ((answer, checked), (_, code, words)) in answers.iter().zip(&checked).zip(files) {
        assert_eq!((answer.code, answer.stdout.as_str()), (Some(*code), ""), "{answer}");
        assert!(answer.complaint().contains(words), "{words:?} is not in: {answer}");
        assert_eq!(
            (checked.code, checked.complaint()),
            (answer.code, answer.complaint()),
            "check says what apply says"
        );
    }
}

/// Writes files into a folder of this test.
struct Folder(std::path::PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("vmpatch-{name}-{}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn file(&self, name: &str, bytes: &[u8]) -> String {
        let path = self.0.join(name);
        fs::write(&path, bytes).unwrap();
        path.to_str().unwrap().to_owned()
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[test]
fn a_file_that_is_no_module_of_this_machine_is_refused() {
    let folder = Folder::new("no-module");
    let module = fs::read(MODULES.cve(Cve::Y2026N52928)).unwrap();
    let changed = |at: usize, byte: u8| {
        let mut bytes = module.clone();
        bytes[at] = byte;
        bytes
    };
    // Offsets in the ELF header: class, byte order, type, machine.
    are_refused(&[
        (folder.file("script.ko", b"#!/bin/sh\n"), 3, "not an ELF file"),
        (folder.file("empty.ko", b""), 3, "not an ELF file"),
        (folder.file("class.ko", &changed(4, 1)), 3, "not an x86-64 module"),
        (folder.file("order.ko", &changed(5, 2)), 3, "not an x86-64 module"),
        (folder.file("machine.ko", &changed(18, 183)), 3, "not an x86-64 module"),
        (folder.file("program.ko", &changed(16, 2)), 3, "not a kernel module"),
        (
            folder.0.join("absent.ko").to_str().unwrap().to_owned(),
            1,
            "absent.ko: No such file or directory",
        ),
        (folder.0.to_str().unwrap().to_owned(), 1, "Is a directory"),
    ]);
}

#[test]
fn a_module_cut_off_anywhere_is_refused() {
    let folder = Folder::new("cut-off");
    let module = fs::read(MODULES.cve(Cve::Y2026N52928)).unwrap();
    let lengths = (4..64)
        .step_by(12)
        .chain((64..module.len()).step_by(module.len() / 40))
        .chain([module.len() - 1]);
    let files: Vec<_> = lengths
        .map(|len| (folder.file(&format!("{len}.ko"), &module[..len]), 3, "truncated"))
        .collect();
    are_refused(&files);
}

#[test]
fn a_module_for_another_kernel_is_refused_with_both_names() {
    let generic = Modules::of(&Kernel::GENERIC_6_1).cve(Cve::Y2026N52928);
    are_refused(&[(
        generic,
        3,
        "was made for kernel \"6.1.0-47-amd64 SMP preempt mod_unload modversions \"",
    )]);
}

#[test]
fn a_module_that_does_not_fit_is_refused_by_name() {
    let refused = |module: Refused, words| (MODULES.refused(module), 3, words);
    are_refused(&[
        refused(Refused::Unresolved, "cannot resolve vmpatch_test_missing"),
        refused(Refused::Missing, "function vmpatch_test_missing: not found in vmlinux"),
        refused(Refused::Ambiguous, "function c_start: 3 symbols of that name"),
        refused(Refused::NoSuchPosition, "function c_start: symbol position 99"),
        refused(Refused::TooShort, "too short to redirect"),
        refused(Refused::PercpuData, "needs 16000 contiguous bytes of per-CPU memory"),
        refused(Refused::Callbacks, "object vmlinux has a pre_patch callback"),
        refused(Refused::TooBig, "does not fit"),
        refused(Refused::NoLivepatch, "is not a livepatch module"),
    ]);
}

#[test]
fn a_module_whose_init_or_exit_does_more_than_enable_the_patch_is_refused_by_what_it_does() {
    let refused = |module: Refused, words| (MODULES.refused(module), 3, words);
    are_refused(&[
        refused(Refused::InitLookup, "init calls register_kprobe"),
        refused(Refused::InitList, "init writes vmpatch_test_list"),
        refused(Refused::InitNotifier, "init calls register_reboot_notifier"),
        refused(Refused::InitCondition, "init writes klp_funcs"),
        refused(Refused::ExitWork, "exit calls cancel_delayed_work_sync"),
    ]);
}

#[test]
fn a_domain_that_is_not_there_is_named_with_those_that_are() {
    let guest = guest();
    let answer = Vmpatch::domain("no-such-vm").run(&["status"]).expect(5);
    let complaint = answer.complaint();
    assert!(
        complaint.contains("no running QEMU has the name `no-such-vm`"),
        "{complaint}"
    );
    assert!(complaint.contains(guest.name()), "{complaint}");
    let nowhere = Vmpatch::socket(Path::new("/no/such/socket")).run(&["status"]).expect(5);
    assert!(
        nowhere
            .complaint()
            .contains("there is no QMP socket at /no/such/socket"),
        "{nowhere}"
    );
}

#[test]
fn two_domains_of_one_name_are_told_apart_by_their_sockets() {
    let name = format!("twin-{}", std::process::id());
    let twins = [0, 1].map(|_| Guest::start(GuestConfig::without_kernel().name(&name)).unwrap());
    let answer = Vmpatch::domain(&name).run(&["status"]).expect(5);
    let complaint = answer.complaint();
    assert!(complaint.starts_with("2 running QEMUs have the name"), "{complaint}");
    for twin in &twins {
        assert!(
            complaint.contains(&twin.qmp_path().display().to_string()),
            "{complaint}"
        );
    }
}

#[test]
fn a_socket_that_another_client_holds_is_named_in_bounded_time() {
    let guest = guest();
    let holder = Monitor::connect(&guest.qmp_path()).unwrap();
    let answer = Vmpatch::socket(&guest.qmp_path()).run(&["status"]).expect(5);
    assert!(answer.took < ANSWER_LIMIT, "{:?}: {answer}", answer.took);
    let complaint = answer.complaint();
    assert!(
        complaint.contains(&guest.qmp_path().display().to_string()),
        "{complaint}"
    );
    assert!(complaint.contains("another client holds it"), "{complaint}");
    drop(holder);
    Vmpatch::socket(&guest.qmp_path()).run(&["status"]).expect(0);
}

/// Whether all that vmpatch says of this guest is that it holds no Linux kernel that it understands.
#[track_caller]
fn holds_no_kernel(guest: &Guest) {
    let vmpatch = Vmpatch::on(guest);
    for command in [
        &["status"][..],
        &["inspect"],
        &["apply", &MODULES.cve(Cve::Y2026N52928)],
        &["revert", "--all"],
    ] {
        let answer = vmpatch.run(command).expect(3);
        assert!(answer.took < ANSWER_LIMIT, "{:?}: {answer}", answer.took);
        let complaint = answer.complaint();
        assert!(
            complaint.starts_with("understanding the guest's kernel: "),
            "{complaint}"
        );
    }
    assert!(guest.is_running());
    let mut monitor = Monitor::second(guest);
    assert_eq!(monitor.run_state(), "running");
}

/// A guest with a screen, which shows what it runs.
fn machine() -> GuestConfig {
    let config = GuestConfig {
        qmp: kit::guest(Kernel::CLOUD_6_1).qmp,
        ..GuestConfig::without_kernel()
    };
    config.qemu_arg("-vga").qemu_arg("std")
}

/// What the firmware shows when it finds nothing to boot, or nothing any more.
const NOTHING_TO_BOOT: &str = "No bootable device";

/// The text on a guest's screen: each second byte of the VGA text buffer is a character.
fn screen(guest: &Guest, folder: &Folder) -> String {
    const BUFFER: u64 = 0xb_8000;
    const BUFFER_BYTES: u64 = 2 * 80 * 25;
    let path = folder.file("screen", b"");
    let arguments = json!({ "val": BUFFER, "size": BUFFER_BYTES, "filename": path });
    Monitor::second(guest).call("pmemsave", arguments).unwrap();
    let bytes = fs::read(path).unwrap();
    bytes.iter().step_by(2).copied().map(char::from).collect()
}

/// Starts the guest, waits until its screen shows `text`, and has vmpatch say that it holds no kernel, while the screen goes on to show it.
fn holds_no_kernel_while_it_shows(text: &str, config: GuestConfig) {
    // All tests run in one process.
    let folder = Folder::new(&text.replace(|char: char| !char.is_alphanumeric(), "-"));
    let guest = Guest::start(config).unwrap();
    let start = Instant::now();
    while !screen(&guest, &folder).contains(text) {
        let shown = || screen(&guest, &folder);
        assert!(start.elapsed() < BOOT_LIMIT, "no {text:?} in {:?}", shown());
        std::thread::sleep(Duration::from_millis(200));
    }
    holds_no_kernel(&guest);
    let shown = screen(&guest, &folder);
    assert!(shown.contains(text), "{shown:?}");
    assert_eq!(shown.contains(NOTHING_TO_BOOT), text == NOTHING_TO_BOOT, "{shown:?}");
}

#[test]
fn a_guest_in_its_firmware_is_refused() {
    let guest = Guest::start(machine()).unwrap();
    holds_no_kernel(&guest);
    drop(guest);
    holds_no_kernel_while_it_shows(NOTHING_TO_BOOT, machine());
}

/// A guest that runs a file of a Debian package in a kernel's stead.
fn booted_from(package: &str, file: &str) -> GuestConfig {
    let path = packages::fetch(package, None).unwrap().unpacked().unwrap().join(file);
    assert!(path.exists(), "{}", path.display());
    machine().qemu_arg("-kernel").qemu_arg(path.to_str().unwrap())
}

#[test]
fn a_guest_in_its_boot_loader_is_refused() {
    // With a script, iPXE stays at its prompt; without one, and without a network, it goes back to the firmware at once.
    let folder = Folder::new("script");
    let script = folder.file("script.ipxe", b"#!ipxe\nshell\n");
    let config = booted_from("ipxe", "boot/ipxe.lkrn")
        .qemu_arg("-initrd")
        .qemu_arg(&script);
    holds_no_kernel_while_it_shows("iPXE> ", config);
}

#[test]
fn a_guest_that_runs_another_system_is_refused() {
    holds_no_kernel_while_it_shows("Memtest86+", booted_from("memtest86+", "boot/memtest86+x64.bin"));
}

#[test]
fn a_guest_that_has_not_finished_booting_is_refused() {
    // It waits for a root file system that never comes, and has not come to its first process yet.
    let config = kit::guest(Kernel::CLOUD_6_1).append("rdinit=/absent root=/dev/absent rootwait loglevel=7");
    let guest = Guest::start(config).unwrap();
    let start = Instant::now();
    while !guest.console().unwrap().contains("Waiting for root device") {
        assert!(start.elapsed() < BOOT_LIMIT, "{}", guest.console().unwrap());
        std::thread::sleep(Duration::from_millis(100));
    }
    holds_no_kernel(&guest);
    let answer = Vmpatch::on(&guest).run(&["status"]).expect(3);
    assert!(answer.complaint().contains("kernel is still starting"), "{answer}");
}

#[test]
fn a_guest_that_its_operator_holds_at_reset_is_refused() {
    let guest = Guest::start(machine().qemu_arg("-S")).unwrap();
    for command in [&["status"][..], &["inspect"], &["revert", "--all"]] {
        let answer = Vmpatch::on(&guest).run(command).expect(3);
        let complaint = answer.complaint();
        assert!(complaint.contains("no vCPU is in 64-bit mode"), "{complaint}");
    }
    assert_ne!(Monitor::second(&guest).run_state(), "running");
}

#[test]
fn a_cpu_that_cannot_forbid_execution_is_refused_by_name() {
    let guest = Guest::boot(kit::guest(Kernel::CLOUD_6_1).cpu("qemu64,-nx")).unwrap();
    holds_no_kernel(&guest);
    let answer = Vmpatch::on(&guest).run(&["status"]).expect(3);
    assert!(answer.complaint().contains("CPU model has no NX"), "{answer}");
    bed::assert_healthy(&guest);
}

#[test]
fn a_guest_that_is_booting_is_refused_until_it_can_be_patched() {
    let guest = Guest::start(kit::guest(Kernel::CLOUD_6_1)).unwrap();
    let vmpatch = Vmpatch::on(&guest);
    let module = MODULES.cve(Cve::Y2026N52928);
    let mut refused = 0;
    let start = Instant::now();
    loop {
        let answer = vmpatch.run(&["apply", &module]);
        match answer.code {
            Some(0) => break,
            Some(3 | 4) => drop(answer.complaint()),
            _ => panic!("{answer}"),
        }
        refused += 1;
        assert!(start.elapsed() < BOOT_LIMIT, "never patched");
    }
    assert!(refused > 0, "the guest is not seen in its firmware");
    guest.wait_for_boot(1).unwrap();
    assert_eq!(see(&guest, "siocatmark"), Seen::Fixed);
    vmpatch.revert_all();
    assert_eq!(see(&guest, "siocatmark"), Seen::Flawed);
    bed::assert_healthy(&guest);
}

#[test]
fn a_guest_that_is_being_migrated_is_refused_until_that_is_over() {
    let guest = guest();
    let vmpatch = Vmpatch::on(&guest);
    let module = MODULES.cve(Cve::Y2026N52928);
    let mut monitor = Monitor::second(&guest);
    monitor
        .call("migrate-set-parameters", json!({ "max-bandwidth": 65536 }))
        .unwrap();
    monitor
        .call("migrate", json!({ "uri": "exec:cat >/dev/null" }))
        .unwrap();
    let answer = vmpatch.run(&["apply", &module]).expect(3);
    assert!(
        answer
            .complaint()
            .starts_with("the hypervisor is busy with a migration"),
        "{answer}"
    );
    assert_eq!(see(&guest, "siocatmark"), Seen::Flawed);
    monitor.call("migrate_cancel", json!({})).unwrap();
    let migration = |monitor: &mut Monitor| monitor.call("query-migrate", json!({})).unwrap();
    while migration(&mut monitor).get("status").and_then(Value::as_str) == Some("cancelling") {
        std::thread::sleep(Duration::from_millis(20));
    }
    vmpatch.apply(&module);
    assert_eq!(see(&guest, "siocatmark"), Seen::Fixed);
}
