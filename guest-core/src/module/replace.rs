//! Applies alternatives for the guest's CPU: if the CPU has the feature, the site gets the replacement.
//!
//! This is done as in `apply_alternatives` (arch/x86/kernel/alternative.c; 6.1, 6.12, 7.2), with one difference without effect: 6.1 corrects only a lone call or
//! jump for its new place; later kernels, and this module, correct every instruction.

use super::LinkError;
use super::alternatives::Alternative;
use super::link::Linker;
use super::nops::nops;
use crate::addr::Gva;
use iced_x86::{Decoder, DecoderOptions, Instruction, Mnemonic, OpKind};

const TABLE: &str = ".altinstructions";

/// Why an instruction cannot be moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Immovable {
    /// The bytes are no complete instruction.
    Undecodable,
    /// A distance does not fit into its field any more.
    TooFar,
}

impl Linker<'_, '_, '_> {
    /// Applies the alternatives in placed code. Of the entries for one site, which follow each other, the last that applies
    /// wins: up to 6.12 it overwrites the others, in 7.2 it is the only one that is applied.
    pub(super) fn apply_alternatives(&mut self) -> Result<(), LinkError> {
        for entries in self.image.alternatives.chunk_by(|a, b| a.site == b.site) {
            let Some(first) = entries.first() else { continue };
            let len = usize::from(first.site_len);
            let mut chosen = None;
            for entry in entries {
                if self.applies(entry)? {
                    chosen = Some(entry);
                }
            }
            let bytes = match chosen {
                Some(entry) => self.replacement(entry, len)?,
                None => merge_nops(self.bytes(first.site, len)?),
            };
            self.write(first.site, &bytes)?;
        }
        Ok(())
    }

    /// True if the alternative applies to the guest's CPU: the CPU has the feature, or lacks it if the entry asks for that.
    fn applies(&self, alternative: &Alternative) -> Result<bool, LinkError> {
        let feature = usize::from(alternative.feature);
        let word = self
            .guest
            .capabilities
            .get(feature / 32)
            .ok_or_else(|| LinkError::Feature {
                at: self.image.module.place(alternative.entry),
                feature: alternative.feature,
                known: self.guest.capabilities.len().saturating_mul(32),
            })?;
        Ok((word >> (feature % 32) & 1 != 0) != alternative.inverted)
    }

    /// The `len` bytes for the site.
    fn replacement(&self, alternative: &Alternative, len: usize) -> Result<Vec<u8>, LinkError> {
        if alternative.direct_call {
            return self.direct_call(TABLE, alternative.site, len);
        }
        let new_len = usize::from(alternative.replacement_len);
        // An empty replacement may be anywhere, even in a section that is not placed.
        let mut bytes = Vec::with_capacity(len);
        if let Some(replacement) = alternative.replacement.filter(|_| new_len > 0) {
            let (from, to) = (self.address(replacement)?, self.address(alternative.site)?);
            bytes.extend(self.bytes(replacement, new_len)?);
            relocate(&mut bytes, Gva(from), Gva(to)).map_err(|why| {
                let expected = match why {
                    Immovable::Undecodable => "whole instructions",
                    Immovable::TooFar => "branches that reach as far from the code that they replace",
                };
                self.site_error(TABLE, replacement, new_len, expected.into())
            })?;
        }
        bytes.resize(len, 0x90);
        Ok(merge_nops(&bytes))
    }
}

