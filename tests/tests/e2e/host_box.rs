//! Patching under real KVM, in a host in a box: vmpatch runs there, beside the guest's QEMU, as on any host.

use std::ops::Deref;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{LazyLock, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use e2e::boxed::assert_clean;
use e2e::kit::{self, Modules};
use e2e::probe::{Calls, Seen, see};
use e2e::report::{pause_us, states};
use e2e::vmpatch::Vmpatch;
use images::build::Cve;
use images::build::hand_written::Applied;
use images::guest::Guest;
use images::host_box::HostBox;
use images::kernel::Kernel;

static MODULES: LazyLock<Modules> = LazyLock::new(|| Modules::of(&Kernel::CLOUD_6_1));

/// The box, lent to one test at a time: it has no processors for more. It ends with the last test that waits for it, as other tests run
/// beside it.
struct Alone(MutexGuard<'static, Option<HostBox>>);

/// Tests that use the box or wait for it.
static WANTED: AtomicUsize = AtomicUsize::new(0);

fn alone() -> Alone {
    static BOX: Mutex<Option<HostBox>> = Mutex::new(None);
    WANTED.fetch_add(1, Ordering::SeqCst);
    let mut alone = Alone(BOX.lock().unwrap_or_else(|poisoned| {
        // A test has failed in it, and may have left it unfit for the next one.
        BOX.clear_poison();
        let mut left = poisoned.into_inner();
        drop(left.take());
        left
    }));
    if alone.0.is_none() {
        let start = Instant::now();
        *alone.0 = Some(HostBox::start().unwrap_or_else(|error| panic!("{error}")));
        println!("the box booted in {:?}", start.elapsed());
    }
    alone
}

impl Deref for Alone {
    type Target = HostBox;

    fn deref(&self) -> &HostBox {
        self.0.as_ref().expect("the box is here until the guard is dropped")
    }
}

impl Drop for Alone {
    fn drop(&mut self) {
        if WANTED.fetch_sub(1, Ordering::SeqCst) == 1 {
            drop(self.0.take());
        }
    }
}

/// Cycles of apply and revert.
const CYCLES: u64 = 3;
/// Tasks that do nothing but call the functions: one, which leaves a CPU of the box to vmpatch.
const TASKS: &str = "1";
/// How long a program may take to start and to end on a guest that is all busy, in a box.
const PROGRAM_LIMIT: Duration = Duration::from_secs(120);
/// Exits from the guest to KVM that a boot takes at the least.
const EXITS_MIN: u64 = 1000;

/// Demands that the CPU's own virtualisation runs the guest, by what the guest, the box's kernel and QEMU's descriptors say.
#[track_caller]
fn assert_under_kvm(host: &HostBox, guest: &Guest) {
    let log = guest.text(&["dmesg"]).unwrap();
    assert!(log.contains("Hypervisor detected: KVM"), "{log}");
    assert_eq!(host.text(&["cat", "/sys/module/kvm_amd/parameters/npt"]).unwrap(), "Y");
    let pid = guest.pid().to_string();
    let script = r#"cat /sys/kernel/debug/kvm/"$1"-*/exits"#;
    let exits: u64 = host.text(&["sh", "-c", script, "sh", &pid]).unwrap().parse().unwrap();
    println!("the guest has left guest mode {exits} times");
    assert!(exits > EXITS_MIN);
    let descriptors = host.text(&["ls", "-l", &format!("/proc/{pid}/fd")]).unwrap();
    for vcpu in ["kvm-vcpu:0", "kvm-vcpu:1"] {
        assert!(descriptors.contains(vcpu), "{descriptors}");
    }
}

#[test]
fn a_guest_under_kvm_is_patched_and_reverted_with_no_call_that_finds_a_mix() {
    let alone = alone();
    let host = &*alone;
    let start = Instant::now();
    let guest = host.boot(kit::guest(Kernel::CLOUD_6_1)).unwrap();
    println!("its guest booted in {:?}", start.elapsed());
    assert_under_kvm(host, &guest);

    let vmpatch = Vmpatch::on(&guest);
    let domains = vmpatch.run_bare(&["domains", "--json"]).expect(0).json();
    assert_eq!(domains[0]["name"], guest.name(), "{domains}");
    assert_eq!(
        (&domains[0]["pid"], &domains[0]["accelerator"]),
        (&guest.pid().into(), &"kvm".into()),
        "{domains}"
    );
    let inspected = vmpatch.inspect();
    assert_eq!(
        (&inspected["accelerator"], &inspected["vcpus"]),
        (&"kvm".into(), &2.into())
    );

    let cve = Cve::Y2026N52928;
    let module = MODULES.cve(cve);
    assert_eq!(see(&guest, cve.program()), Seen::Flawed);
    let applied = vmpatch.apply(&module);
    assert_eq!(see(&guest, cve.program()), Seen::Fixed);
    assert_eq!(states(&vmpatch.status()), states(&applied));
    vmpatch.revert_all();
    assert_eq!(see(&guest, cve.program()), Seen::Flawed);

    let module = MODULES.applied(Applied::Pair);
    let load = guest.spawn(&["/opt/pair", "load", "0", TASKS]).unwrap();
    load.wait_for_stdout("started", PROGRAM_LIMIT).unwrap();
    for cycle in 0..CYCLES {
        let applied = vmpatch.run(&["apply", "--json", &module]).expect(0);
        assert_eq!(see(&guest, "pair"), Seen::Fixed);
        let reverted = vmpatch.run(&["revert", "--all", "--json"]).expect(0);
        assert_eq!(see(&guest, "pair"), Seen::Flawed);
        for (what, answer) in [("apply", &applied), ("revert", &reverted)] {
            let report = answer.json();
            let [total, stop, resume] = ["total_us", "stop_us", "resume_us"].map(|part| pause_us(&report, part));
            println!(
                "cycle {cycle}: {what} {:?}, pause {total} µs, of it stop {stop}, resume {resume}",
                answer.took
            );
        }
    }
    guest.text(&["kill", &load.pid().to_string()]).unwrap();
    let output = load.wait(PROGRAM_LIMIT).unwrap();
    let calls = Calls::of(&String::from_utf8_lossy(&output.stdout)).unwrap_or_else(|| panic!("{output:?}"));
    assert_eq!((calls.mixed, calls.lost), (0, 0), "{calls:?}");
    assert!(output.status.success(), "{output:?}");
    assert!(calls.old > CYCLES && calls.new > CYCLES, "{calls:?}");
    assert_eq!(states(&vmpatch.status()), []);

    assert_clean(&guest);
    drop(guest);
    let left = host.text(&["ls", "/run"]).unwrap();
    assert!(!left.contains("guest-"), "the guest's folder goes with it: {left}");
    assert_clean(host);
    println!("{:?} after the box's boot", start.elapsed());
}

/// Pauses by each method that are compared.
const PAUSES: usize = 8;
/// When vmpatch is killed, in milliseconds after its start.
const KILLED_AFTER_MS: [u32; 6] = [100, 200, 300, 400, 500, 650];

/// Demands that no thread of the guest's QEMU is stopped or traced.
#[track_caller]
fn assert_untraced(host: &HostBox, guest: &Guest) {
    let script = r#"cat /proc/"$1"/task/*/status | grep -e TracerPid -e State | sort -u"#;
    let found = host
        .text(&["sh", "-c", script, "sh", &guest.pid().to_string()])
        .unwrap();
    assert!(
        found.lines().all(|line| line.ends_with("\t0") || line.contains("ing)")),
        "{found}"
    );
}

/// The median length of a pause in microseconds.
fn median(mut pauses: Vec<u64>) -> u64 {
    pauses.sort_unstable();
    pauses[pauses.len() / 2]
}

#[test]
fn vmpatch_leaves_no_thread_stopped_or_traced_even_where_it_is_killed() {
    let alone = alone();
    let host = &*alone;
    let guest = host.boot(kit::guest(Kernel::CLOUD_6_1)).unwrap();
    let vmpatch = Vmpatch::on(&guest);
    let module = MODULES.applied(Applied::Pair);
    let mut pauses = [Vec::new(), Vec::new()];
    for round in 0..PAUSES / 2 {
        for (method, pauses) in ["ptrace", "qmp"].into_iter().zip(&mut pauses) {
            for args in [&["apply", &module][..], &["revert", "--all"]] {
                let args = [args, &["--json", "--pause", method]].concat();
                let report = vmpatch.run(&args).expect(0).json();
                let [total, stop, registers, resume] =
                    ["total_us", "stop_us", "registers_us", "resume_us"].map(|part| pause_us(&report, part));
                println!("round {round}: {method} {total} µs: stop {stop}, registers {registers}, resume {resume}");
                pauses.push(total);
                assert_untraced(host, &guest);
            }
        }
    }
    let [ptrace, qmp] = pauses.map(median);
    println!("median: ptrace {ptrace} µs, qmp {qmp} µs");

    // Killed at any time, it leaves the guest running, as it was before or patched.
    let program = e2e::vmpatch::program().unwrap().display().to_string();
    for after_ms in KILLED_AFTER_MS {
        let script = r#""$1" --domain "$2" apply "$3" >/dev/null 2>&1 & sleep "$4"; kill -9 $!; wait $!; true"#;
        let after = format!("{}.{:03}", after_ms / 1000, after_ms % 1000);
        host.text(&["sh", "-c", script, "sh", &program, guest.name(), &module, &after])
            .unwrap();
        // The supervisor holds the lock until it is done.
        let patches = vmpatch.run(&["status", "--json"]).expect(0).json();
        println!("killed after {after_ms} ms: {}", patches["patches"]);
        assert_untraced(host, &guest);
        assert!([Seen::Fixed, Seen::Flawed].contains(&see(&guest, "pair")));
        vmpatch.run(&["apply", &module]).expect(0);
        vmpatch.run(&["revert", "--all"]).expect(0);
        assert_eq!(see(&guest, "pair"), Seen::Flawed);
    }
    assert_clean(&guest);
}
