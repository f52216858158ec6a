use super::*;
use crate::memory::VirtMemory;
use crate::unwind::testing::{OTHER_TABLES, STACK_BYTES, Sample, TEXT, entry, task};
use crate::unwind::{OldCode, OldFunction};
use crate::vcpu::Registers;

const INIT: u64 = 0xffff_ffff_8280_0000;
const CPU_DATA: u64 = 0xffff_8880_1000_0000;
const COUNTS: u64 = 0xffff_ffff_8290_0000;
const TASKS: u64 = 0xffff_8880_2000_0000;
const STACKS: u64 = 0xffff_c900_0000_0000;
/// The word at the lowest address of a stack.
const STACK_END_MAGIC: u64 = 0x57ac_6e9d;
const SIGNALS: u64 = 0xffff_8880_3000_0000;
/// The code between user mode and the kernel proper.
const ENTRY: u64 = TEXT + 0xa00;
/// The functions: one that sleeps, its callers, and where threads start.
const FUNCTIONS: [(&str, [u8; 6]); 6] = [
    ("sleep", entry::CALL_8),
    ("old", entry::CALL_8),
    ("other", entry::CALL_8),
    ("ret_from_fork_asm", entry::END),
    ("arch_rethook_trampoline", entry::UNDEFINED),
    ("on_irq_stack", entry::SWITCH),
];

/// A guest with one CPU, which runs task 1. The other tasks sleep.
struct Guest {
    sample: Sample,
}

impl Guest {
    /// Has tasks 1 to `tasks`, each a process of its own, asleep in `other`. Task 0 is the idle task.
    fn new(tasks: u64) -> Self {
        let mut sample = Sample::new(&FUNCTIONS);
        for (name, at) in [
            ("init_task", INIT),
            ("total_forks", COUNTS),
            ("nr_threads", COUNTS + 8),
            ("__cpu_online_mask", COUNTS + 16),
            ("current_task", 0),
            ("runqueues", 8),
            ("hardirq_stack_ptr", 32),
            ("cea_exception_stacks", 40),
            ("vmalloc_base", COUNTS + 24),
            ("vmemmap_base", COUNTS + 32),
            ("cached_stacks", 48),
            ("__entry_text_start", ENTRY),
            ("__entry_text_end", ENTRY + 0x100),
            ("entry_SYSCALL_64", ENTRY),
        ] {
            sample.set_symbol(name, at);
        }
        sample.offsets = vec![CPU_DATA];
        sample.put_words(COUNTS, &[100, tasks, 1, STACKS, STACKS + (1 << 40)]);
        sample.put_words(CPU_DATA, &[0; 8]);
        let guest = Self { sample };
        for number in 0..=tasks {
            guest.put_task(number);
            guest.sleeps_in(number, TEXT + 0x210);
        }
        guest.link(tasks);
        guest.runs(1, 7);
        guest
    }

    fn at(number: u64) -> u64 {
        if number == 0 { INIT } else { TASKS + number * 0x1000 }
    }

    fn stack(number: u64) -> u64 {
        STACKS + number * 0x10000
    }

    fn put_task(&self, number: u64) {
        let (at, signal) = (Self::at(number), SIGNALS + number * 0x100);
        self.sample.put(at, &[0; task::BYTES as usize]);
        self.sample.put(Self::stack(number), &[0; STACK_BYTES as usize]);
        self.sample.put_words(Self::stack(number), &[STACK_END_MAGIC]);
        self.sample.put_words(at + task::STACK, &[Self::stack(number)]);
        let node = at + task::THREAD_NODE;
        self.sample.put_words(signal, &[node, node]);
        self.sample.put_words(node, &[signal, signal]);
        self.sample.put_words(at + task::SIGNAL, &[signal]);
        self.sample.put(at + task::PID, &(number as u32).to_le_bytes());
        self.sample.put_words(at + task::START_TIME, &[1000 + number]);
        self.sample.put(at + task::COMM, b"task\x1b[2J\0");
    }

    /// Links tasks 0 to `last` into the list of processes.
    fn link(&self, last: u64) {
        let node = |number: u64| Self::at(number % (last + 1)) + task::TASKS;
        for number in 0..=last {
            self.sample
                .put_words(node(number), &[node(number + 1), node(number + last)]);
        }
    }

