use super::builder::{Builder, KIND_FLAG, STRUCT, TYPEDEF, UNION, VOLATILE};
use super::*;

/// A task with what makes real ones hard: anonymous nesting, a nested struct, an array of structs, typedefs.
fn sample() -> Builder {
    let mut b = Builder::new();
    let long = b.int("long unsigned int", 8);
    let int = b.int("int", 4);
    let pid_t = b.alias("pid_t", TYPEDEF, int);
    let state = b.alias("", VOLATILE, long);
    let thread = b.composite(
        "thread_struct",
        STRUCT,
        24,
        &[("tls", long, 0), ("sp", long, 64), ("es", long, 128)],
    );
    let memory = b.composite("module_memory", STRUCT, 16, &[("base", long, 0), ("size", int, 64)]);
    let memories = b.array(memory, 3);
    let inner = b.composite("", UNION, 8, &[("pid", pid_t, 0), ("both", long, 0)]);
    let outer = b.composite("", STRUCT, 16, &[("first", long, 0), ("", inner, 64)]);
    let pointer = b.pointer(thread);
    b.composite(
        "task_struct",
        STRUCT,
        112,
        &[
            ("__state", state, 0),
            ("", outer, 64),
            ("mem", memories, 192),
            ("thread", thread, 576),
            ("stack", pointer, 768),
        ],
    );
    b.alias("task_t", TYPEDEF, 11);
    b
}

fn at(btf: &Btf, path: &str) -> (u64, u64) {
    let member = btf.structure("task_struct").unwrap().member(path).unwrap();
    (member.offset(), member.size)
}

#[test]
fn members_are_found_through_nesting_arrays_and_anonymous_types() {
    let btf = Btf::parse(sample().bytes()).unwrap();
    assert_eq!(btf.type_count(), 12);
    assert_eq!(btf.structure("task_struct").unwrap().size(), 112);
    assert_eq!(at(&btf, "__state"), (0, 8));
    assert_eq!(at(&btf, "first"), (8, 8));
    assert_eq!(at(&btf, "pid"), (16, 4));
    assert_eq!(at(&btf, "thread.sp"), (80, 8));
    assert_eq!(at(&btf, "mem[2].size"), (64, 4));
    assert_eq!(at(&btf, "mem"), (24, 48));
    assert_eq!(at(&btf, "stack"), (96, 8));
    let memories = btf.structure("task_struct").unwrap().member("mem").unwrap();
    assert_eq!(memories.elements, Some(3));
}

#[test]
fn a_struct_is_found_by_its_typedef_and_by_its_number() {
    let btf = Btf::parse(sample().bytes()).unwrap();
    assert_eq!(btf.structure("task_t").unwrap().size(), 112);
    let thread = btf.structure("task_struct").unwrap().member("thread").unwrap();
    let thread = btf.structure_of(thread.type_id).unwrap();
    assert_eq!((thread.name(), thread.size()), ("thread_struct", 24));
}

#[test]
fn errors_name_the_struct_the_member_and_the_part() {
    let btf = Btf::parse(sample().bytes()).unwrap();
    let task = btf.structure("task_struct").unwrap();
    let said = |path: &str| task.member(path).unwrap_err().to_string();
    assert_eq!(
        said("thread.ip"),
        "BTF: struct `task_struct` has no member `thread.ip`: no `ip` in it"
    );
    assert_eq!(
        said("stack.sp"),
        "BTF: `stack.sp` in struct `task_struct`: not a struct or union at `sp`"
    );
    assert_eq!(
        said("mem[3].base"),
        "BTF: `mem[3].base` in struct `task_struct`: an index past the end at `mem[3]`"
    );
    assert_eq!(
        said("first[0]"),
        "BTF: `first[0]` in struct `task_struct`: not an array at `first[0]`"
    );
    assert_eq!(
        btf.structure("pid_t").unwrap_err().to_string(),
        "BTF has no struct or union `pid_t`"
    );
    assert!(task.try_member("nothing").is_none());
}

