//! One instruction of an init or exit function, and what the file says of its operands.

use super::state::{State, Value};
use crate::module::PatchModule;
use crate::module::sections::{Relocation, SectionOffset, Symbol, SymbolId, SymbolPlace};
use iced_x86::{ConditionCode, ConstantOffsets, Decoder, DecoderOptions, Instruction, Mnemonic, OpKind, Register};

/// Longest x86 instruction.
const INSTRUCTION_BYTES_MAX: usize = 15;
/// What accepted code is made of. Conditional moves, sets and jumps are, too.
const MNEMONICS: &[Mnemonic] = &[
    Mnemonic::Adc,
    Mnemonic::Add,
    Mnemonic::And,
    Mnemonic::Call,
    Mnemonic::Cdq,
    Mnemonic::Cdqe,
    Mnemonic::Cmp,
    Mnemonic::Cqo,
    Mnemonic::Cwde,
    Mnemonic::Dec,
    Mnemonic::Endbr64,
    Mnemonic::Imul,
    Mnemonic::Inc,
    Mnemonic::Int3,
    Mnemonic::Jmp,
    Mnemonic::Lea,
    Mnemonic::Leave,
    Mnemonic::Mov,
    Mnemonic::Movsb,
    Mnemonic::Movsd,
    Mnemonic::Movsq,
    Mnemonic::Movsx,
    Mnemonic::Movsxd,
    Mnemonic::Movzx,
    Mnemonic::Mul,
    Mnemonic::Neg,
    Mnemonic::Nop,
    Mnemonic::Not,
    Mnemonic::Or,
    Mnemonic::Pop,
    Mnemonic::Push,
    Mnemonic::Ret,
    Mnemonic::Rol,
    Mnemonic::Ror,
    Mnemonic::Sar,
    Mnemonic::Sbb,
    Mnemonic::Shl,
    Mnemonic::Shr,
    Mnemonic::Stosb,
    Mnemonic::Stosd,
    Mnemonic::Stosq,
    Mnemonic::Sub,
    Mnemonic::Test,
    Mnemonic::Ud2,
    Mnemonic::Xor,
];

/// What an address is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Target {
    /// A place in this module.
    Own(SectionOffset),
    /// A symbol of the kernel or of another module.
    Outside(SymbolId),
}

/// An instruction with what the file says of it.
pub(super) struct Step<'m, 'd> {
    module: &'m PatchModule<'d>,
    pub at: SectionOffset,
    pub instruction: Instruction,
    constants: ConstantOffsets,
    pub relocations: &'m [Relocation],
}

impl<'m, 'd> Step<'m, 'd> {
    /// The instruction at `at`; none where there is none.
    pub fn decode(module: &'m PatchModule<'d>, at: SectionOffset) -> Option<Self> {
        let section = module.section(at.section).filter(|section| section.is_executable())?;
        let start = usize::try_from(at.offset).ok()?;
        let end = start.saturating_add(INSTRUCTION_BYTES_MAX).min(section.data.len());
        let mut decoder = Decoder::with_ip(64, section.data.get(start..end)?, at.offset, DecoderOptions::NONE);
        let instruction = decoder.decode();
        if instruction.is_invalid() {
            return None;
        }
        let len = instruction.len() as u64;
        Some(Self {
            module,
            at,
            instruction,
            constants: decoder.get_constant_offsets(&instruction),
            relocations: section.relocations_in(at.offset, at.plus(len).offset),
        })
    }

    /// Whether accepted code has instructions of this kind.
    pub fn is_of_accepted_kind(&self) -> bool {
        self.instruction.condition_code() != ConditionCode::None || MNEMONICS.contains(&self.instruction.mnemonic())
    }

    pub fn is_branch(&self) -> bool {
        self.instruction.op0_kind() == OpKind::NearBranch64
    }

    pub fn has_memory_operand(&self) -> bool {
        (0..self.instruction.op_count()).any(|operand| self.instruction.op_kind(operand) == OpKind::Memory)
    }

    /// The place that a relocation of this instruction means: a relative one counts from the instruction's end.
    pub fn target(&self, relocation: &Relocation) -> Option<Target> {
        let offset = relocation.offset.checked_sub(self.at.offset)?;
        let is_relative = self.is_branch()
            || (self.instruction.is_ip_rel_memory_operand() && offset == self.constants.displacement_offset() as u64);
        let rest = (self.instruction.len() as u64).checked_sub(offset)?;
        let bias = if is_relative { i64::try_from(rest).ok()? } else { 0 };
        let symbol: &Symbol<'_> = self.module.symbol(relocation)?;
        match symbol.place {
            SymbolPlace::Defined(_) => self.module.target(relocation, bias).map(Target::Own),
            SymbolPlace::Absolute(_) => None,
            _ => Some(Target::Outside(relocation.symbol)),
        }
    }

    fn relocated(&self, field: usize) -> Option<Target> {
        let at = self.at.plus(field as u64).offset;
        let relocation = self.relocations.iter().find(|relocation| relocation.offset == at)?;
        self.target(relocation)
    }

    /// Where a jump or call leads.
    pub fn branch_target(&self) -> Option<Target> {
        if !self.relocations.is_empty() {
            return self.relocated(self.constants.immediate_offset());
        }
        let offset = self.instruction.near_branch_target();
        Some(Target::Own(SectionOffset { offset, ..self.at }))
    }

    /// The address that an immediate operand is.
    pub fn immediate(&self) -> Option<Target> {
        self.constants
            .has_immediate()
            .then(|| self.relocated(self.constants.immediate_offset()))?
    }

    /// The address that a memory operand means.
    pub fn in_memory(&self, state: &State) -> Value {
        if self.constants.has_displacement()
            && let Some(target) = self.relocated(self.constants.displacement_offset())
        {
            return Value::Address(target);
        }
        if self.instruction.is_ip_rel_memory_operand() {
            let offset = self.instruction.ip_rel_memory_address();
            return Value::Address(Target::Own(SectionOffset { offset, ..self.at }));
        }
        if is_per_cpu(self.instruction.memory_segment()) {
            return Value::Unknown;
        }
        match (
            state.get(self.instruction.memory_base()),
            self.instruction.memory_index(),
        ) {
            (Value::Address(Target::Own(at)), Register::None) => {
                let displacement = self.instruction.memory_displacement64().cast_signed();
                let offset = at.offset.checked_add_signed(displacement);
                offset.map_or(Value::Unknown, |offset| {
                    Value::Address(Target::Own(SectionOffset { offset, ..at }))
                })
            }
            (known @ (Value::Stack | Value::Address(_)), _) => known,
            _ => Value::Unknown,
        }
    }
}

/// Whether the segment is one that a kernel has its per-CPU variables in.
pub(super) fn is_per_cpu(segment: Register) -> bool {
    matches!(segment, Register::FS | Register::GS)
}
