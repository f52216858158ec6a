//! Tasks that sleep below code that the kernel has made while it ran: BPF trampolines, and what takes return addresses off the stack.

use e2e::bed::{self, assert_healthy};
use e2e::kit::{self, Modules};
use e2e::probe::Seen;
use e2e::sleeper::Sleeper;
use e2e::vmpatch::Vmpatch;
use images::build::hand_written::Applied;
use images::kernel::Kernel;

/// The function that the tasks sleep in, by its name in the kernel's types and by the one by which the module `pause` replaces it.
const SLEPT_IN: [&str; 2] = ["__do_sys_pause", "__x64_sys_pause"];

/// Functions in which nobody is are patched; the one in which the task sleeps is not, and the task is named.
fn a_task_asleep_below_bpf_programs_is_in_the_way_of_its_own_function_alone(kernel: Kernel) {
    let modules = Modules::of(&kernel);
    let (pair, pause) = (modules.applied(Applied::Pair), modules.applied(Applied::Pause));
    let guest = bed::lend(kit::guest(kernel));
    let (vmpatch, [name, replaced]) = (Vmpatch::on(&guest), SLEPT_IN);
    let sleeper = Sleeper::below_bpf(&guest, name);
    vmpatch.apply(&pair);
    vmpatch.revert_all();
    let refused = vmpatch.run(&["apply", "--timeout", "1", &pause]).expect(4);
    let complaint = refused.complaint();
    let inside = format!("fexit (pid {}) is inside {replaced}", sleeper.pid());
    assert!(complaint.contains(&inside), "{complaint}");
    assert_eq!(sleeper.wake(&guest), Seen::Fixed);
    vmpatch.apply(&pause);
    vmpatch.revert_all();
    assert_healthy(&guest);
}

#[test]
fn a_task_asleep_below_bpf_programs_is_in_the_way_of_its_own_function_alone_on_5_10() {
    a_task_asleep_below_bpf_programs_is_in_the_way_of_its_own_function_alone(Kernel::CLOUD_5_10);
}

#[test]
fn a_task_asleep_below_bpf_programs_is_in_the_way_of_its_own_function_alone_on_6_1() {
    a_task_asleep_below_bpf_programs_is_in_the_way_of_its_own_function_alone(Kernel::CLOUD_6_1);
}

#[test]
fn a_task_asleep_below_bpf_programs_is_in_the_way_of_its_own_function_alone_on_6_12() {
    a_task_asleep_below_bpf_programs_is_in_the_way_of_its_own_function_alone(Kernel::CLOUD_6_12);
}

#[test]
fn a_task_asleep_below_bpf_programs_is_in_the_way_of_its_own_function_alone_on_7_2() {
    a_task_asleep_below_bpf_programs_is_in_the_way_of_its_own_function_alone(Kernel::CLOUD_7_2);
}
