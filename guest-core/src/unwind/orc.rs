//! ORC entries: for a place in the code, where its caller's frame is.
//!
//! Format: `struct orc_entry`, arch/x86/include/asm/orc_types.h. Its 6 bytes kept their order, but not their meaning:
//! - up to 6.2 two bits `type` (call, regs, partial regs) and a bit `end`;
//! - 6.3 the same with a bit `signal` before `end`;
//! - 6.4 three bits `type` (undefined, end, call, regs, partial regs) and a bit `signal`;
//! - 7.1 the same, with the registers numbered anew.
//!
//! BTF tells the first three apart. The numbering shows in the entries themselves: at the very first instruction of
//! any function the caller's frame is at SP + 8.
//! Up to 5.11 an indirect SP entry adds its offset before it dereferences, later ones after (unwind_orc.c).

use super::error::{SetupError, UnwindError};
use crate::addr::Gva;
use crate::btf::{Btf, Member};

/// Longest entry that is accepted, in bytes; all known ones have 6.
pub const ENTRY_BYTES_MAX: usize = 16;
/// What the caller's frame is found from, at the first instruction of a function: the return address alone is pushed.
const SP_OFFSET_AT_ENTRY: i64 = 8;

/// What an address on the stack is computed from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Base {
    /// Not known; for BP: unchanged.
    Undefined,
    /// The caller's stack pointer, just computed.
    PrevSp,
    /// SP.
    Sp,
    /// BP.
    Bp,
    /// The word that SP points at.
    SpIndirect,
    /// The word that BP points at.
    BpIndirect,
    /// Another register, for stacks that the compiler aligns and for entry code.
    Register(Register),
}

/// A general register that may hold the frame for a few instructions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Register {
    /// RAX
    Ax,
    /// RDX
    Dx,
    /// RDI
    Di,
    /// R10
    R10,
    /// R13
    R13,
}

impl Register {
    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ax => "RAX",
            Self::Dx => "RDX",
            Self::Di => "RDI",
            Self::R10 => "R10",
            Self::R13 => "R13",
        }
    }
}

/// What is found at the computed address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Nothing is known here.
    Undefined,
    /// The stack ends here: the first code of a kernel thread, or of a CPU.
    End,
    /// A return address just below.
    Call,
    /// All registers (`struct pt_regs`).
    Regs,
    /// The five words that the CPU pushes at an interrupt, the end of `struct pt_regs`.
    RegsPartial,
}

/// A decoded entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rule {
    /// Where the caller's stack pointer comes from.
    pub sp: Base,
    /// Added to it, in bytes.
    pub sp_offset: i64,
    /// Where the caller's BP is saved.
    pub bp: Base,
    /// Added to that, in bytes.
    pub bp_offset: i64,
    /// What is there.
    pub kind: Kind,
    /// True where the caller was interrupted at its address, false where it has called just before it.
    pub signal: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Numbering {
    /// 4.14 to 7.0.
    First,
    /// From 7.1 on.
    Second,
}

/// How this kernel writes its entries.
#[derive(Debug, Clone)]
pub struct OrcFormat {
    size: usize,
    sp_offset: Member,
    bp_offset: Member,
    sp_reg: Member,
    bp_reg: Member,
    kind: Member,
    signal: Option<Member>,
    end: Option<Member>,
    numbering: Numbering,
    /// True where an indirect SP entry adds its offset before it dereferences.
    adds_first: bool,
}

impl OrcFormat {
    /// Finds out the format: from the type information, and from the entries at the first instruction of some
    /// functions (`at_entry`), which must all say the same. `adds_first`: see the module's text.
    pub fn detect(btf: &Btf, at_entry: &[Vec<u8>], adds_first: bool) -> Result<Self, SetupError> {
        let entry = btf.structure("orc_entry")?;
        let size = usize::try_from(entry.size()).unwrap_or(usize::MAX);
        let not_understood = |found: String, expected: &str| SetupError::NotUnderstood {
            what: "struct orc_entry",
            found,
            expected: expected.to_owned(),
        };
        if size > ENTRY_BYTES_MAX {
            return Err(not_understood(format!("{size} bytes"), "6"));
        }
        let mut format = Self {
            size,
            sp_offset: entry.member("sp_offset")?,
            bp_offset: entry.member("bp_offset")?,
            sp_reg: entry.member("sp_reg")?,
            bp_reg: entry.member("bp_reg")?,
            kind: entry.member("type")?,
            signal: entry.try_member("signal"),
            end: entry.try_member("end"),
            numbering: Numbering::First,
            adds_first,
        };
        match (format.kind.bit_field, format.end.is_some(), format.signal.is_some()) {
            (Some(2), true, _) | (Some(3), false, true) => {}
            (bits, end, signal) => {
                let found = format!("type of {bits:?} bits, end {end}, signal {signal}");
                return Err(not_understood(found, "2 bits with end, or 3 bits with signal"));
            }
        }
        let fits = |format: &Self, bytes: &Vec<u8>| {
            let rule = format.decode(Gva(0), bytes);
            rule.is_ok_and(|rule| (rule.sp, rule.sp_offset, rule.kind) == (Base::Sp, SP_OFFSET_AT_ENTRY, Kind::Call))
        };
        for numbering in [Numbering::First, Numbering::Second] {
            format.numbering = numbering;
            if !at_entry.is_empty() && at_entry.iter().all(|bytes| fits(&format, bytes)) {
                return Ok(format);
            }
        }
        Err(not_understood(
            format!("{at_entry:02x?} at function entries"),
            "SP + 8 under a known numbering",
        ))
    }

