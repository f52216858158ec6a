use super::UnwindError;
use super::orc::*;
use crate::addr::Gva;
use crate::btf::Btf;
use crate::btf::builder::{Builder, KIND_FLAG, STRUCT};

/// `struct orc_entry` with these bit fields behind the two registers.
fn types(fields: &[(&str, u32)]) -> Btf {
    let mut b = Builder::new();
    let (short, bits) = (b.int("short int", 2), b.int("unsigned int", 4));
    let mut members = vec![("sp_offset", short, 0), ("bp_offset", short, 16)];
    let mut at = 32;
    for &(name, width) in [("sp_reg", 4), ("bp_reg", 4)].iter().chain(fields) {
        members.push((name, bits, width << 24 | at));
        at += width;
    }
    b.composite("orc_entry", STRUCT | KIND_FLAG, 6, &members);
    Btf::parse(b.bytes()).unwrap()
}

fn rule(format: &OrcFormat, bytes: [u8; 6]) -> (Base, i64, Base, i64, Kind, bool) {
    let rule = format.decode(Gva(0), &bytes).unwrap();
    (rule.sp, rule.sp_offset, rule.bp, rule.bp_offset, rule.kind, rule.signal)
}

// The entries are from Debian's kernels.

#[test]
fn entries_of_6_1_are_read() {
    let btf = types(&[("type", 2), ("end", 1)]);
    let format = OrcFormat::detect(&btf, &[vec![8, 0, 0, 0, 5, 0]], false).unwrap();
    let read = |bytes| rule(&format, bytes);
    assert_eq!(
        read([0x10, 0, 0xf0, 0xff, 0x15, 0]),
        (Base::Sp, 16, Base::PrevSp, -16, Kind::Call, false)
    );
    assert_eq!(
        read([0, 0, 0, 0, 0x05, 1]),
        (Base::Sp, 0, Base::Undefined, 0, Kind::Regs, true)
    );
    assert_eq!(
        read([0, 0, 0, 0, 0x05, 2]),
        (Base::Sp, 0, Base::Undefined, 0, Kind::RegsPartial, true)
    );
    assert_eq!(
        read([0, 0, 0, 0, 0, 4]),
        (Base::Undefined, 0, Base::Undefined, 0, Kind::End, false)
    );
    assert_eq!(read([0, 0, 0, 0, 0, 0]).4, Kind::Undefined);
    assert_eq!(format.stack_padding_max(), 0);
    assert_eq!(read([0x08, 0, 0, 0, 0x09, 0]).0, Base::SpIndirect);
    assert_eq!(
        read([0, 0, 0, 0, 0x48, 0]),
        (Base::BpIndirect, 0, Base::Bp, 0, Kind::Call, false)
    );
}

#[test]
fn entries_of_6_12_are_read() {
    let btf = types(&[("type", 3), ("signal", 1)]);
    let format = OrcFormat::detect(&btf, &[vec![8, 0, 0, 0, 5, 2]], false).unwrap();
    assert_eq!(format.stack_padding_max(), 16);
    let read = |bytes| rule(&format, bytes);
    assert_eq!(
        read([0x10, 0, 0xf0, 0xff, 0x15, 2]),
        (Base::Sp, 16, Base::PrevSp, -16, Kind::Call, false)
    );
    assert_eq!(
        read([0, 0, 0, 0, 0x05, 0x0b]),
        (Base::Sp, 0, Base::Undefined, 0, Kind::Regs, true)
    );
    assert_eq!(
        read([0, 0, 0, 0, 0x05, 0x0c]),
        (Base::Sp, 0, Base::Undefined, 0, Kind::RegsPartial, true)
    );
    assert_eq!(
        (read([0, 0, 0, 0, 0, 1]).4, read([0; 6]).4),
        (Kind::End, Kind::Undefined)
    );
}

#[test]
fn entries_of_7_2_are_read_by_their_own_numbering() {
    let btf = types(&[("type", 3), ("signal", 1)]);
    let format = OrcFormat::detect(&btf, &[vec![8, 0, 0, 0, 3, 2]], false).unwrap();
    let read = |bytes| rule(&format, bytes);
    assert_eq!(
        read([0x10, 0, 0xf0, 0xff, 0x83, 2]),
        (Base::Sp, 16, Base::PrevSp, -16, Kind::Call, false)
    );
    assert_eq!(read([0x10, 0, 0xf0, 0xff, 0x84, 2]).0, Base::Bp);
    assert_eq!(read([0, 0, 0, 0, 0x4a, 2]).0, Base::BpIndirect);
    assert_eq!(read([0x08, 0, 0, 0, 0x89, 2]).0, Base::SpIndirect);
}

#[test]
fn a_numbering_that_does_not_fit_every_probe_is_refused() {
    let btf = types(&[("type", 3), ("signal", 1)]);
    let detect = |probes: &[Vec<u8>]| OrcFormat::detect(&btf, probes, false);
    assert!(detect(&[vec![8, 0, 0, 0, 5, 2], vec![8, 0, 0, 0, 3, 2]]).is_err());
    assert!(detect(&[vec![16, 0, 0, 0, 5, 2]]).is_err());
    assert!(detect(&[vec![8, 0, 0, 0, 4, 2]]).is_err());
    assert!(detect(&[]).is_err());
}

#[test]
fn unknown_registers_types_and_layouts_are_refused() {
    let btf = types(&[("type", 3), ("signal", 1)]);
    let format = OrcFormat::detect(&btf, &[vec![8, 0, 0, 0, 5, 2]], false).unwrap();
    let refused = |bytes: [u8; 6]| format.decode(Gva(0), &bytes).unwrap_err();
    assert!(matches!(
        refused([8, 0, 0, 0, 0x0f, 2]),
        UnwindError::BadOrc {
            what: "sp_reg",
            found: 15,
            ..
        }
    ));
    assert!(matches!(
        refused([8, 0, 0, 0, 0x05, 7]),
        UnwindError::BadOrc {
            what: "type",
            found: 7,
            ..
        }
    ));
    assert!(format.decode(Gva(0), &[8, 0, 0]).is_err());
    for fields in [
        [("type", 4), ("signal", 1)],
        [("type", 3), ("end", 1)],
        [("type", 2), ("signal", 1)],
    ] {
        assert!(OrcFormat::detect(&types(&fields), &[vec![8, 0, 0, 0, 5, 2]], false).is_err());
    }
}
