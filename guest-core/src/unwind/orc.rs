//! ORC entries: for an address in the code, how the caller's frame is found.
//!
//! Format: `struct orc_entry`, arch/x86/include/asm/orc_types.h. Its 6 bytes kept their order, but not their meaning:
//! - up to 6.2 two bits `type` (call, regs, partial regs) and a bit `end`;
//! - 6.3 the same with a bit `signal` before `end`;
//! - 6.4 three bits `type` (undefined, end, call, regs, partial regs) and a bit `signal`;
//! - 7.1 the same, with the registers numbered anew.
//!
//! BTF tells the first three apart. The entries themselves show the numbering: at the first instruction of any function, the caller's frame
//! is at SP + 8.
//! Up to 5.11 an indirect SP entry adds its offset before it dereferences, later ones after (unwind_orc.c).

use super::error::{SetupError, UnwindError};
use crate::addr::Gva;
use crate::btf::{Btf, Member};

/// Longest entry that is accepted, in bytes. All known ones have 6.
pub const ENTRY_BYTES_MAX: usize = 16;
/// The offset of the caller's frame from SP at the first instruction of a function, in bytes: only the return address is pushed.
const SP_OFFSET_AT_ENTRY: i64 = 8;
/// `TOP_OF_KERNEL_STACK_PADDING` with FRED (arch/x86/include/asm/thread_info.h, since 6.9), in bytes.
const FRED_PADDING_BYTES: u64 = 16;

/// The base from which an address on the stack is computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Base {
    /// Unknown; for BP: unchanged.
    Undefined,
    /// The caller's stack pointer, which was computed before.
    PrevSp,
    /// SP.
    Sp,
    /// BP.
    Bp,
    /// The word that SP points at.
    SpIndirect,
    /// The word that BP points at.
    BpIndirect,
    /// Another register, in functions with an aligned stack and in entry code.
    Register(Register),
}

/// A general register that may point to the frame for a few instructions.
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
    /// The register's name.
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

/// What is at the computed address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Unknown.
    Undefined,
    /// The end of the stack: the code is the first of a kernel thread, or of a CPU.
    End,
    /// A return address just below.
    Call,
    /// All registers (`struct pt_regs`).
    Regs,
    /// The five words that the CPU pushes at an interrupt, which end `struct pt_regs`.
    RegsPartial,
}

/// A decoded entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rule {
    /// Base of the caller's stack pointer.
    pub sp: Base,
    /// Offset from that base, in bytes.
    pub sp_offset: i64,
    /// Base of the address at which the caller's BP is saved.
    pub bp: Base,
    /// Offset from that base, in bytes.
    pub bp_offset: i64,
    /// What is at the caller's stack pointer.
    pub kind: Kind,
    /// True if the caller was interrupted at its address; false if the address is a return address.
    pub signal: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Numbering {
    /// 4.14 to 7.0.
    First,
    /// From 7.1 on.
    Second,
}

/// The format of a kernel's entries.
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
    /// True if an indirect SP entry adds its offset before it dereferences.
    adds_first: bool,
}

impl OrcFormat {
    /// Detects the format from the type information, and from the entries at the first instruction of some functions (`at_entry`), which must
    /// agree. `adds_first`: an indirect SP entry adds its offset before it dereferences.
    ///
    /// # Errors
    ///
    /// The format is unknown.
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
            "SP + 8 in a known numbering",
        ))
    }

    /// Length of an entry, in bytes.
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

    /// True if an indirect SP entry adds its offset before it dereferences.
    pub fn adds_before_dereference(&self) -> bool {
        self.adds_first
    }

    /// Most bytes that a kernel with this format leaves between the outermost `struct pt_regs` and a stack's end. Up to 6.3 it leaves none.
    pub fn stack_padding_max(&self) -> u64 {
        if self.end.is_some() { 0 } else { FRED_PADDING_BYTES }
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
