//! Guests that libvirt runs: vmpatch reaches them by libvirt's own RPC, and libvirt sees a guest that runs all the time.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use e2e::bed::assert_healthy;
use e2e::cut::{Call, Side, run_to};
use e2e::kit::{self, Modules};
use e2e::libvirt::{LibvirtHost, virsh};
use e2e::probe::{Seen, see};
use e2e::processes;
use e2e::vmpatch::Vmpatch;
use images::build::hand_written::Applied;
use images::guest::{Guest, Ram};
use images::kernel::Kernel;
use nix::sys::signal::Signal;

/// The program in the guest that tells old, new, and mixed.
const PROGRAM: &str = "pair";
/// Cycles of apply and revert while libvirt is busy.
const CYCLES: usize = 10;

static PAIR: LazyLock<String> = LazyLock::new(|| Modules::of(&Kernel::CLOUD_6_1).applied(Applied::Pair));

/// libvirt, lent to one test at a time: one of them kills its daemons.
fn libvirt() -> MutexGuard<'static, Arc<LibvirtHost>> {
    static LIBVIRT: LazyLock<Mutex<Arc<LibvirtHost>>> = LazyLock::new(|| Mutex::new(Arc::new(LibvirtHost::start())));
    LIBVIRT.lock().unwrap_or_else(PoisonError::into_inner)
}

fn boot(libvirt: &Arc<LibvirtHost>, ram: Ram) -> Guest {
    let mut config = kit::guest(Kernel::CLOUD_6_1).vcpus(2).ram(ram);
    config.qmp = Vec::new();
    Guest::boot_on(Arc::clone(libvirt) as _, config).unwrap_or_else(|error| panic!("{error}: {error:?}"))
}

fn state(guest: &Guest) -> String {
    virsh(&["domstate", guest.name()]).unwrap()
}

#[test]
fn a_guest_of_libvirt_s_is_found_by_name_and_uuid_patched_and_reverted_whatever_its_ram() {
    let libvirt = libvirt();
    for ram in [Ram::Private, Ram::SharedMemfd] {
        let guest = boot(&libvirt, ram);
        let vmpatch = Vmpatch::on(&guest);
        let uuid = virsh(&["domuuid", guest.name()]).unwrap();
        let domains = vmpatch.run_bare(&["domains", "--json"]).expect(0);
        assert!(domains.stdout.contains(&format!("libvirt, {uuid}")), "{domains}");
        assert_eq!(see(&guest, PROGRAM), Seen::Flawed);
        vmpatch.run(&["apply", &PAIR]).expect(0);
        assert_eq!((see(&guest, PROGRAM), state(&guest).as_str()), (Seen::Fixed, "running"));
        Vmpatch::domain(&uuid).run(&["revert", "--all"]).expect(0);
        assert_eq!(
            (see(&guest, PROGRAM), state(&guest).as_str()),
            (Seen::Flawed, "running")
        );
        let moved = vmpatch
            .run(&["upgrade", "--qemu", "/usr/bin/qemu-system-x86_64", "--check"])
            .expect(3);
        assert!(moved.stderr.contains("virsh migrate"), "{moved}");
        assert_healthy(&guest);
    }
}

#[test]
fn while_libvirt_talks_to_the_guest_all_the_time_it_is_patched_and_reverted() {
    let libvirt = libvirt();
    let guest = boot(&libvirt, Ram::Private);
    let (vmpatch, is_over) = (Vmpatch::on(&guest), AtomicBool::new(false));
    let asked = thread::scope(|scope| {
        let busy = scope.spawn(|| {
            let mut asked = 0;
            while !is_over.load(Ordering::Relaxed) {
                virsh(&["domstats", guest.name()]).unwrap();
                virsh(&["qemu-monitor-command", guest.name(), r#"{"execute":"query-status"}"#]).unwrap();
                asked += 1;
            }
            asked
        });
        for _ in 0..CYCLES {
            vmpatch.run(&["apply", &PAIR]).expect(0);
            assert_eq!(see(&guest, PROGRAM), Seen::Fixed);
            vmpatch.run(&["revert", "--all"]).expect(0);
            assert_eq!(see(&guest, PROGRAM), Seen::Flawed);
        }
        is_over.store(true, Ordering::Relaxed);
        busy.join().unwrap()
    });
    assert!(asked > CYCLES, "libvirt was asked {asked} times");
    assert_eq!(state(&guest), "running");
    assert_healthy(&guest);
}

#[test]
fn a_vmpatch_killed_in_its_pause_leaves_libvirt_s_guest_running_and_as_it_was() {
    let libvirt = libvirt();
    let guest = boot(&libvirt, Ram::Private);
    let vmpatch = Vmpatch::on(&guest);
    for (args, before, after) in [
        (&["apply", PAIR.as_str()][..], Seen::Flawed, Seen::Fixed),
        (&["revert", "--all"], Seen::Fixed, Seen::Flawed),
    ] {
        for (call, side) in [(Call::Pause, Side::Behind), (Call::WriteMemory, Side::Behind)] {
            let child = vmpatch.start(args);
            run_to(&child, call, 1, side);
            processes::kill(child.id(), Signal::SIGKILL);
            // The supervisor has the same standard error, so this waits for its end, too.
            let answer = vmpatch.finish(args, child);
            let context = format!("{args:?} {call:?}: {answer}");
            assert_eq!(
                (state(&guest).as_str(), see(&guest, PROGRAM)),
                ("running", before),
                "{context}"
            );
        }
        vmpatch.run(args).expect(0);
        assert_eq!(see(&guest, PROGRAM), after);
    }
    assert_healthy(&guest);
}

#[test]
fn a_guest_whose_libvirt_does_not_run_is_not_reached_until_it_runs_again() {
    let libvirt = libvirt();
    let guest = boot(&libvirt, Ram::Private);
    let vmpatch = Vmpatch::on(&guest);
    vmpatch.run(&["apply", &PAIR]).expect(0);
    if !libvirt.kill_daemons() {
        println!("libvirt runs as a service here: it is not ended, and nothing is shown of a guest without it");
        return;
    }
    assert!(virsh(&["version"]).is_err());
    let lost = vmpatch.run(&["status"]).expect(5);
    assert!(
        lost.stderr
            .contains("libvirt's daemon does not listen on /run/libvirt/"),
        "{lost}"
    );
    libvirt.start_daemons();
    // The daemon finds its guests again, one by one.
    thread::sleep(Duration::from_secs(1));
    vmpatch.run(&["revert", "--all"]).expect(0);
    assert_eq!(
        (state(&guest).as_str(), see(&guest, PROGRAM)),
        ("running", Seen::Flawed)
    );
    assert_healthy(&guest);
}