/// Corrects the distances in code that moves from one address to another. Distances within the code stay as they are.
fn relocate(code: &mut [u8], from: Gva, to: Gva) -> Result<(), Immovable> {
    let len = code.len() as u64;
    let shift = from.0.wrapping_sub(to.0).cast_signed();
    for (offset, instruction, fields) in instructions(code, from)? {
        let (target, field, width) = match instruction.op0_kind() {
            OpKind::NearBranch64 => (
                instruction.near_branch_target(),
                fields.immediate_offset(),
                fields.immediate_size(),
            ),
            _ if instruction.is_ip_rel_memory_operand() => (
                instruction.ip_rel_memory_address(),
                fields.displacement_offset(),
                fields.displacement_size(),
            ),
            _ => continue,
        };
        // The end of the code counts as inside: what follows the replacement follows the site.
        if target.wrapping_sub(from.0) <= len {
            continue;
        }
        let start = offset.saturating_add(field);
        let slot = code
            .get_mut(start..start.saturating_add(width))
            .ok_or(Immovable::Undecodable)?;
        match slot {
            [byte] => {
                let moved = i64::from(byte.cast_signed())
                    .checked_add(shift)
                    .and_then(|d| i8::try_from(d).ok());
                *byte = moved.ok_or(Immovable::TooFar)?.cast_unsigned();
            }
            [a, b, c, d] => {
                let distance = i64::from(i32::from_le_bytes([*a, *b, *c, *d]));
                let moved = distance.checked_add(shift).and_then(|d| i32::try_from(d).ok());
                [*a, *b, *c, *d] = moved.ok_or(Immovable::TooFar)?.to_le_bytes();
            }
            _ => return Err(Immovable::Undecodable),
        }
    }
    Ok(())
}

/// The instructions of `code`, each with its offset and where its constants are.
fn instructions(code: &[u8], at: Gva) -> Result<Vec<(usize, Instruction, iced_x86::ConstantOffsets)>, Immovable> {
    let mut decoder = Decoder::with_ip(64, code, at.0, DecoderOptions::NONE);
    let mut found = Vec::new();
    while decoder.can_decode() {
        let offset = decoder.position();
        let instruction = decoder.decode();
        if instruction.is_invalid() {
            return Err(Immovable::Undecodable);
        }
        found.push((offset, instruction, decoder.get_constant_offsets(&instruction)));
    }
    Ok(found)
}

/// Replaces runs of NOPs in the code by as few as possible, which saves time. Code that cannot be decoded stays as it is.
fn merge_nops(code: &[u8]) -> Vec<u8> {
    let mut merged = code.to_vec();
    let Ok(found) = instructions(code, Gva(0)) else {
        return merged;
    };
    for run in found.chunk_by(|(_, a, _), (_, b, _)| is_nop(a) && is_nop(b)) {
        let Some((start, first, _)) = run.first().filter(|(_, first, _)| is_nop(first)) else {
            continue;
        };
        let end = run
            .last()
            .map_or(*start, |(offset, last, _)| offset.saturating_add(last.len()));
        if let Some(slot) = merged.get_mut(*start..end).filter(|slot| slot.len() > first.len()) {
            slot.copy_from_slice(&nops(slot.len()));
        }
    }
    merged
}