    /// Lets a task sleep in `sleep`, called from `caller`, called from where threads start.
    fn sleeps_in(&self, number: u64, caller: u64) {
        let sp = Self::stack(number) + 0x3f00;
        self.sample
            .put_words(sp, &[0, 0, 0, 0, 0, 0, TEXT + 0x10, caller, TEXT + 0x310]);
        self.sample.put_words(Self::at(number) + task::SP, &[sp]);
    }

    fn counts(&self, number: u64, switches: u64) {
        self.sample.put_words(Self::at(number) + task::SWITCHES, &[switches, 0]);
    }

    /// Lets the CPU run a task, after `switches` task switches.
    fn runs(&self, number: u64, switches: u64) {
        let at = Self::at(number);
        self.sample.put_words(CPU_DATA, &[at, at, INIT, switches, 0, 0]);
        for other in 0..64 {
            if self.sample.read_u64(Gva(Self::at(other))).is_ok() {
                self.sample.put(
                    Self::at(other) + task::ON_CPU,
                    &u32::from(other == number).to_le_bytes(),
                );
            }
        }
    }

    fn snapshot<'q>(&self, finder: &'q Quiescence) -> Snapshot<'q> {
        let code = Gva(TEXT + 0x100)..Gva(TEXT + 0x200);
        let old = OldCode::new(vec![OldFunction {
            name: "old".into(),
            code,
        }]);
        finder.snapshot(&self.sample, old, Vec::new()).unwrap()
    }

    fn recheck(&self, snapshot: &mut Snapshot<'_>, vcpus: &[Registers]) -> Verdict {
        snapshot.recheck(&self.sample, vcpus, &|| false).unwrap().unwrap()
    }
}

/// The vCPU in user mode, or in the kernel with its stack pointer on a task's stack.
fn vcpu(kernel: Option<(u64, u64)>) -> Registers {
    let mut registers = Registers {
        efer: 0x500,
        cs: 0x33,
        kernel_gs_base: Some(CPU_DATA),
        ..Registers::default()
    };
    if let Some((rip, sp)) = kernel {
        (registers.cs, registers.gs_base, registers.kernel_gs_base) = (0x10, CPU_DATA, Some(0));
        (registers.rip, registers.general[4]) = (rip, sp);
    }
    registers
}

fn blocked(verdict: &Verdict) -> Vec<u32> {
    assert_eq!(verdict.unsure, []);
    verdict.blockers.iter().map(|blocker| blocker.task.pid).collect()
}

#[test]
fn a_guest_whose_tasks_all_sleep_elsewhere_is_safe() {
    let guest = Guest::new(4);
    let finder = Quiescence::find(&guest.sample).unwrap();
    let mut snapshot = guest.snapshot(&finder);
    assert_eq!(snapshot.task_count(), 5);
    assert!(snapshot.preview(&guest.sample).is_safe());
    assert!(guest.recheck(&mut snapshot, &[vcpu(None)]).is_safe());
}

#[test]
fn a_task_that_sleeps_in_a_callee_of_an_old_function_is_named_with_its_stack() {
    let guest = Guest::new(4);
    guest.sleeps_in(3, TEXT + 0x120);
    let finder = Quiescence::find(&guest.sample).unwrap();
    let mut snapshot = guest.snapshot(&finder);
    let verdict = snapshot.preview(&guest.sample);
    assert_eq!(verdict, guest.recheck(&mut snapshot, &[vcpu(None)]));
    let [blocker] = verdict.blockers.as_slice() else {
        panic!("{verdict:?}")
    };
    assert_eq!(
        (blocker.task.to_string(), blocker.function.as_str()),
        ("task?[2J (pid 3)".into(), "old")
    );
    let stack: Vec<_> = blocker.stack.iter().map(|frame| frame.ip.0 - TEXT).collect();
    assert_eq!(stack, [0x10, 0x120, 0x310]);
}

#[test]
fn an_address_that_is_only_left_over_on_a_stack_does_not_block() {
    let guest = Guest::new(2);
    // The address is above the frames, where nothing returns to.
    guest.sample.put_words(Guest::stack(2) + 0x3f80, &[TEXT + 0x120]);
    let finder = Quiescence::find(&guest.sample).unwrap();
    assert!(guest.recheck(&mut guest.snapshot(&finder), &[vcpu(None)]).is_safe());
}

