//! Who is inside an old function: in a guest with tasks made by hand, sound and hostile.

mod common;

use common::guest::{DATA, FUNCTIONS, Guest, heap};
use common::tasks::{INIT_TASK, START, Task, process, write};
use common::types;
use guest_core::kernel::Live;
use guest_core::task::{Quiescence, Verdict, Why};
use guest_core::unwind::{OldCode, OldFunction, SetupError};
use guest_core::{Gva, Kernel};

/// The function `victim`.
fn victim() -> OldCode {
    let start = Gva(FUNCTIONS + 64 * 3);
    let code = start..start.wrapping_add(64);
    OldCode::new(vec![OldFunction {
        name: "victim".to_owned(),
        code,
    }])
}

/// Surveys and looks again in a pause, counting reads.
fn judge(guest: &Guest, kernel: &Kernel) -> Result<Verdict, SetupError> {
    let live: Live<'_> = kernel.live(&guest.ram);
    guest.ram.count_from_here();
    let found = Quiescence::find(&live).and_then(|finder| {
        let mut snapshot = finder.snapshot(&live, victim(), Vec::new())?;
        snapshot.recheck(&live, &guest.vcpus, &|| false).map(Option::unwrap)
    });
    assert!(guest.ram.counted().0 < 8_000_000, "{:?}", guest.ram.counted());
    assert!(guest.ram.largest_read() <= 1 << 20, "{}", guest.ram.largest_read());
    found
}

#[test]
fn tasks_that_sleep_elsewhere_are_safe() {
    let guest = Guest::new();
    let verdict = judge(&guest, &guest.kernel()).unwrap();
    assert!(verdict.is_safe(), "{verdict:?}");
}

#[test]
fn a_task_that_sleeps_inside_is_named_with_its_stack() {
    let guest = Guest::new();
    let kernel = guest.kernel();
    write(
        &guest,
        process(2),
        "stuck",
        &[FUNCTIONS + 16, FUNCTIONS + 64 * 3 + 20, START + 1],
    );
    let verdict = judge(&guest, &kernel).unwrap();
    let [blocker] = verdict.blockers.as_slice() else {
        panic!("{verdict:?}")
    };
    assert_eq!(
        (blocker.task.pid, blocker.task.comm.as_str(), blocker.function.as_str()),
        (102, "stuck", "victim")
    );
    let stack: Vec<u64> = blocker.stack.iter().map(|frame| frame.ip.0).collect();
    assert_eq!(stack, [FUNCTIONS + 16, FUNCTIONS + 64 * 3 + 20, START + 1]);
}

#[test]
fn a_stack_that_does_not_unwind_is_unsure_and_not_safe() {
    let guest = Guest::new();
    let kernel = guest.kernel();
    for beyond in [0, 1, DATA, u64::MAX, FUNCTIONS + 64 * 5000] {
        let returns = [FUNCTIONS + 16, FUNCTIONS + 64 * 3, beyond];
        write(&guest, process(1), "lost", &returns);
        let verdict = judge(&guest, &kernel).unwrap();
        assert!(!verdict.is_safe(), "{beyond:#x}");
    }
}

#[test]
fn wild_stack_pointers_are_unsure() {
    for wild in [0, 7, u64::MAX, u64::MAX - 7, DATA, process(2).stack] {
        for offset in [32, 256 + 24] {
            let guest = Guest::new();
            let kernel = guest.kernel();
            guest.put_u64(process(1).at + offset, wild);
            let verdict = judge(&guest, &kernel).unwrap();
            assert!(!verdict.unsure.is_empty(), "{wild:#x} at {offset}: {verdict:?}");
        }
    }
}

#[test]
fn task_lists_in_a_circle_or_into_nowhere_are_errors() {
    let circle = |at| heap(at);
    for (at, to) in [
        (INIT_TASK + 64, 0),
        (INIT_TASK + 64, u64::MAX),
        (process(3).at + 64, process(1).at + 64),
        (process(3).at + 64, circle(0x40)),
        (process(1).at + 88, process(1).at + 88),
        (process(1).at + 104, 0),
        (process(1).at + 104, u64::MAX),
    ] {
        let guest = Guest::new();
        let kernel = guest.kernel();
        guest.put_u64(at, to);
        assert!(judge(&guest, &kernel).is_err(), "{at:#x} to {to:#x}");
    }
}