    /// Bytes of an entry.
    pub fn entry_bytes(&self) -> usize {
        self.size
    }

    /// Decodes the entry for the code at `ip`, which is only used in errors.
    pub fn decode(&self, ip: Gva, bytes: &[u8]) -> Result<Rule, UnwindError> {
        let missing = UnwindError::NoOrc { ip };
        let field = |member: &Member| member.value_in(bytes).ok_or_else(|| missing.clone());
        let signed = |member: &Member| {
            let value = u16::try_from(field(member)?).map_err(|_| missing.clone())?;
            Ok::<_, UnwindError>(i64::from(value.cast_signed()))
        };
        let base = |what, found| self.base(found).ok_or(UnwindError::BadOrc { ip, what, found });
        let (sp, bp) = (
            base("sp_reg", field(&self.sp_reg)?)?,
            base("bp_reg", field(&self.bp_reg)?)?,
        );
        let kind = self.kind(field(&self.kind)?, sp, self.end.as_ref().map(field).transpose()?);
        let kind = kind.map_err(|found| UnwindError::BadOrc {
            ip,
            what: "type",
            found,
        })?;
        let signal = match &self.signal {
            Some(member) => field(member)? != 0,
            None => matches!(kind, Kind::Regs | Kind::RegsPartial),
        };
        let (sp_offset, bp_offset) = (signed(&self.sp_offset)?, signed(&self.bp_offset)?);
        Ok(Rule {
            sp,
            sp_offset,
            bp,
            bp_offset,
            kind,
            signal,
        })
    }

    /// True where an indirect SP entry adds its offset before it dereferences.
    pub fn adds_before_dereference(&self) -> bool {
        self.adds_first
    }

    fn kind(&self, number: u64, sp: Base, end: Option<u64>) -> Result<Kind, u64> {
        match (end, number) {
            (Some(0), _) if sp == Base::Undefined => Ok(Kind::Undefined),
            (Some(_), _) if sp == Base::Undefined => Ok(Kind::End),
            (Some(_), 0) => Ok(Kind::Call),
            (Some(_), 1) => Ok(Kind::Regs),
            (Some(_), 2) => Ok(Kind::RegsPartial),
            (None, 0) => Ok(Kind::Undefined),
            (None, 1) => Ok(Kind::End),
            (None, 2) => Ok(Kind::Call),
            (None, 3) => Ok(Kind::Regs),
            (None, 4) => Ok(Kind::RegsPartial),
            _ => Err(number),
        }
    }

    fn base(&self, number: u64) -> Option<Base> {
        use Register::{Ax, Di, Dx, R10, R13};
        let first = [
            Base::Undefined,
            Base::PrevSp,
            Base::Register(Dx),
            Base::Register(Di),
            Base::Bp,
            Base::Sp,
            Base::Register(R10),
            Base::Register(R13),
            Base::BpIndirect,
            Base::SpIndirect,
        ];
        let second = [
            Base::Undefined,
            Base::Register(Ax),
            Base::Register(Dx),
            Base::Sp,
            Base::Bp,
            Base::Register(Di),
            Base::Register(R10),
            Base::Register(R13),
            Base::PrevSp,
            Base::SpIndirect,
            Base::BpIndirect,
        ];
        let number = usize::try_from(number).ok()?;
        match self.numbering {
            Numbering::First => first.get(number).copied(),
            Numbering::Second => second.get(number).copied(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
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

    // entries as they stand in Debian's kernels

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
}