#[test]
fn a_task_that_ran_since_the_snapshot_is_checked_again() {
    let guest = Guest::new(4);
    let finder = Quiescence::find(&guest.sample).unwrap();
    let mut snapshot = guest.snapshot(&finder);
    guest.sleeps_in(2, TEXT + 0x120);
    guest.counts(2, 1);
    guest.runs(1, 9);
    assert_eq!(blocked(&guest.recheck(&mut snapshot, &[vcpu(None)])), [2]);
    // The task leaves the old function again.
    guest.sleeps_in(2, TEXT + 0x210);
    guest.counts(2, 2);
    guest.runs(1, 11);
    snapshot.rescan(&guest.sample).unwrap();
    assert!(guest.recheck(&mut snapshot, &[vcpu(None)]).is_safe());
}

#[test]
fn a_recheck_has_no_verdict_if_the_time_is_over_before_all_are_checked() {
    let guest = Guest::new(3);
    let finder = Quiescence::find(&guest.sample).unwrap();
    let mut snapshot = guest.snapshot(&finder);
    let over = |snapshot: &mut Snapshot<'_>| snapshot.recheck(&guest.sample, &[vcpu(None)], &|| true).unwrap();
    guest.counts(2, 1);
    guest.runs(1, 9);
    assert_eq!(over(&mut snapshot), None);
    assert!(guest.recheck(&mut snapshot, &[vcpu(None)]).is_safe());
    // A task was born since.
    guest.put_task(4);
    guest.sleeps_in(4, TEXT + 0x210);
    guest.link(4);
    guest.sample.put_words(COUNTS, &[101, 4]);
    assert_eq!(over(&mut snapshot), None);
    assert!(guest.recheck(&mut snapshot, &[vcpu(None)]).is_safe());
}

#[test]
fn a_task_that_was_running_is_checked_where_it_sleeps_now() {
    let guest = Guest::new(4);
    let finder = Quiescence::find(&guest.sample).unwrap();
    let mut snapshot = guest.snapshot(&finder);
    guest.sleeps_in(1, TEXT + 0x120);
    guest.counts(1, 1);
    guest.runs(4, 8);
    assert_eq!(blocked(&guest.recheck(&mut snapshot, &[vcpu(None)])), [1]);
}

#[test]
fn a_vcpu_in_the_kernel_is_unwound_from_its_registers() {
    let guest = Guest::new(2);
    let finder = Quiescence::find(&guest.sample).unwrap();
    let sp = Guest::stack(1) + 0x3f40;
    let at = |rip: u64, caller: u64| {
        guest.sample.put_words(sp, &[caller, TEXT + 0x310]);
        guest.recheck(&mut guest.snapshot(&finder), &[vcpu(Some((rip, sp)))])
    };
    assert!(at(TEXT + 0x10, TEXT + 0x220).is_safe());
    assert_eq!(blocked(&at(TEXT + 0x10, TEXT + 0x120)), [1]);
    assert_eq!(blocked(&at(TEXT + 0x100, TEXT + 0x310)), [1]);
    // An instruction pointer behind the old function is not inside; a return address there is.
    assert!(at(TEXT + 0x200, TEXT + 0x310).is_safe());
    assert_eq!(blocked(&at(TEXT + 0x10, TEXT + 0x200)), [1]);
}

#[test]
fn words_below_a_running_tasks_stack_pointer_do_not_count() {
    let guest = Guest::new(1);
    let finder = Quiescence::find(&guest.sample).unwrap();
    let sp = Guest::stack(1) + 0x3f40;
    guest
        .sample
        .put_words(sp - 8, &[TEXT + 0x120, TEXT + 0x220, TEXT + 0x310]);
    assert!(
        guest
            .recheck(&mut guest.snapshot(&finder), &[vcpu(Some((TEXT + 0x10, sp)))])
            .is_safe()
    );
}

