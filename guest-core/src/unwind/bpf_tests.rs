use super::bpf::{BpfCode, calls_into, prologue};
use super::orc::{Base, Kind};
use super::testing::{Sample, basic_types};
use super::{Frame, OldCode, OldFunction, UnwindError};
use crate::addr::Gva;
use crate::btf::builder::{Builder, STRUCT};

const TREE: u64 = 0xffff_ffff_8220_0000;
const KSYMS: u64 = 0xffff_8880_0000_0000;
const CODE: u64 = 0xffff_ffff_c000_0000;
/// The builder's number of the basic types' `long unsigned int`.
const LONG: u32 = 1;
/// Offsets in the sample's `struct bpf_ksym`.
mod ksym {
    pub const NAME: u64 = 16;
    pub const NODE: u64 = 48;
    pub const FRAME: u64 = 96;
    pub const BYTES: u64 = 104;
}
const NODE_BYTES: u64 = 24;
/// Address of the `struct bpf_ksym` number `index`.
const fn at(index: u64) -> u64 {
    KSYMS + 0x1000 * index
}

/// The code that 6.1 generates for fentry and fexit, up to the first call: `push rbp`, `mov rbp, rsp`, `sub rsp, 0x30`, `push rbx`.
const TRAMPOLINE: [u8; 9] = [0x55, 0x48, 0x89, 0xe5, 0x48, 0x83, 0xec, 0x30, 0x53];

/// A kernel with images of 0x100 bytes, three for each tree, whose middle one is the root. `says_frames`: as since 7.2.
fn sample(sequence: u32, says_frames: bool) -> Sample {
    let mut types = Builder::new();
    basic_types(&mut types);
    let bits = types.int("unsigned int", 4);
    let byte = types.int("char", 1);
    let name = types.array(byte, 32);
    let node = types.composite(
        "rb_node",
        STRUCT,
        24,
        &[
            ("__rb_parent_color", LONG, 0),
            ("rb_right", LONG, 64),
            ("rb_left", LONG, 128),
        ],
    );
    let nodes = types.array(node, 2);
    let latch = types.composite("latch_tree_node", STRUCT, 48, &[("node", nodes, 0)]);
    let count = types.composite("seqcount", STRUCT, 4, &[("sequence", bits, 0)]);
    let seq = types.composite("seqcount_latch_t", STRUCT, 4, &[("seqcount", count, 0)]);
    let root = types.composite("rb_root", STRUCT, 8, &[("rb_node", LONG, 0)]);
    let roots = types.array(root, 2);
    types.composite("latch_tree_root", STRUCT, 24, &[("seq", seq, 0), ("tree", roots, 64)]);
    let mut members = vec![
        ("start", LONG, 0),
        ("end", LONG, 64),
        ("name", name, 8 * ksym::NAME as u32),
        ("tnode", latch, 8 * ksym::NODE as u32),
    ];
    if says_frames {
        let frame = 8 * ksym::FRAME as u32;
        members.extend([("fp_start", bits, frame), ("fp_end", bits, frame + 32)]);
    }
    types.composite("bpf_ksym", STRUCT, ksym::BYTES as u32, &members);
    let mut sample = Sample::with_types(&[], &types);
    sample.set_symbol("bpf_tree", TREE);
    let tree = u64::from(sequence % 2);
    // The other tree is being changed: its root leads nowhere.
    let mut roots = [8, 8];
    roots[tree as usize] = at(1) + ksym::NODE + tree * NODE_BYTES;
    sample.put_words(TREE, &[u64::from(sequence), roots[0], roots[1]]);
    for index in 0..3 {
        let start = CODE + 0x200 * index;
        sample.put(at(index), &[0; ksym::BYTES as usize]);
        sample.put_words(at(index), &[start, start + 0x100]);
        sample.put(at(index) + ksym::NAME, format!("bpf_trampoline_{index}").as_bytes());
        sample.put(start, &[0xcc; 0x100]);
        sample.put(start, &TRAMPOLINE);
    }
    let node = |index| at(index) + ksym::NODE + tree * NODE_BYTES;
    sample.put_words(node(1), &[0, node(2), node(0)]);
    sample
}

/// The rule for a frame at `offset` in the image `index`, whose BP is `used` bytes above its SP.
fn rule_at(sample: &Sample, index: u64, offset: u64, used: u64) -> Option<Result<(Base, i64, Kind), UnwindError>> {
    let frame = Frame {
        ip: Gva(CODE + 0x200 * index + offset),
        sp: 0x1000,
        interrupted: false,
    };
    let code = BpfCode::find(sample).unwrap();
    let rule = code.rule(sample, frame, 0x1000_u64.wrapping_add(used))?;
    Some(rule.map(|rule| (rule.sp, rule.sp_offset, rule.kind)))
}

fn why(rule: Option<Result<(Base, i64, Kind), UnwindError>>) -> &'static str {
    match rule {
        Some(Err(UnwindError::Bpf { why, .. })) => why,
        other => panic!("{other:?}"),
    }
}

const BY_BP: Option<Result<(Base, i64, Kind), UnwindError>> = Some(Ok((Base::Bp, 16, Kind::Call)));

