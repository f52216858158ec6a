//! Guests that are hypervisors themselves: a vCPU that runs a nested guest has that guest's registers, which say nothing of the
//! kernel that is to be patched.

use std::time::{Duration, Instant};

use e2e::bed::{self, Lent};
use e2e::kit::{self, Modules};
use e2e::report::states;
use e2e::vmpatch::Vmpatch;
use images::channel::Running;
use images::kernel::Kernel;

/// How long a program in the guest may take to get somewhere.
const PROGRAM_LIMIT: Duration = Duration::from_secs(60);
/// What the kernel complains of at its start on such a CPU, whatever is chosen against it: the microcode is not there.
const MICROCODE: &str = "Speculative Return Stack Overflow";
/// Tries to patch while the nested guest runs.
const TRIES: usize = 5;

fn guest(vcpus: u32) -> Lent {
    let config = kit::guest(Kernel::CLOUD_6_1).cpu("EPYC-Rome,+svm,+npt").vcpus(vcpus);
    bed::lend(config.module("kvm_amd"))
}

fn nested(guest: &Lent) -> Running {
    let nested = guest.spawn(&["/opt/nested"]).unwrap();
    nested.wait_for_stdout("running", PROGRAM_LIMIT).unwrap();
    nested
}

#[test]
fn a_thread_that_runs_a_nested_guest_is_inside_the_functions_that_led_there() {
    let module = Modules::of(&Kernel::CLOUD_6_1).ioctl();
    let guest = guest(2);
    let vmpatch = Vmpatch::on(&guest);
    let old = nested(&guest);
    for _ in 0..TRIES {
        let refused = vmpatch.run(&["apply", "--timeout", "2", &module]).expect(4);
        let complaint = refused.complaint();
        // The last of many looks may have met it where it enters or leaves its guest, whose code is not unwound.
        let reasons = [
            "runs a nested guest",
            "is inside __x64_sys_ioctl",
            "is not unwound from the entry code",
        ];
        let is_named = reasons.iter().any(|reason| complaint.contains(reason));
        assert!(is_named, "{complaint}");
    }
    assert_eq!(states(&vmpatch.status()), []);
    guest.text(&["kill", &old.pid().to_string()]).unwrap();
    old.wait(PROGRAM_LIMIT).unwrap();

    vmpatch.apply(&module);
    let new = nested(&guest);
    for _ in 0..TRIES {
        vmpatch.run(&["revert", "--all", "--timeout", "2"]).expect(4);
    }
    assert_eq!(states(&vmpatch.status())[0].1, "applied");
    guest.text(&["kill", &new.pid().to_string()]).unwrap();
    new.wait(PROGRAM_LIMIT).unwrap();
    vmpatch.revert_all();
    guest.discard_after_complaints(MICROCODE);
}

#[test]
fn the_kernel_is_found_although_the_only_vcpu_runs_a_nested_guest_most_of_the_time() {
    let guest = guest(1);
    let vmpatch = Vmpatch::on(&guest);
    let running = nested(&guest);
    let start = Instant::now();
    for _ in 0..20 {
        vmpatch.status();
    }
    println!("20 times in {:?}", start.elapsed());
    guest.text(&["kill", &running.pid().to_string()]).unwrap();
    running.wait(PROGRAM_LIMIT).unwrap();
    guest.discard_after_complaints(MICROCODE);
}