fn is_nop(instruction: &Instruction) -> bool {
    instruction.mnemonic() == Mnemonic::Nop
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::module::PatchModule;
    use crate::module::testing::{ALT_6_1, ALT_6_12, TestElf, TestGuest};
    use object::elf::{R_X86_64_32S, R_X86_64_PC32, R_X86_64_PLT32, SHF_ALLOC, SHF_EXECINSTR};

    /// CPU feature 35 (word 1, bit 3) is there, 36 is not.
    fn guest() -> TestGuest {
        TestGuest {
            capabilities: vec![0, 1 << 3],
            ..Default::default()
        }
    }

    /// A module whose text is `text`, of which the first `len` bytes may become `replacement`; `entry` is the rest of the entry.
    fn module(text: &[u8], replacement: &[u8], entry: &[u8]) -> TestElf {
        let mut elf = TestElf::livepatch(text);
        let code = elf.section(".altinstr_replacement", SHF_ALLOC.0 | SHF_EXECINSTR.0, replacement);
        let code = elf.section_symbol(code);
        let table = elf.section(".altinstructions", SHF_ALLOC.0, &[&[0; 8], entry].concat());
        elf.relocation(table, 0, R_X86_64_PC32, 1, 0);
        elf.relocation(table, 4, R_X86_64_PC32, code, 0);
        elf
    }

    #[test]
    fn a_feature_of_the_cpu_brings_the_replacement() {
        // clac in the place of three NOPs
        let elf = module(&[0x90, 0x90, 0x90, 0xc3], &[0x0f, 0x01, 0xca], &[35, 0, 3, 3]);
        assert_eq!(guest().link_text(&elf.build(), &ALT_6_1), [0x0f, 0x01, 0xca, 0xc3]);
    }

    #[test]
    fn a_missing_feature_leaves_the_original_with_its_nops_merged() {
        let elf = module(&[0x90, 0x90, 0x90, 0xc3], &[0x0f, 0x01, 0xca], &[36, 0, 3, 3]);
        assert_eq!(guest().link_text(&elf.build(), &ALT_6_1), [0x0f, 0x1f, 0, 0xc3]);
    }

    #[test]
    fn the_top_bit_of_the_feature_or_a_flag_asks_for_its_absence() {
        let elf = module(&[0x90, 0x90, 0x90], &[0x0f, 0x01, 0xca], &[36, 0x80, 3, 3]);
        assert_eq!(guest().link_text(&elf.build(), &ALT_6_1), [0x0f, 0x01, 0xca]);
        let elf = module(&[0x90, 0x90, 0x90], &[0x0f, 0x01, 0xca], &[36, 0, 1, 0, 3, 3]);
        assert_eq!(guest().link_text(&elf.build(), &ALT_6_12), [0x0f, 0x01, 0xca]);
    }

    #[test]
    fn of_two_alternatives_that_apply_the_last_wins() {
        let mut elf = TestElf::livepatch(&[0x90, 0x90, 0x90]);
        let code = elf.section(
            ".altinstr_replacement",
            SHF_ALLOC.0 | SHF_EXECINSTR.0,
            &[0x0f, 0x01, 0xca, 0xf3, 0xaa],
        );
        let code = elf.section_symbol(code);
        // The second one is for a shorter site, as in a nested alternative; it is filled up all the same.
        let entries = [
            [0, 0, 0, 0, 0, 0, 0, 0, 35, 0, 3, 3],
            [0, 0, 0, 0, 0, 0, 0, 0, 36, 0x80, 2, 2],
        ]
        .concat();
        let table = elf.section(".altinstructions", SHF_ALLOC.0, &entries);
        for (entry, replacement) in [(0, 0), (12, 3)] {
            elf.relocation(table, entry, R_X86_64_PC32, 1, 0);
            elf.relocation(table, entry + 4, R_X86_64_PC32, code, replacement);
        }
        assert_eq!(guest().link_text(&elf.build(), &ALT_6_1), [0xf3, 0xaa, 0x90]);
    }

    #[test]
    fn a_jump_is_corrected_for_where_it_goes() {
        // jmp +0 to .text+7
        let mut elf = module(
            &[0x90, 0x90, 0x90, 0x90, 0x90, 0xc3, 0xcc, 0xc3],
            &[0xe9, 0, 0, 0, 0],
            &[35, 0, 5, 5],
        );
        elf.relocation(7, 1, R_X86_64_PC32, 1, 7 - 4);
        assert_eq!(guest().link_text(&elf.build(), &ALT_6_1)[..5], [0xe9, 2, 0, 0, 0]);
    }

    #[test]
    fn a_shorter_replacement_is_filled_up() {
        let elf = module(&[0xe8, 1, 2, 3, 4], &[0xf3, 0xaa], &[35, 0, 5, 2]);
        assert_eq!(guest().link_text(&elf.build(), &ALT_6_1), [0xf3, 0xaa, 0x0f, 0x1f, 0]);
        let elf = module(&[0xe8, 1, 2, 3, 4], &[], &[35, 0, 5, 0]);
        // Nothing of an empty section is there to point to.
        let nowhere = crate::module::PatchModule::parse(&elf.build())
            .unwrap()
            .alternatives(&ALT_6_1)
            .is_err();
        assert!(nowhere);
    }

    #[test]
    fn an_empty_replacement_may_have_no_address_and_another_one_may_not() {
        let linked = |len: u8| {
            let mut elf = TestElf::livepatch(&[0xeb, 0x01, 0x90, 0xc3]);
            let entry = [0, 0, 0, 0, 0, 0, 0, 0, 35, 0, 3, len];
            let table = elf.section(".altinstructions", SHF_ALLOC.0, &entry);
            elf.relocation(table, 0, R_X86_64_PC32, 1, 0);
            elf.build()
        };
        assert_eq!(guest().link_text(&linked(0), &ALT_6_1), [0x0f, 0x1f, 0, 0xc3]);
        let module = linked(1);
        let error = PatchModule::parse(&module).unwrap().alternatives(&ALT_6_1).unwrap_err();
        assert!(error.to_string().contains("found no relocation"), "{error}");
    }

    #[test]
    fn an_indirect_call_that_is_to_become_direct_does() {
        // call *pv_ops(%rip); call BUG_func
        let mut elf = module(&[0xff, 0x15, 0, 0, 0, 0], &[0xe8, 0, 0, 0, 0], &[35, 0, 2, 0, 6, 5]);
        let (pv_ops, bug) = (elf.undefined("pv_ops"), elf.undefined("BUG_func"));
        elf.relocation(1, 2, R_X86_64_PC32, pv_ops, -4);
        elf.relocation(7, 1, R_X86_64_PLT32, bug, -4);
        let mut guest = guest();
        guest.exported = [("pv_ops", 0xffff_ffff_8240_0000), ("BUG_func", 0xffff_ffff_8100_9000)].into();
        guest
            .memory
            .insert(0xffff_ffff_8240_0000, 0xffff_ffff_8100_1000_u64.to_le_bytes().to_vec());
        assert_eq!(guest.link_text(&elf.build(), &ALT_6_12), [0xe8, 0xfb, 0x0f, 0, 0, 0x90]);
    }

    #[test]
    fn a_replacement_for_code_that_is_not_placed_needs_nothing() {
        // The alternative is in code of exit and calls what nobody has.
        let mut elf = TestElf::livepatch(&[0xc3]);
        let code = elf.section(".altinstr_replacement", SHF_ALLOC.0 | SHF_EXECINSTR.0, &[0; 5]);
        let symbol = elf.section_symbol(code);
        let missing = elf.undefined("missing");
        elf.relocation(code, 1, R_X86_64_32S, missing, 0);
        let exit = elf.section(".exit.text", SHF_ALLOC.0 | SHF_EXECINSTR.0, &[0x90; 5]);
        let exit = elf.section_symbol(exit);
        let table = elf.section(".altinstructions", SHF_ALLOC.0, &[0, 0, 0, 0, 0, 0, 0, 0, 35, 0, 5, 5]);
        elf.relocation(table, 0, R_X86_64_PC32, exit, 0);
        elf.relocation(table, 4, R_X86_64_PC32, symbol, 0);
        assert_eq!(guest().link_text(&elf.build(), &ALT_6_1), [0xc3]);
    }

    #[test]
    fn a_feature_behind_the_last_one_is_refused() {
        use crate::module::testing::{BASES, KLP_6_1};
        let file = module(&[0x90], &[0x90], &[64, 0, 1, 1]).build();
        let module = crate::module::PatchModule::parse(&file).unwrap();
        let patch = module.patch(&KLP_6_1).unwrap();
        let image = module.image(&patch, &ALT_6_1).unwrap();
        let error = image.link(&BASES, &guest().context()).unwrap_err();
        assert_eq!(
            error.to_string(),
            "the alternative at .altinstructions+0x0 asks for CPU feature 64, the guest has 64"
        );
    }

    #[test]
    fn moved_code_keeps_inner_jumps_and_corrects_outer_ones() {
        // 0: jmp +2 (to 4); 2: jne +0x10 (to 0x14); 4: mov 0x100(%rip),%eax; 10: call +0 (to 15, the end)
        let code = [0xeb, 2, 0x75, 0x10, 0x8b, 5, 0, 1, 0, 0, 0xe8, 0, 0, 0, 0];
        let mut moved = code;
        assert_eq!(relocate(&mut moved, Gva(0x1000), Gva(0xff0)), Ok(()));
        assert_eq!(moved, [0xeb, 2, 0x75, 0x20, 0x8b, 5, 0x10, 1, 0, 0, 0xe8, 0, 0, 0, 0]);
        assert_eq!(
            relocate(&mut code.clone(), Gva(0x1000), Gva(0x800)),
            Err(Immovable::TooFar)
        );
        assert_eq!(
            relocate(&mut [0xe9, 0], Gva(0x1000), Gva(0x800)),
            Err(Immovable::Undecodable)
        );
    }

    #[test]
    fn a_pause_is_not_merged_with_nops() {
        assert_eq!(merge_nops(&[0xf3, 0x90, 0x90, 0x90]), [0xf3, 0x90, 0x66, 0x90]);
    }
}
