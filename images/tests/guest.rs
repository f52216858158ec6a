//! Boots a real guest and uses all that the room offers on it.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use images::guest::{Guest, GuestConfig, QmpSpelling, Ram};
use images::kernel::Kernel;

/// Generous: the host may be busy with other guests.
const SOON: Duration = Duration::from_secs(30);

/// One guest for all checks, since booting it is what takes time.
#[test]
fn a_guest_runs_commands_until_it_is_shut_down() {
    let config = GuestConfig {
        qmp: vec![QmpSpelling::Qmp, QmpSpelling::QmpShort, QmpSpelling::ChardevMon],
        ..GuestConfig::new(Kernel::CLOUD_6_1)
            .vcpus(2)
            .ram(Ram::SharedMemfd)
            .name("vm,42")
            .append("nokaslr")
    };
    let guest = Guest::boot(config.file("/opt/tests/text", "Cargo.toml").module("loop")).unwrap();

    it_is_the_configured_guest(&guest);
    output_and_exit_status_come_back(&guest);
    binary_data_comes_through_unchanged(&guest);
    two_commands_run_at_once(&guest);
    commands_run_without_privilege(&guest);
    it_reboots(&guest);
    it_ends(guest);
}

fn it_is_the_configured_guest(guest: &Guest) {
    assert_eq!(guest.text(&["uname", "-r"]).unwrap(), "6.1.0-47-cloud-amd64");
    assert_eq!(guest.kernel_release(), "6.1.0-47-cloud-amd64");
    assert_eq!(guest.text(&["nproc"]).unwrap(), "2");
    assert!(guest.text(&["cat", "/proc/cmdline"]).unwrap().ends_with(" nokaslr"));
    assert!(guest.text(&["cat", "/proc/modules"]).unwrap().contains("loop "));
    assert_eq!(
        guest.pull("/opt/tests/text").unwrap(),
        std::fs::read("Cargo.toml").unwrap()
    );
    let qemu = std::fs::read_to_string(format!("/proc/{}/cmdline", guest.pid())).unwrap();
    assert!(
        qemu.starts_with("qemu-system-x86_64\0") && qemu.contains("\0guest=vm,,42\0"),
        "{qemu}"
    );
    assert_eq!(guest.qmp_paths().len(), 3);
    for path in guest.qmp_paths() {
        std::os::unix::net::UnixStream::connect(path).unwrap();
    }
}

fn output_and_exit_status_come_back(guest: &Guest) {
    let output = guest.run(&["sh", "-c", "echo out; echo err >&2; exit 7"]).unwrap();
    assert_eq!((output.stdout, output.stderr), (b"out\n".to_vec(), b"err\n".to_vec()));
    assert_eq!(output.status.code(), Some(7));
    let error = guest.text(&["cat", "/no/such/file"]).unwrap_err();
    assert!(
        error
            .to_string()
            .ends_with("cat: can't open '/no/such/file': No such file or directory"),
        "{error}"
    );
    guest
        .run(&["sh", "-c", "echo '<4>a warning of the test' >/dev/kmsg"])
        .unwrap();
    assert!(guest.console().unwrap().contains("a warning of the test"));
}

fn binary_data_comes_through_unchanged(guest: &Guest) {
    let bytes: Vec<u8> = (0..1_u32 << 20)
        .map(|i| i.wrapping_mul(2_654_435_761).to_be_bytes()[0])
        .collect();
    guest.push("/tmp/data", &bytes, 0o751).unwrap();
    assert!(guest.pull("/tmp/data").unwrap() == bytes);
    assert_eq!(
        guest.text(&["stat", "-c", "%a %s", "/tmp/data"]).unwrap(),
        "751 1048576"
    );
}

fn two_commands_run_at_once(guest: &Guest) {
    let long = guest.spawn(&["sh", "-c", "echo ready; exec sleep 1000"]).unwrap();
    long.wait_for_stdout("ready", SOON).unwrap();
    assert_eq!(guest.text(&["echo", "short"]).unwrap(), "short");
    assert_eq!(long.status().unwrap(), None);
    guest.text(&["test", "-d", &format!("/proc/{}", long.pid())]).unwrap();
    assert_eq!(long.kill().unwrap().status.signal(), Some(9));
}