#[test]
fn bit_fields_are_placed_and_read_in_both_encodings() {
    let mut b = Builder::new();
    let short = b.int("short", 2);
    let byte = b.int("unsigned char", 1);
    let members = [
        ("sp_offset", short, 0),
        ("sp_reg", byte, (4 << 24) | 16),
        ("type", byte, (3 << 24) | 24),
    ];
    b.composite("flagged", STRUCT | KIND_FLAG, 4, &members);
    // the old encoding: an int type of three bits that start at bit 4
    let narrow = b.raw("unsigned char", 1, 0, 1, &[(4 << 16) | 3]);
    b.composite("old", STRUCT, 4, &[("sp_offset", short, 0), ("type", narrow, 24)]);
    let btf = Btf::parse(b.bytes()).unwrap();

    let bytes = [0x34, 0x12, 0xa7, 0x5d];
    let value = |structure: &str, member: &str| {
        btf.structure(structure)
            .unwrap()
            .member(member)
            .unwrap()
            .value_in(&bytes)
            .unwrap()
    };
    assert_eq!(value("flagged", "sp_offset"), 0x1234);
    assert_eq!(value("flagged", "sp_reg"), 0x7);
    assert_eq!(value("flagged", "type"), 0x5);
    assert_eq!(value("old", "type"), 0x5);
    let member = btf.structure("old").unwrap().member("type").unwrap();
    assert_eq!((member.bit_offset, member.bit_field), (28, Some(3)));
    assert!(btf.structure("old").unwrap().offset("type").is_err());
    assert_eq!(member.value_in(&bytes[..3]), None);
}

#[test]
fn enumerators_keep_their_sign() {
    let mut b = Builder::new();
    b.enumeration("mod_mem_type", false, &[("MOD_INVALID", 0xffff_ffff), ("MOD_TEXT", 0)]);
    b.enumeration("signed", true, &[("MINUS_ONE", 0xffff_ffff)]);
    b.raw("wide", 19, 0, 8, &[]);
    let btf = Btf::parse(b.bytes()).unwrap();
    assert_eq!(btf.enumerator("MOD_TEXT"), Ok(0));
    assert_eq!(btf.enumerator("MOD_INVALID"), Ok(0xffff_ffff));
    assert_eq!(btf.enumerator("MINUS_ONE"), Ok(-1));
    assert_eq!(
        btf.enumerator("MOD"),
        Err(BtfError::NoEnumerator { name: "MOD".into() })
    );
}

#[test]
fn copies_of_a_struct_must_agree_on_what_is_asked() {
    let mut b = Builder::new();
    let int = b.int("int", 4);
    b.composite("twin", STRUCT, 8, &[("a", int, 0), ("b", int, 32)]);
    b.composite("twin", STRUCT, 8, &[("a", int, 0), ("b", int, 0)]);
    b.composite("unlike", STRUCT, 8, &[("a", int, 0)]);
    b.composite("unlike", STRUCT, 4, &[("a", int, 0)]);
    let btf = Btf::parse(b.bytes()).unwrap();
    let twin = btf.structure("twin").unwrap();
    assert_eq!(twin.offset("a"), Ok(0));
    assert!(matches!(twin.offset("b"), Err(BtfError::Ambiguous { count: 2, .. })));
    assert!(matches!(btf.structure("unlike"), Err(BtfError::Ambiguous { .. })));
}