#[test]
fn contexts_that_cannot_be_understood_are_not_safe() {
    let guest = Guest::new(2);
    let finder = Quiescence::find(&guest.sample).unwrap();
    let why = |vcpus: &[Registers]| {
        let verdict = guest.recheck(&mut guest.snapshot(&finder), vcpus);
        assert!(!verdict.is_safe());
        verdict.unsure.first().unwrap().why.clone()
    };
    let sp = Guest::stack(1) + 0x3f40;
    // No vCPU for the CPU; two vCPUs for it; a GS base of no CPU; a stack pointer on no stack.
    assert_eq!(why(&[]), Why::NoVcpu { cpu: 0 });
    assert_eq!(why(&[vcpu(None), vcpu(None)]), Why::WhichCpu { vcpu: 1, rip: 0 });
    let foreign = Registers {
        gs_base: 1,
        ..vcpu(Some((TEXT, sp)))
    };
    assert_eq!(why(&[foreign]), Why::WhichCpu { vcpu: 0, rip: TEXT });
    assert_eq!(
        why(&[vcpu(Some((TEXT, 0x7fff_0000)))]),
        Why::Between {
            cpu: 0,
            rip: TEXT,
            sp: 0x7fff_0000
        }
    );
    // A vCPU in user mode whose kernel GS base the VMM does not tell counts for the CPU that is left.
    let untold = Registers {
        kernel_gs_base: None,
        ..vcpu(None)
    };
    assert!(guest.recheck(&mut guest.snapshot(&finder), &[untold]).is_safe());
    assert_eq!(why(&[untold, untold]), Why::NoVcpu { cpu: 0 });
}

#[test]
fn a_vcpu_that_runs_a_nested_guest_is_not_in_user_mode_of_this_kernel() {
    let guest = Guest::new(2);
    let finder = Quiescence::find(&guest.sample).unwrap();
    let nested = |registers: Registers| {
        let verdict = guest.recheck(&mut guest.snapshot(&finder), &[registers]);
        verdict.unsure.first().map(|unsure| unsure.why.clone())
    };
    let user = vcpu(None);
    assert_eq!(nested(user), None);
    let cases = [
        // In its user mode: its page tables, and no GS base, its own, or one that is equal to this kernel's.
        Registers {
            cr3: OTHER_TABLES,
            kernel_gs_base: Some(0),
            ..user
        },
        Registers {
            cr3: OTHER_TABLES,
            kernel_gs_base: Some(0x7000),
            ..user
        },
        Registers {
            cr3: OTHER_TABLES,
            ..user
        },
        // Its page tables may map the same addresses, but then its GS base is another one.
        Registers {
            kernel_gs_base: Some(0x7000),
            ..user
        },
        // In its kernel.
        Registers {
            cr3: OTHER_TABLES,
            ..vcpu(Some((TEXT + 0x10, Guest::stack(1) + 0x3f40)))
        },
        // In real mode.
        Registers { efer: 0, cs: 0, ..user },
    ];
    for registers in cases {
        assert_eq!(nested(registers), Some(Why::NoVcpu { cpu: 0 }), "{registers:x?}");
    }
}

#[test]
fn a_task_switch_in_flight_has_one_task_on_the_cpu_and_one_saved() {
    let guest = Guest::new(2);
    let finder = Quiescence::find(&guest.sample).unwrap();
    let mut snapshot = guest.snapshot(&finder);
    // rq->curr is already task 2; current and the stack are still task 1's.
    guest.sample.put_words(CPU_DATA, &[Guest::at(1), Guest::at(2)]);
    let sp = Guest::stack(1) + 0x3f40;
    guest.sample.put_words(sp, &[TEXT + 0x220, TEXT + 0x310]);
    let registers = [vcpu(Some((TEXT + 0x10, sp)))];
    assert!(guest.recheck(&mut snapshot, &registers).is_safe());
    guest.sleeps_in(2, TEXT + 0x120);
    assert_eq!(blocked(&guest.recheck(&mut snapshot, &registers)), [2]);
}

#[test]
fn tasks_born_after_the_snapshot_are_found() {
    let guest = Guest::new(3);
    let finder = Quiescence::find(&guest.sample).unwrap();
    let mut snapshot = guest.snapshot(&finder);
    guest.put_task(4);
    guest.sleeps_in(4, TEXT + 0x120);
    guest.link(4);
    guest.sample.put_words(COUNTS, &[101, 4]);
    guest.counts(1, 1);
    guest.runs(1, 9);
    assert_eq!(blocked(&guest.recheck(&mut snapshot, &[vcpu(None)])), [4]);
    assert_eq!(snapshot.task_count(), 5);
}

