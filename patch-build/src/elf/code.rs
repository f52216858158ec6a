//! What decoding tells of code: where the instruction ends that a relocation is in.

use std::collections::BTreeMap;

use iced_x86::{Decoder, DecoderOptions, Instruction, OpKind};

use super::{Relocation, Section};

/// An instruction of a section, and what it does with a value that a relocation puts into it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Bytes from the section's start to the instruction.
    pub start: u64,
    /// Bytes from the section's start to the end of the instruction.
    pub end: u64,
    /// True for a call or jump: the value is only run, not kept.
    pub is_branch: bool,
}

/// The instructions that have relocations.
#[derive(Clone, Debug, Default)]
pub struct Code {
    /// By offset of the relocation.
    places: BTreeMap<u64, Place>,
}

impl Code {
    /// Decodes a section of code.
    pub fn of(section: &Section) -> Self {
        let mut places = BTreeMap::new();
        let mut relocations = section.relocations.iter().peekable();
        for instruction in instructions(&section.data) {
            let place = Place {
                start: instruction.ip(),
                end: instruction.next_ip(),
                is_branch: is_branch(&instruction),
            };
            while let Some(relocation) = relocations.next_if(|relocation| relocation.offset < place.end) {
                places.insert(relocation.offset, place);
            }
        }
        Self { places }
    }

    /// The instruction that a relocation is in; none behind the last that could be decoded.
    pub fn place(&self, relocation: &Relocation) -> Option<&Place> {
        self.places.get(&relocation.offset)
    }
}

/// The instructions of `bytes`, as if they started at address 0.
pub fn instructions(bytes: &[u8]) -> impl Iterator<Item = Instruction> + '_ {
    Decoder::with_ip(64, bytes, 0, DecoderOptions::NONE).into_iter()
}

/// True for a direct call or jump.
pub fn is_branch(instruction: &Instruction) -> bool {
    instruction.op_count() > 0 && instruction.op0_kind() == OpKind::NearBranch64
}