/// In the pause, the processes born since are read from the end of the list; here all of them share one list of
/// threads.
#[test]
fn processes_that_share_a_long_list_of_threads_are_bounded_in_the_pause() {
    let guest = Guest::new();
    let kernel = guest.kernel();
    let live = kernel.live(&guest.ram);
    let finder = Quiescence::find(&live).unwrap();
    let mut snapshot = finder.snapshot(&live, victim(), Vec::new()).unwrap();
    let leaders: Vec<u64> = (0..5000).map(|number| heap(0xd_0000 + 0x40 * number)).collect();
    let threads: Vec<u64> = (0..15_000).map(|number| heap(0x12_0000 + 0x10 * number)).collect();
    let signal = heap(0x18_0000);
    guest.link(signal + 16, &threads);
    for leader in &leaders {
        guest.put_u64(leader + 40, signal);
    }
    let known: Vec<u64> = (0..4).map(|number| process(number).at + 64).collect();
    guest.link(INIT_TASK + 64, &[known, leaders].concat());
    guest.put_u64(guest.symbol("total_forks"), 3 + 20_000);
    guest.put(guest.symbol("nr_threads"), &(4 + 20_000_u32).to_le_bytes());
    guest.ram.count_from_here();
    let _ = snapshot.recheck(&live, &guest.vcpus, &|| false);
    assert!(guest.ram.counted().0 < 8_000_000, "{:?}", guest.ram.counted());
}

#[test]
fn a_deep_stack_is_reported_without_all_of_it() {
    let guest = Guest::new();
    let kernel = guest.kernel();
    let deep = vec![FUNCTIONS + 64 * 3 + 20; 1500];
    write(&guest, process(0), "deep", &deep);
    let verdict = judge(&guest, &kernel).unwrap();
    let [blocker] = verdict.blockers.as_slice() else {
        panic!("{verdict:?}")
    };
    assert_eq!(blocker.stack.len(), 64);
}

#[test]
fn a_vcpu_on_no_stack_that_it_should_be_on_is_unsure() {
    for rsp in [0, 8, u64::MAX, DATA, process(0).stack + 8] {
        let mut guest = Guest::new();
        guest.vcpus[1].general[4] = rsp;
        let verdict = judge(&guest, &guest.kernel()).unwrap();
        assert!(!verdict.is_safe(), "{rsp:#x}");
    }
}

#[test]
fn two_vcpus_on_one_cpu_are_unsure() {
    let mut guest = Guest::new();
    guest.vcpus[1].gs_base = guest.vcpus[0].gs_base;
    assert!(!judge(&guest, &guest.kernel()).unwrap().is_safe());
}

/// Sizes that the guest's type information makes up must not become buffers.
#[test]
fn wild_sizes_in_the_type_information_are_refused_or_cut() {
    let blob = types::blob(false);
    let sizes = [
        "module",
        "irq_stack",
        "pt_regs",
        "inactive_task_frame",
        "orc_entry",
        "ftrace_ret_stack",
        "task_struct",
    ];
    let sizes = sizes.map(|name| (name, types::size_at(&blob, name)));
    let lengths = ["DF_stack", "NMI_stack", "comm"].map(|name| (name, types::length_at(&blob, name)));
    for (name, at) in sizes.into_iter().chain(lengths) {
        for wild in [0, 1, 0x7fff_ffff, u32::MAX] {
            let guest = Guest::new();
            guest.put(guest.symbol("__start_BTF") + at as u64, &wild.to_le_bytes());
            let kernel = guest.kernel();
            let verdict = judge(&guest, &kernel);
            let stacks = ["irq_stack", "DF_stack", "NMI_stack"];
            assert!(
                wild <= 1 || !stacks.contains(&name) || verdict.is_err(),
                "{name} {wild:#x}"
            );
        }
    }
}

/// 1500 tasks that share a stack of 1800 frames, each of which needs a closer look: 2.7 million frames.
#[test]
fn tasks_that_share_a_deep_stack_are_bounded_together() {
    let guest = Guest::new();
    let kernel = guest.kernel();
    // in the direct map, so that a read of the stack is one read
    let deep = Task {
        stack: heap(0xc_0000),
        ..process(0)
    };
    write(&guest, deep, "deep", &[FUNCTIONS + 64 * 3 + 20; 1800]);
    let sp = guest.u64_at(deep.at + 256 + 24);
    let signal = heap(0x1f_0000);
    let tasks: Vec<u64> = (0..1500).map(|number| heap(0xd_0000 + 0x200 * number)).collect();
    let threads: Vec<u64> = tasks.iter().map(|at| at + 88).collect();
    guest.link(signal + 16, &threads);
    guest.link(INIT_TASK + 64, &[tasks[0] + 64, process(1).at + 64]);
    for at in &tasks {
        guest.put_u64(at + 104, signal);
        guest.put_u64(at + 32, deep.stack);
        guest.put_u64(at + 256 + 24, sp);
    }
    guest.put(guest.symbol("nr_threads"), &1501_u32.to_le_bytes());
    let verdict = judge(&guest, &kernel).unwrap();
    assert_eq!(verdict.blockers.len(), Verdict::NAMED_MAX);
    assert!(verdict.unsure.iter().all(|unsure| unsure.why == Why::TooManyFrames));
    assert_eq!(verdict.unsure.len(), Verdict::NAMED_MAX);
}