#[test]
fn a_thread_born_after_the_snapshot_is_found_behind_its_siblings() {
    let guest = Guest::new(3);
    let finder = Quiescence::find(&guest.sample).unwrap();
    let mut snapshot = guest.snapshot(&finder);
    guest.put_task(9);
    guest.sleeps_in(9, TEXT + 0x120);
    // A second thread of the process of task 1, which runs.
    let (signal, first, second) = (
        SIGNALS + 0x100,
        Guest::at(1) + task::THREAD_NODE,
        Guest::at(9) + task::THREAD_NODE,
    );
    guest.sample.put_words(signal, &[first, second]);
    guest.sample.put_words(first, &[second, signal]);
    guest.sample.put_words(second, &[signal, first]);
    guest.sample.put_words(COUNTS, &[101, 4]);
    assert_eq!(blocked(&guest.recheck(&mut snapshot, &[vcpu(None)])), [9]);
}

#[test]
fn a_new_task_at_a_dead_ones_address_is_not_taken_for_it() {
    let guest = Guest::new(3);
    let finder = Quiescence::find(&guest.sample).unwrap();
    let mut snapshot = guest.snapshot(&finder);
    // The new task has the same address and counts, was born later, and sleeps in the old function.
    guest.put_task(3);
    guest.link(3);
    guest.sample.put_words(Guest::at(3) + task::START_TIME, &[5000]);
    guest.sleeps_in(3, TEXT + 0x120);
    guest.sample.put_words(COUNTS, &[101, 3]);
    assert_eq!(blocked(&guest.recheck(&mut snapshot, &[vcpu(None)])), [3]);
}

/// Unlinks task 4, which is asleep with a return into the old function on its stack.
fn ends(guest: &Guest) {
    guest.link(3);
    guest.sample.put_words(COUNTS, &[100, 3]);
    guest.sleeps_in(4, TEXT + 0x120);
}

fn unlisted(verdict: &Verdict) -> Option<u64> {
    assert_eq!(verdict.blockers, []);
    match verdict.unsure.first()?.why {
        Why::Unlisted { stack, .. } => Some(stack.0),
        _ => panic!("{verdict:?}"),
    }
}

#[test]
fn a_stack_in_an_old_function_whose_task_is_on_no_list_is_not_safe() {
    let guest = Guest::new(4);
    ends(&guest);
    let finder = Quiescence::find(&guest.sample).unwrap();
    let mut snapshot = guest.snapshot(&finder);
    let verdict = guest.recheck(&mut snapshot, &[vcpu(None)]);
    assert_eq!(unlisted(&verdict), Some(Guest::stack(4)));
    let why = verdict.unsure[0].why.to_string();
    assert!(
        why.contains("no list of tasks") && why.contains("an address in old"),
        "{why}"
    );
    // It goes on with something else.
    guest.sleeps_in(4, TEXT + 0x210);
    assert!(guest.recheck(&mut snapshot, &[vcpu(None)]).is_safe());
}

#[test]
fn a_cached_or_freed_stack_does_not_count() {
    let guest = Guest::new(4);
    ends(&guest);
    let finder = Quiescence::find(&guest.sample).unwrap();
    let mut snapshot = guest.snapshot(&finder);
    // The second stack that the CPU keeps. Its area is at 0x...700, with the stack's address behind a word.
    let area = CPU_DATA + 0x700;
    guest.sample.put_words(area, &[0, Guest::stack(4)]);
    guest.sample.put_words(CPU_DATA + 56, &[area]);
    assert!(guest.recheck(&mut snapshot, &[vcpu(None)]).is_safe());
    assert!(guest.recheck(&mut guest.snapshot(&finder), &[vcpu(None)]).is_safe());
    guest.sample.put_words(CPU_DATA + 56, &[0]);
    assert_eq!(
        unlisted(&guest.recheck(&mut snapshot, &[vcpu(None)])),
        Some(Guest::stack(4))
    );
    // RCU and vmalloc link a freed stack at its start.
    guest.sample.put_words(Guest::stack(4), &[0xffff_8880_0000_1000]);
    assert!(guest.recheck(&mut snapshot, &[vcpu(None)]).is_safe());
}

