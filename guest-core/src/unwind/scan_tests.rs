use super::hooked_returns::HookedReturn;
use super::scan::{Finding, scan};
use super::testing::{IMAGE_END, Sample, TEXT, entry, task};
use super::*;
use crate::addr::Gva;
use crate::btf::builder::{Builder, STRUCT};

const TASK: u64 = 0xffff_8880_0000_0000;
const SHADOW: u64 = 0xffff_8880_0001_0000;
const TOO_MANY: &str = "more than 512 return addresses that a tracer has taken off the stack";

fn old(functions: &[(&str, u64)]) -> OldCode {
    let function = |&(name, start): &(&str, u64)| OldFunction {
        name: name.to_owned(),
        code: Gva(TEXT + start)..Gva(TEXT + start + 0x100),
    };
    OldCode::new(functions.iter().map(function).collect())
}

#[test]
fn an_instruction_is_inside_from_the_first_byte_and_a_return_from_the_second_to_the_end() {
    let old = old(&[("b", 0x300), ("a", 0x100), ("c", 0x400)]);
    let name = |function: Option<&OldFunction>| function.map(|function| function.name.clone()).unwrap_or_default();
    let at = |offset: u64| Gva(TEXT + offset);
    assert_eq!(name(old.at_instruction(at(0x100))), "a");
    assert_eq!(name(old.at_return(at(0x100))), "");
    assert_eq!(name(old.at_instruction(at(0x1ff))), "a");
    assert_eq!(name(old.at_instruction(at(0x200))), "");
    assert_eq!(name(old.at_return(at(0x200))), "a");
    // Two functions meet.
    assert_eq!(name(old.at_instruction(at(0x400))), "c");
    assert_eq!(name(old.at_return(at(0x400))), "b");
    assert_eq!(name(old.at_instruction(at(0x500))), "");
    assert_eq!(name(old.at_return(at(0x501))), "");
    assert!(OldCode::default().at_return(at(0x100)).is_none());
}

#[test]
fn a_scan_finds_old_functions_tracers_and_unknown_code_and_nothing_else() {
    let sample = Sample::new(&[
        ("old", entry::CALL_8),
        ("return_to_handler", entry::UNDEFINED),
        ("f", entry::CALL_8),
    ]);
    let code = CodeMap::read(&sample, &[]).unwrap();
    let returns = HookedReturns::read(&sample).unwrap();
    let look = |words: &[u64]| {
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        scan(&bytes, &old(&[("old", 0)]), &code, &returns)
    };
    let clear = Finding::default();
    // User addresses, the direct map, other text, kernel data, error numbers.
    let harmless = [
        0,
        0x7fff_ffff_f000,
        TASK,
        TEXT + 0x210,
        IMAGE_END - 8,
        0xffff_ffff_ffff_fff4,
        u64::MAX,
    ];
    assert_eq!(look(&harmless), clear);
    for word in [TEXT, TEXT + 1, TEXT + 0x100] {
        assert_eq!(
            look(&[0, word]),
            Finding {
                old: Some(word),
                ..clear
            }
        );
    }
    assert_eq!(look(&[TEXT + 0x110]), Finding { hidden: true, ..clear });
    for word in [IMAGE_END + 8, 0xffff_ffff_c000_0010] {
        assert_eq!(
            look(&[word]),
            Finding {
                unknown: Some(word),
                ..clear
            }
        );
    }
}

#[test]
fn a_patch_is_code_with_a_table_of_its_own() {
    let sample = Sample::new(&[("old", entry::CALL_8)]);
    let new = 0xffff_ffff_a000_0000;
    sample.put(new + 0x1000, &(-0x1000i32).to_le_bytes());
    sample.put(new + 0x2000, &entry::CALL_16_BP);
    let orc = OrcTable::new(Gva(new + 0x1000), Gva(new + 0x2000), 1).unwrap();
    let patch = PatchCode {
        text: Gva(new)..Gva(new + 0x100),
        orc,
    };
    let code = CodeMap::read(&sample, &[patch]).unwrap();
    assert!(code.is_text(Gva(new)) && !code.is_text(Gva(new + 0x100)));
    let frame = Frame {
        ip: Gva(new + 0x10),
        sp: 0,
        interrupted: true,
    };
    assert_eq!(code.rule(&sample, frame, 0).unwrap().sp_offset, 16);
    assert!(!code.may_be_unknown_code(new + 0x100));
    assert!(code.may_be_unknown_code(new + 0x101));
}

