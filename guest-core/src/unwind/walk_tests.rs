use super::hooked_returns::HookedReturn;
use super::testing::{STACK_BYTES, Sample, basic_types, entry};
use super::*;
use crate::addr::Gva;
use crate::btf::builder::{Builder, STRUCT};

const STACK: u64 = 0xffff_c900_0000_0000;
const IRQ: u64 = 0xffff_c900_0010_0000;

/// Two stacks with words at the given addresses, and the start of a walk.
struct Case {
    sample: Sample,
    start: Start,
    hidden: Vec<HookedReturn>,
    /// Makes a case whose task stack ends behind its last word.
    end: u64,
}

fn case(functions: &[(&'static str, [u8; 6])], words: &[(u64, Vec<u64>)], start: (u64, u64)) -> Case {
    let sample = Sample::new(functions);
    sample.put(STACK, &[0; STACK_BYTES as usize]);
    sample.put(IRQ, &[0; STACK_BYTES as usize]);
    for (at, words) in words {
        sample.put_words(*at, words);
    }
    let frame = Frame {
        ip: Gva(start.0),
        sp: start.1,
        interrupted: false,
    };
    let ends = words.iter().map(|(at, words)| at + 8 * words.len() as u64);
    let end = ends.filter(|&end| end < IRQ).max().unwrap();
    Case {
        sample,
        end,
        start: Start {
            frame,
            bp: 0,
            general: None,
        },
        hidden: Vec::new(),
    }
}

/// The visited frames, as names with a mark for interrupted ones, and the result of the walk.
fn walked(case: &Case) -> (Vec<String>, Result<(), UnwindError>) {
    let code = CodeMap::read(&case.sample, &[]).unwrap();
    let returns = HookedReturns::read(&case.sample).unwrap();
    let regs = PtRegs::read(case.sample.btf()).unwrap();
    let stacks = [
        Stack {
            kind: StackKind::Task,
            range: Gva(STACK)..Gva(case.end),
        },
        Stack {
            kind: StackKind::Irq,
            range: Gva(IRQ)..Gva(IRQ + STACK_BYTES),
        },
    ];
    let unwinder = Unwinder {
        code: &code,
        returns: &returns,
        regs: &regs,
    };
    let mut seen = Vec::new();
    let end = unwinder.walk(&case.sample, case.start, &stacks, &case.hidden, &mut |frame| {
        seen.push(format!(
            "{:#x}{}",
            frame.ip.0 & 0xfff,
            if frame.interrupted { "!" } else { "" }
        ));
    });
    (seen, end)
}

/// An address in the n-th function.
fn at(function: u64, offset: u64) -> u64 {
    super::testing::TEXT + 0x100 * function + offset
}

const THREAD: [(&str, [u8; 6]); 3] = [
    ("inner", entry::CALL_16_BP),
    ("outer", entry::CALL_8),
    ("start", entry::END),
];

#[test]
fn a_walk_goes_from_call_to_call_up_to_the_first_code_of_a_thread() {
    // inner has pushed BP: [bp][return to outer]. outer has pushed nothing: [return to start].
    let case = case(
        &THREAD,
        &[(STACK + 0x100, vec![0x1234, at(1, 0x20), at(2, 0x30)])],
        (at(0, 0x10), STACK + 0x100),
    );
    assert_eq!(
        walked(&case),
        (vec!["0x10".into(), "0x120".into(), "0x230".into()], Ok(()))
    );
}

#[test]
fn a_return_address_at_a_functions_end_belongs_to_the_call_before_it() {
    // The last instruction of outer is a call that does not return. The address behind it is start's first.
    let case = case(
        &THREAD,
        &[(STACK + 0x100, vec![0, at(1, 0x100), at(2, 0x30)])],
        (at(0, 0x10), STACK + 0x100),
    );
    assert_eq!(walked(&case).0, ["0x10", "0x200", "0x230"]);
}

#[test]
fn interrupted_code_is_unwound_from_its_saved_registers_and_user_mode_ends_the_walk() {
    let functions = [
        ("handler", entry::CALL_8),
        ("asm_interrupt", entry::REGS),
        ("interrupted", entry::FRAME_POINTER),
    ];
    // pt_regs of `interrupted`, whose frame BP points at. Above them are those of user mode.
    let mut regs = [0u64; 21];
    (regs[4], regs[16], regs[17], regs[19]) = (STACK + 0x300, at(2, 0), 0x10, STACK + 0x200);
    let mut user = [0u64; 21];
    (user[16], user[17], user[19]) = (0x40_0000, 0x33, 0x7fff_0000_0000);
    let frames = [
        (STACK + 0xf8, vec![at(1, 0x10)]),
        (STACK + 0x100, regs.to_vec()),
        (STACK + 0x300, vec![0, at(1, 0x10)]),
        (STACK + 0x310, user.to_vec()),
    ];
    let case = case(&functions, &frames, (at(0, 0x10), STACK + 0xf8));
    assert_eq!(
        walked(&case),
        (
            vec!["0x10".into(), "0x110".into(), "0x200!".into(), "0x110".into()],
            Ok(())
        )
    );
}

#[test]
fn an_end_that_is_not_at_the_stacks_end_is_refused() {
    let functions = [
        ("asm_interrupt", entry::IRET),
        ("start", entry::END),
        ("inner", entry::CALL_8),
    ];
    // As behind `call error_entry`: in the place of the code segment is the interrupted code's R13, here with a value like user mode's.
    let mut regs = [0u64; 21];
    (regs[1], regs[16], regs[17]) = (0x33, at(2, 0), 0x10);
    let far = [(STACK + 0x100, regs.to_vec()), (STACK + 0x400, vec![at(1, 0x10)])];
    let interrupted = case(&functions, &far, (at(0, 0x10), STACK + 0x100));
    let (ip, end) = (Gva(at(0, 0x10)), STACK + 0x128);
    assert_eq!(walked(&interrupted).1, Err(UnwindError::NotTheEnd { ip, at: end }));
    regs[1] = 7;
    let odd = case(
        &functions,
        &[(STACK + 0x100, regs.to_vec())],
        (at(0, 0x10), STACK + 0x100),
    );
    assert_eq!(walked(&odd).1, Err(UnwindError::BadSegment { ip, found: 7 }));
    // As at a retpoline before 6.4, which a function in the middle of the stack has called.
    let retpoline = [(STACK + 0x100, vec![at(2, 0x10)]), (STACK + 0x400, vec![0])];
    let retpoline = case(&functions, &retpoline, (at(1, 1), STACK + 0x100));
    let (ip, end) = (Gva(at(1, 1)), STACK + 0x100);
    assert_eq!(walked(&retpoline).1, Err(UnwindError::NotTheEnd { ip, at: end }));
}

#[test]
fn a_walk_crosses_from_the_interrupt_stack_once_and_never_back() {
    let functions = [
        ("softirq", entry::SWITCH),
        ("irq_entry", entry::CALL_8),
        ("start", entry::END),
    ];
    // The top word of the interrupt stack is the task's stack pointer.
    let top = IRQ + STACK_BYTES - 8;
    let frames = [
        (top, vec![STACK + 0x100]),
        (STACK + 0x100, vec![at(1, 0x10), at(2, 0x10)]),
    ];
    let mut crossing = case(&functions, &frames, (at(0, 0x10), top));
    assert_eq!(
        walked(&crossing),
        (vec!["0x10".into(), "0x110".into(), "0x210".into()], Ok(()))
    );

    let back = [
        (top, vec![STACK + 0x100]),
        (STACK + 0x100, vec![at(0, 0x10), IRQ + 0x100]),
        (IRQ + 0x100, vec![0]),
    ];
    crossing = case(&functions, &back, (at(0, 0x10), top));
    assert_eq!(
        walked(&crossing).1,
        Err(UnwindError::OffStack {
            ip: Gva(at(0, 0x10)),
            at: IRQ + 0x100
        })
    );
}

#[test]
fn an_uncertain_frame_is_an_error_and_never_an_end() {
    let functions = [
        ("inner", entry::CALL_8),
        ("asm", entry::UNDEFINED),
        ("loops", entry::FRAME_POINTER),
    ];
    let end = |return_to: u64| {
        let case = case(
            &functions,
            &[(STACK + 0x100, vec![return_to])],
            (at(0, 0x10), STACK + 0x100),
        );
        walked(&case).1.unwrap_err()
    };
    assert_eq!(end(at(1, 0x10)), UnwindError::NoOrc { ip: Gva(at(1, 0x10)) });
    let ip = Gva(0xffff_ffff_c012_3456);
    assert_eq!(end(ip.0), UnwindError::NotText { ip, sp: STACK + 0x108 });
    assert_eq!(
        end(0),
        UnwindError::NotText {
            ip: Gva(0),
            sp: STACK + 0x108
        }
    );
    // BP is 0: its frame would be at 16.
    assert_eq!(
        end(at(2, 0x10)),
        UnwindError::OffStack {
            ip: Gva(at(2, 0x10)),
            at: 8
        }
    );
}

#[test]
fn a_frame_below_the_one_before_is_refused() {
    let functions = [("loops", entry::FRAME_POINTER)];
    let mut case = case(
        &functions,
        &[
            (STACK + 0x100, vec![STACK + 0x100, at(0, 0x10)]),
            (STACK + 0x200, vec![0]),
        ],
        (at(0, 0x10), STACK + 0x200),
    );
    case.start.bp = STACK + 0x100;
    let (from, to) = (STACK + 0x200, STACK + 0x110);
    assert_eq!(
        walked(&case).1,
        Err(UnwindError::WrongWay {
            ip: Gva(at(0, 0x10)),
            from,
            to
        })
    );
}

#[test]
fn a_register_is_used_only_where_its_value_is_known() {
    let functions = [("aligned", entry::BY_R10), ("start", entry::END)];
    let mut case = case(
        &functions,
        &[(STACK + 0x100, vec![at(1, 0x10)])],
        (at(0, 0x10), STACK + 0x80),
    );
    let missing = UnwindError::MissingRegister {
        ip: Gva(at(0, 0x10)),
        register: "R10",
    };
    assert_eq!(walked(&case).1, Err(missing));
    let mut general = [0; 16];
    general[10] = STACK + 0x108;
    case.start.general = Some(general);
    assert_eq!(walked(&case), (vec!["0x10".into(), "0x110".into()], Ok(())));
}

#[test]
fn a_tracers_trampoline_is_replaced_by_the_real_return_address() {
    let functions = [
        ("inner", entry::CALL_8),
        ("return_to_handler", entry::UNDEFINED),
        ("start", entry::END),
    ];
    let mut case = case(
        &functions,
        &[(STACK + 0x100, vec![at(1, 0)])],
        (at(0, 0x10), STACK + 0x100),
    );
    assert_eq!(walked(&case).1, Err(UnwindError::HiddenReturn { slot: STACK + 0x100 }));
    // A tail call was traced, too: the return address of its entry is the trampoline.
    case.hidden.push(HookedReturn {
        slot: STACK + 0x100,
        ret: at(1, 0),
    });
    case.hidden.push(HookedReturn {
        slot: STACK + 0x100,
        ret: at(2, 0x10),
    });
    assert_eq!(walked(&case), (vec!["0x10".into(), "0x210".into()], Ok(())));
    case.hidden.push(HookedReturn {
        slot: STACK + 0x100,
        ret: at(2, 0x20),
    });
    assert_eq!(walked(&case).1, Err(UnwindError::HiddenReturn { slot: STACK + 0x100 }));
}

#[test]
fn code_that_restores_a_return_address_is_not_walked_through() {
    let functions = [("ftrace_return_to_handler", entry::CALL_8), ("start", entry::END)];
    let case = case(
        &functions,
        &[(STACK + 0x100, vec![at(1, 0x10)])],
        (at(0, 0x10), STACK + 0x100),
    );
    assert_eq!(walked(&case).1, Err(UnwindError::Returning { ip: Gva(at(0, 0x10)) }));
}

#[test]
fn the_words_that_the_cpu_pushes_are_enough_to_continue() {
    // An interrupt in entry code: ip, cs, flags, sp, ss at SP. All registers of the code before are still known.
    let functions = [
        ("asm_exc", entry::IRET),
        ("entry_code", entry::BY_R10),
        ("start", entry::END),
    ];
    let frames = [
        (STACK + 0x80, vec![at(1, 0), 0x10, 0, STACK + 0x100, 0x18]),
        (STACK + 0x1f8, vec![at(2, 0x10)]),
    ];
    let mut case = case(&functions, &frames, (at(0, 0x10), STACK + 0x80));
    let mut general = [0; 16];
    general[10] = STACK + 0x200;
    case.start.general = Some(general);
    assert_eq!(
        walked(&case),
        (vec!["0x10".into(), "0x100!".into(), "0x210".into()], Ok(()))
    );
}

#[test]
fn frames_of_freed_boot_code_end_the_first_idle_tasks_stack() {
    let mut functions = vec![("idle", entry::CALL_8); 16];
    functions.push(("start_kernel", entry::END));
    let mut case = case(
        &functions,
        &[(STACK + 0x100, vec![at(16, 0x20)])],
        (at(0, 0x10), STACK + 0x100),
    );
    let ip = Gva(at(16, 0x20));
    assert_eq!(walked(&case).1, Err(UnwindError::NotText { ip, sp: STACK + 0x108 }));
    case.sample.set_symbol("_sinittext", at(16, 0));
    case.sample.set_symbol("_einittext", at(17, 0));
    assert_eq!(walked(&case), (vec!["0x10".into(), "0x20".into()], Ok(())));
}

#[test]
fn a_frame_in_a_module_without_orc_names_the_module() {
    const MODULE: u64 = 0xffff_ffff_c010_0000;
    const TEXT: u64 = 0xffff_ffff_c000_0000;
    let mut types = Builder::new();
    basic_types(&mut types);
    let (bits, byte) = (types.int("unsigned int", 4), types.int("char", 1));
    let (name, list) = (
        types.array(byte, 8),
        types.composite("list_head", STRUCT, 16, &[("next", 1, 0)]),
    );
    let layout = [("base", 1, 0), ("size", bits, 64), ("text_size", bits, 96)];
    let layout = types.composite("module_layout", STRUCT, 16, &layout);
    let arch = [("num_orcs", bits, 0), ("orc_unwind_ip", 1, 64), ("orc_unwind", 1, 128)];
    let arch = types.composite("mod_arch_specific", STRUCT, 24, &arch);
    types.composite(
        "module",
        STRUCT,
        80,
        &[
            ("list", list, 0),
            ("name", name, 128),
            ("core_layout", layout, 192),
            ("init_layout", layout, 320),
            ("arch", arch, 448),
        ],
    );
    let mut sample = Sample::with_types(&[], &types);
    sample.set_symbol("modules", MODULE - 0x100);
    sample.put_words(MODULE - 0x100, &[MODULE]);
    let name = u64::from_le_bytes(*b"no_orc\0\0");
    sample.put_words(
        MODULE,
        &[MODULE - 0x100, 0, name, TEXT, 0x1000 | 0x1000 << 32, 0, 0, 0, 0, 0],
    );
    sample.put_words(STACK, &[0; 8]);
    let frame = Frame {
        ip: Gva(TEXT + 0x10),
        sp: STACK,
        interrupted: false,
    };
    let code = CodeMap::read(&sample, &[]).unwrap();
    let error = code.rule(&sample, frame, 0).unwrap_err();
    assert_eq!(
        error.to_string(),
        "frame GVA 0xffffffffc0000010 is in the module no_orc, which has no ORC table"
    );
}