#[test]
fn a_task_that_ends_after_the_snapshot_is_still_checked() {
    let guest = Guest::new(4);
    let finder = Quiescence::find(&guest.sample).unwrap();
    let mut snapshot = guest.snapshot(&finder);
    ends(&guest);
    guest.counts(4, 1);
    guest.runs(1, 9);
    assert_eq!(blocked(&guest.recheck(&mut snapshot, &[vcpu(None)])), [4]);
}

#[test]
fn a_task_that_was_born_and_is_ending_before_the_pause_is_found() {
    let guest = Guest::new(4);
    let finder = Quiescence::find(&guest.sample).unwrap();
    let mut snapshot = guest.snapshot(&finder);
    guest.put_task(5);
    guest.sleeps_in(5, TEXT + 0x120);
    guest.sample.put_words(COUNTS, &[101, 4]);
    guest.runs(1, 9);
    assert_eq!(
        unlisted(&guest.recheck(&mut snapshot, &[vcpu(None)])),
        Some(Guest::stack(5))
    );
    // Another task was born meanwhile, and lives on.
    let mut snapshot = guest.snapshot(&finder);
    guest.put_task(6);
    guest.put_task(7);
    guest.sleeps_in(6, TEXT + 0x210);
    guest.sleeps_in(7, TEXT + 0x120);
    guest.sleeps_in(5, TEXT + 0x210);
    guest.sample.put_words(
        Guest::at(6) + task::TASKS,
        &[INIT + task::TASKS, Guest::at(4) + task::TASKS],
    );
    guest.sample.put_words(
        Guest::at(4) + task::TASKS,
        &[Guest::at(6) + task::TASKS, Guest::at(3) + task::TASKS],
    );
    guest.sample.put_words(
        INIT + task::TASKS,
        &[Guest::at(1) + task::TASKS, Guest::at(6) + task::TASKS],
    );
    guest.sample.put_words(COUNTS, &[103, 5]);
    guest.runs(1, 10);
    assert_eq!(
        unlisted(&guest.recheck(&mut snapshot, &[vcpu(None)])),
        Some(Guest::stack(7))
    );
}

#[test]
fn a_kernel_without_stacks_in_vmalloc_is_refused() {
    let guest = Guest::new(4);
    for number in 0..5 {
        guest.sample.put_words(Guest::stack(number), &[0]);
    }
    let finder = Quiescence::find(&guest.sample).unwrap();
    let error = finder
        .snapshot(&guest.sample, OldCode::default(), Vec::new())
        .unwrap_err();
    assert!(error.to_string().contains("CONFIG_VMAP_STACK"), "{error}");
}

#[test]
fn lists_that_never_end_are_errors() {
    let guest = Guest::new(3);
    let finder = Quiescence::find(&guest.sample).unwrap();
    // The task behind task 3 is task 2.
    guest
        .sample
        .put_words(Guest::at(3) + task::TASKS, &[Guest::at(2) + task::TASKS]);
    let error = finder
        .snapshot(&guest.sample, OldCode::default(), Vec::new())
        .unwrap_err();
    assert!(error.to_string().contains("more than 262144 elements"), "{error}");
}

#[test]
fn a_wild_stack_pointer_is_not_safe() {
    let guest = Guest::new(3);
    let finder = Quiescence::find(&guest.sample).unwrap();
    for sp in [
        0,
        u64::MAX,
        Guest::stack(2) + STACK_BYTES,
        Guest::stack(2) + 1,
        Guest::stack(3),
    ] {
        guest.sample.put_words(Guest::at(2) + task::SP, &[sp]);
        let verdict = guest.snapshot(&finder).preview(&guest.sample);
        assert_eq!(verdict.unsure.first().unwrap().why, Why::StackPointer { sp });
    }
}