fn commands_run_without_privilege(guest: &Guest) {
    let output = guest.run_as(
        1000,
        &[
            "sh",
            "-c",
            "id -u; id -G; grep CapEff /proc/self/status; cat /proc/kallsyms | head -1",
        ],
    );
    let text = String::from_utf8(output.unwrap().stdout).unwrap();
    let mut lines = text.lines();
    assert_eq!(lines.next(), Some("1000"));
    assert_eq!(lines.next(), Some("1000"));
    assert_eq!(lines.next(), Some("CapEff:\t0000000000000000"));
    assert!(lines.next().unwrap().starts_with("0000000000000000 "), "{text}");
}

fn it_reboots(guest: &Guest) {
    let pid = guest.pid();
    guest.reboot().unwrap();
    assert_eq!(guest.pid(), pid);
    assert_eq!(guest.run(&["test", "-e", "/tmp/data"]).unwrap().status.code(), Some(1));
}

fn it_ends(guest: Guest) {
    let (folder, proc) = (guest.folder(), format!("/proc/{}", guest.pid()));
    assert!(guest.shutdown().unwrap().success());
    assert!(!folder.exists());
    assert!(!Path::new(&proc).exists());
}

#[test]
fn a_guest_whose_kernel_panics_is_reported_with_its_console() {
    // No init of that name: the kernel gives up.
    let config = GuestConfig::new(Kernel::CLOUD_6_1).append("rdinit=/no/such/init init=/no/such/init");
    let error = Guest::boot(config).unwrap_err().to_string();
    assert!(
        error.starts_with("the guest did not boot (its kernel panicked)"),
        "{error}"
    );
    assert!(error.contains("Kernel panic - not syncing"), "{error}");
}

#[test]
fn a_qemu_that_refuses_its_arguments_is_reported_with_its_own_words() {
    let error = Guest::boot(GuestConfig::new(Kernel::CLOUD_6_1).qemu_arg("-no-such-option"))
        .unwrap_err()
        .to_string();
    assert!(error.contains("-no-such-option: invalid option"), "{error}");
}

/// A program that is QEMU, but ends by a signal in the boot, `crashes` times.
fn crashing(folder: &Path, crashes: u32) -> PathBuf {
    let program = folder.join("qemu");
    // Its channel is gone some time before it has ended, as where a core is written.
    let script = format!(
        r#"#!/bin/sh
        echo once >>"$0.starts"
        [ "$(wc -l <"$0.starts")" -le {crashes} ] || exec qemu-system-x86_64 "$@"
        qemu-system-x86_64 "$@" &
        sleep 1
        kill -KILL $!
        sleep 0.5
        kill -SEGV $$"#
    );
    fs::create_dir_all(folder).unwrap();
    fs::write(&program, script).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    program
}

#[test]
fn a_qemu_that_crashes_in_the_boot_is_started_once_more() {
    let folder = std::env::temp_dir().join(format!("vmpatch-crashing-{}", std::process::id()));
    let mut config = GuestConfig::new(Kernel::CLOUD_6_1);
    config.qemu = crashing(&folder.join("once"), 1);
    Guest::boot(config.clone()).unwrap();
    config.qemu = crashing(&folder.join("twice"), 2);
    let error = Guest::boot(config).unwrap_err().to_string();
    let words = "QEMU ended before the guest had booted: signal: 11";
    assert!(error.starts_with(words), "{error}");
    fs::remove_dir_all(folder).unwrap();
}

#[test]
fn a_guest_can_be_left_in_its_firmware() {
    let guest = Guest::start(GuestConfig::without_kernel()).unwrap();
    assert!(guest.is_running());
    std::os::unix::net::UnixStream::connect(guest.qmp_path()).unwrap();
    assert_eq!((guest.boots(), guest.kernel_release()), (0, ""));
}