#[test]
fn a_frame_in_a_trampoline_is_unwound_by_its_frame_pointer_with_either_tree() {
    for sequence in [0, 1, 6, 7] {
        let sample = sample(sequence, false);
        for index in 0..3 {
            assert_eq!(rule_at(&sample, index, 0x50, 0x38), BY_BP, "{sequence} {index}");
        }
        assert_eq!(rule_at(&sample, 0, 0x150, 0x38), None);
        assert_eq!(rule_at(&sample, 3, 0x50, 0x38), None);
        // A call at the end: its return address is one past the image.
        assert_eq!(rule_at(&sample, 0, 0x100, 0x38), BY_BP);
    }
}

#[test]
fn a_frame_pointer_that_the_code_cannot_have_set_is_refused() {
    let sample = sample(0, false);
    let expected = "and its frame pointer is not where such code has it";
    for used in [0, 0x28, 0x30 + 0x101, 0x10000, 0_u64.wrapping_sub(8)] {
        assert_eq!(why(rule_at(&sample, 1, 0x50, used)), expected, "{used:#x}");
    }
}

#[test]
fn code_that_begins_otherwise_or_was_interrupted_is_refused_by_name() {
    let sample = sample(0, false);
    sample.put(CODE + 0x200, &[0x90]);
    assert_eq!(
        why(rule_at(&sample, 1, 0x50, 0x38)),
        "which does not begin as such code does"
    );
    // Before BP is set up.
    assert_eq!(
        why(rule_at(&sample, 2, 3, 0x38)),
        "which does not begin as such code does"
    );
    let interrupted = Frame {
        ip: Gva(CODE + 0x50),
        sp: 0x1000,
        interrupted: true,
    };
    let error = BpfCode::find(&sample).unwrap().rule(&sample, interrupted, 0x1038);
    assert_eq!(
        error.unwrap().unwrap_err().to_string(),
        "frame GVA 0xffffffffc0000050 is in BPF's bpf_trampoline_0, which was interrupted there"
    );
}

#[test]
fn a_kernel_that_records_the_range_of_the_frame_pointer_must_include_the_frame() {
    let sample = sample(0, true);
    let unsaid = "which the kernel says has no frame pointer there";
    assert_eq!(why(rule_at(&sample, 1, 0x50, 0x38)), unsaid);
    let says = |start: u32, end: u32| {
        let both = u64::from(start) | u64::from(end) << 32;
        sample.put_words(at(1) + ksym::FRAME, &[both]);
        rule_at(&sample, 1, 0x50, 0x38)
    };
    assert_eq!(says(4, 0x90), BY_BP);
    assert_eq!(why(says(4, 0x4f)), unsaid);
    assert_eq!(why(says(3, 0x90)), unsaid);
    assert_eq!(why(says(0x51, 0x90)), unsaid);
}

#[test]
fn a_tree_that_never_ends_or_always_changes_finds_nothing() {
    let sample = sample(0, false);
    let node = at(1) + ksym::NODE;
    sample.put_words(node, &[0, node, node]);
    assert_eq!(rule_at(&sample, 0, 0x50, 0x38), None);
    sample.put_words(node, &[0, 0x1234, 0x1234]);
    assert_eq!(rule_at(&sample, 0, 0x50, 0x38), None);
    assert_eq!(rule_at(&sample, 1, 0x50, 0x38), BY_BP);
}

#[test]
fn the_reserved_space_is_read_from_the_code() {
    // Code of 6.12 with endbr64 and a count of calls; a program of 7.2, with a call in place of its nop.
    let counting = [
        &[0xf3, 0x0f, 0x1e, 0xfa, 0x65, 0x48, 0xc1, 0x3c, 0x25, 1, 2, 3, 4, 5][..],
        &[0x55, 0x48, 0x89, 0xe5, 0x48, 0x81, 0xec, 0x88, 1, 0, 0][..],
    ]
    .concat();
    assert_eq!(prologue(&counting), Some((18, 0x188)));
    let program = [
        &[0xf3, 0x0f, 0x1e, 0xfa, 0xe8, 0, 0, 0, 0, 0x0f, 0x1f, 0x00][..],
        &[0x55, 0x48, 0x89, 0xe5, 0xf3, 0x0f, 0x1e, 0xfa, 0x53][..],
    ]
    .concat();
    assert_eq!(prologue(&program), Some((16, 0)));
    assert_eq!(prologue(&[0xf3, 0x0f, 0x1e, 0xfa]), None);
    assert_eq!(prologue(&[0x48, 0x89, 0xf4, 0x48, 0x89, 0xd5]), None);
    assert_eq!(prologue(&TRAMPOLINE[..7]), None);
}

#[test]
fn a_trampoline_that_calls_behind_an_old_functions_site_is_about_to_run_the_function() {
    let old = OldCode::new(vec![OldFunction {
        name: "f".to_owned(),
        code: Gva(CODE + 0x1000)..Gva(CODE + 0x1100),
    }]);
    let calling = |target: u64| {
        let distance = (target as i64 - 7) as i32;
        let code = [&[0x90, 0x90, 0xe8][..], &distance.to_le_bytes()].concat();
        calls_into(Gva(CODE), &code, &old).map(|function| function.name.as_str())
    };
    assert_eq!(calling(0x1005), Some("f"));
    // A call to its beginning reaches the new function. Other functions are not old.
    assert_eq!(calling(0x1000), None);
    assert_eq!(calling(0x1100), None);
    assert_eq!(calls_into(Gva(CODE), &[0xe8, 0, 0], &old), None);
}