#[test]
fn a_return_into_an_old_function_that_a_tracer_hides_blocks() {
    let guest = Guest::new(2);
    let finder = Quiescence::find(&guest.sample).unwrap();
    // A kretprobe keeps the return address into the old function. The stack holds its trampoline.
    let (slot, node) = (Guest::stack(2) + 0x3f38, Guest::stack(2) + 0x100);
    guest.sleeps_in(2, TEXT + 0x400);
    guest.sample.put_words(node, &[0, TEXT + 0x120, slot]);
    assert_eq!(guest.snapshot(&finder).preview(&guest.sample).unsure.len(), 1);
    guest.sample.put_words(Guest::at(2) + task::RETHOOKS, &[node]);
    let verdict = guest.snapshot(&finder).preview(&guest.sample);
    assert_eq!(blocked(&verdict), [2]);
    let stack: Vec<_> = verdict.blockers[0]
        .stack
        .iter()
        .map(|frame| frame.ip.0 - TEXT)
        .collect();
    assert_eq!(stack, [0x10, 0x120, 0x310]);
}

#[test]
fn a_vcpu_between_user_mode_and_the_kernel_has_nothing_on_the_kernels_stack() {
    let guest = Guest::new(1);
    let finder = Quiescence::find(&guest.sample).unwrap();
    guest.sample.put_words(Guest::stack(1) + 0x3ff0, &[TEXT + 0x120]);
    // At a system call's first instruction: the user's stack, and the user's GS base.
    let mut registers = vcpu(Some((ENTRY, 0x7fff_0000)));
    (registers.gs_base, registers.kernel_gs_base) = (0, Some(CPU_DATA));
    assert!(guest.recheck(&mut guest.snapshot(&finder), &[registers]).is_safe());
    // The user has set its GS base to that of a CPU.
    registers.gs_base = CPU_DATA;
    assert!(guest.recheck(&mut guest.snapshot(&finder), &[registers]).is_safe());
    // Where the VMM does not tell the other one, it may be that of another CPU.
    registers.kernel_gs_base = None;
    let verdict = guest.recheck(&mut guest.snapshot(&finder), &[registers]);
    assert_eq!(
        verdict.unsure.first().unwrap().why,
        Why::WhichCpu { vcpu: 0, rip: ENTRY }
    );
}

#[test]
fn no_stack_is_unwound_from_the_entry_code() {
    let guest = Guest::new(1);
    let finder = Quiescence::find(&guest.sample).unwrap();
    let sp = Guest::stack(1) + 0x3f40;
    guest.sample.put_words(sp, &[TEXT + 0x220, TEXT + 0x310]);
    let rip = ENTRY + 0x10;
    let recheck = || guest.recheck(&mut guest.snapshot(&finder), &[vcpu(Some((rip, sp)))]);
    assert!(recheck().is_safe());
    guest.sample.put_words(sp + 0x20, &[TEXT + 0x120]);
    assert_eq!(recheck().unsure.first().unwrap().why, Why::Entry { rip });
}

#[test]
fn a_vcpu_in_an_interrupt_has_its_task_scanned_too() {
    let guest = Guest::new(1);
    let finder = Quiescence::find(&guest.sample).unwrap();
    let irq = STACKS + 0x90_0000;
    guest.sample.put(irq, &[0; STACK_BYTES as usize]);
    guest.sample.put_words(CPU_DATA + 32, &[irq + STACK_BYTES - 8]);
    // The top word of the interrupt stack is the task's stack pointer.
    let (top, sp) = (irq + STACK_BYTES - 8, Guest::stack(1) + 0x3f40);
    guest.sample.put_words(top - 8, &[TEXT + 0x510, sp]);
    guest.sample.put_words(sp, &[TEXT + 0x320]);
    let registers = [vcpu(Some((TEXT + 0x10, top - 8)))];
    let recheck = || guest.recheck(&mut guest.snapshot(&finder), &registers);
    assert!(recheck().is_safe());
    // The address is left over at the far end of the task's stack. The walk does not get there, and decides.
    guest.sample.put_words(Guest::stack(1) + 0x100, &[TEXT + 0x120]);
    assert!(recheck().is_safe());
    // The interrupted code is in the old function.
    guest.sample.put_words(sp, &[TEXT + 0x120, TEXT + 0x320]);
    assert_eq!(blocked(&recheck()), [1]);
    // A walk that ended on the interrupt stack would leave out the task's.
    guest.sample.put_words(top - 8, &[TEXT + 0x320]);
    assert!(!recheck().is_safe());
}