#[test]
fn returns_that_graph_tracing_has_hooked_are_found_in_its_packed_stack() {
    let sample = Sample::new(&[("return_to_handler", entry::UNDEFINED)]);
    sample.put(TASK, &[0; task::BYTES as usize]);
    sample.put_words(TASK + task::RET_STACK, &[SHADOW]);
    // ret, func, retp, and a word with the distance back to the struct.
    sample.put_words(
        SHADOW,
        &[
            TEXT + 0x210,
            TEXT + 0x300,
            0x1000,
            3,
            TEXT + 0x220,
            TEXT + 0x310,
            0x2000,
            3,
            0,
            0,
        ],
    );
    let returns = HookedReturns::read(&sample).unwrap();
    let hidden = |depth: u32| {
        sample.put(TASK + task::RET_INDEX, &depth.to_le_bytes());
        returns.of_task(&sample, Gva(TASK))
    };
    assert_eq!(hidden(0).unwrap(), []);
    let both = hidden(8).unwrap();
    assert!(both.contains(&HookedReturn {
        slot: 0x1000,
        ret: TEXT + 0x210
    }));
    assert!(both.contains(&HookedReturn {
        slot: 0x2000,
        ret: TEXT + 0x220
    }));
    assert!(!hidden(4).unwrap().iter().any(|hidden| hidden.slot == 0x2000));
    assert_eq!(hidden(0x7fff_ffff).unwrap_err().to_string(), TOO_MANY);
}

#[test]
fn returns_that_graph_tracing_has_hooked_are_found_in_its_array() {
    let mut types = Builder::new();
    let long = types.int("long unsigned int", 8);
    let entry_type = types.composite("ftrace_ret_stack", STRUCT, 24, &[("ret", long, 0), ("retp", long, 128)]);
    let pointer = types.pointer(entry_type);
    let int = types.int("int", 4);
    let members = [
        ("curr_ret_stack", int, task::RET_INDEX as u32 * 8),
        ("ret_stack", pointer, task::RET_STACK as u32 * 8),
    ];
    types.composite("task_struct", STRUCT, 136, &members);
    super::testing::orc_types(&mut types);
    let sample = Sample::with_types(&[("return_to_handler", entry::UNDEFINED)], &types);
    sample.put(TASK, &[0; task::BYTES as usize]);
    sample.put_words(TASK + task::RET_STACK, &[SHADOW]);
    sample.put_words(SHADOW, &[TEXT + 0x210, 0, 0x1000, TEXT + 0x220, 0, 0x2000, 0]);
    let returns = HookedReturns::read(&sample).unwrap();
    let hidden = |index: i32| {
        sample.put(TASK + task::RET_INDEX, &index.to_le_bytes());
        returns.of_task(&sample, Gva(TASK)).unwrap()
    };
    // With an index of -1, nothing is traced.
    assert_eq!(hidden(-1), []);
    assert_eq!(
        hidden(0),
        [HookedReturn {
            slot: 0x1000,
            ret: TEXT + 0x210
        }]
    );
    assert_eq!(hidden(1).len(), 2);
}

#[test]
fn returns_that_kretprobes_have_hooked_are_found_and_an_endless_list_is_an_error() {
    let sample = Sample::new(&[("arch_rethook_trampoline", entry::UNDEFINED)]);
    sample.put(TASK, &[0; task::BYTES as usize]);
    sample.put_words(TASK + task::RETHOOKS, &[SHADOW]);
    sample.put_words(
        SHADOW,
        &[SHADOW + 0x20, TEXT + 0x210, 0x1000, 0, 0, TEXT + 0x220, 0x2000],
    );
    let returns = HookedReturns::read(&sample).unwrap();
    let found = [
        HookedReturn {
            slot: 0x1000,
            ret: TEXT + 0x210,
        },
        HookedReturn {
            slot: 0x2000,
            ret: TEXT + 0x220,
        },
    ];
    assert_eq!(returns.of_task(&sample, Gva(TASK)).unwrap(), found);
    sample.put_words(SHADOW + 0x20, &[SHADOW]);
    let error = returns.of_task(&sample, Gva(TASK)).unwrap_err();
    assert_eq!(error.to_string(), TOO_MANY);
}