#[test]
fn chains_that_do_not_end_are_errors() {
    let mut b = Builder::new();
    b.alias("a", TYPEDEF, 2);
    b.alias("b", TYPEDEF, 1);
    // a struct whose anonymous member is itself
    b.composite("self", STRUCT, 8, &[("", 3, 0), ("", 3, 0)]);
    let array = b.array(4, 0xffff_ffff);
    b.composite("holder", STRUCT, 8, &[("x", 1, 0), ("y", array, 0), ("z", 99, 0)]);
    let btf = Btf::parse(b.bytes()).unwrap();
    assert_eq!(btf.size_of(TypeId(1)), Err(BtfError::NoSize { id: 1 }));
    assert!(btf.structure("a").is_err());
    assert!(matches!(
        btf.structure("self").unwrap().member("x"),
        Err(BtfError::BadPath { .. })
    ));
    let holder = btf.structure("holder").unwrap();
    assert!(holder.member("x").is_err() && holder.member("y[7]").is_err() && holder.member("z").is_err());
}

#[test]
fn a_cut_off_or_foreign_blob_is_refused_at_every_length() {
    let whole = sample().bytes();
    for len in 0..whole.len() {
        assert!(Btf::parse(whole[..len].to_vec()).is_err(), "accepted at {len} bytes");
    }
    for (at, value) in [(0, 0), (2, 9), (4, 4), (12, 0xff), (20, 0xff)] {
        let mut blob = whole.clone();
        blob[at] = value;
        assert!(Btf::parse(blob).is_err(), "byte {at} set to {value:#x}");
    }
    let mut b = Builder::new();
    b.raw("new", 20, 0, 0, &[]);
    let error = Btf::parse(b.bytes()).unwrap_err();
    assert_eq!(error, BtfError::UnknownKind { id: 1, kind: 20 });
}

#[test]
fn every_single_byte_change_is_survived() {
    let whole = sample().bytes();
    for at in 0..whole.len() {
        for value in [0, 1, 0x7f, 0xff] {
            let mut blob = whole.clone();
            blob[at] = value;
            let Ok(btf) = Btf::parse(blob) else { continue };
            for path in ["pid", "thread.sp", "mem[2].size"] {
                let _ = btf.structure("task_struct").map(|task| task.member(path));
            }
            let _ = btf.enumerator("nothing");
        }
    }
}

#[test]
fn a_blob_made_by_pahole_gives_the_offsets_that_pahole_prints() {
    let btf = Btf::parse(include_bytes!("golden/sample.btf").to_vec()).unwrap();
    let place = |structure: &str, path: &str| {
        let member = btf.structure(structure).unwrap().member(path).unwrap();
        (member.bit_offset, member.bit_field, member.size)
    };
    assert_eq!(btf.structure("task").unwrap().size(), 192);
    assert_eq!(place("task", "hi"), (12 * 8, None, 4));
    assert_eq!(place("task", "both"), (8 * 8, None, 8));
    assert_eq!(place("task", "mem[2].size"), ((16 + 2 * 24 + 8) * 8, None, 4));
    assert_eq!(place("task", "thread.sp"), ((128 + 24) * 8, None, 8));
    assert_eq!(place("task", "c"), (160 * 8, Some(3), 4));
    assert_eq!(place("task", "grid"), (161 * 8, None, 10));
    assert_eq!(place("task", "fn"), (176 * 8, None, 8));
    assert_eq!(place("task", "tail"), (184 * 8, None, 0));
    assert_eq!(btf.structure("orc_entry").unwrap().size(), 6);
    assert_eq!(place("orc_entry", "bp_reg"), (4 * 8 + 4, Some(4), 4));
    assert_eq!(place("orc_entry", "signal"), (4 * 8 + 11, Some(1), 4));
    assert_eq!(btf.enumerator("GREEN"), Ok(7));
}

#[test]
fn a_struct_with_a_thousand_copies_is_refused() {
    let mut b = Builder::new();
    let long = b.int("long", 8);
    for _ in 0..1000 {
        b.composite("task_struct", STRUCT, 8, &[("sp", long, 0)]);
    }
    let btf = Btf::parse(b.bytes()).unwrap();
    assert!(matches!(
        btf.structure("task_struct"),
        Err(BtfError::Ambiguous { count: 1000, .. })
    ));
}
