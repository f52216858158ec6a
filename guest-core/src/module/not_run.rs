//! Init and exit in a section of code that goes into the guest. A module without `__init` and `__exit` has them there, beside the new functions.
//! vmpatch does not run them, so that their uses of addresses do not count as escapes.

use super::Image;
use super::flow::Code;
use super::sections::{Section, SectionId, SectionOffset, SymbolPlace};
use iced_x86::OpKind;
use object::elf::R_X86_64_NONE;
use std::ops::Range;

/// Most that an addend lacks: a distance counts from the end of an instruction of at most 15 bytes.
const BIAS_MAX: u64 = 15;

impl Image<'_, '_> {
    /// The ranges of init and exit in a section of code, if nothing else in the guest leads to them.
    pub(super) fn not_run(&self, id: SectionId, section: &Section<'_>) -> Vec<Range<u64>> {
        // They are well-formed, because the patch was read.
        let own = self.module.own_functions().unwrap_or_default();
        let here = own.into_iter().filter(|(_, entry)| entry.section == id);
        let ranges = here.filter_map(|(_, entry)| self.function_at(entry));
        let ranges: Vec<_> = ranges.collect();
        if ranges.is_empty() {
            return ranges;
        }
        let Some(code) = Code::decode(self, id, section, 0..section.size) else {
            return Vec::new();
        };
        let is_reached = |range: &Range<u64>| {
            let outside = code.instructions().filter(|one| !range.contains(&one.ip()));
            // The assembler itself resolves a distance within the same section. All others have a relocation.
            let mut own = outside.filter(|one| section.relocations_in(one.ip(), one.next_ip()).is_empty());
            own.any(|one| {
                (one.op0_kind() == OpKind::NearBranch64 && range.contains(&one.near_branch_target()))
                    || (one.is_ip_rel_memory_operand() && range.contains(&one.ip_rel_memory_address()))
            }) || self.is_referred_to(id, range)
        };
        ranges.into_iter().filter(|range| !is_reached(range)).collect()
    }

    /// The function that begins at a place.
    fn function_at(&self, at: SectionOffset) -> Option<Range<u64>> {
        let symbols = self.module.elf.symbols.iter();
        let here = symbols.filter(|symbol| symbol.place == SymbolPlace::Defined(at));
        let size = here.map(|symbol| symbol.size).max()?;
        (size != 0).then(|| at.offset..at.plus(size).offset)
    }

    /// True if something that goes into the guest, outside of the range itself, may refer to the range of a section.
    fn is_referred_to(&self, id: SectionId, range: &Range<u64>) -> bool {
        self.layout().sections.iter().any(|placed| {
            let section = self.module.section(placed.section);
            let relocations = section.map_or(&[][..], |section| &section.relocations);
            let others = relocations.iter().filter(|relocation| {
                relocation.kind != R_X86_64_NONE.0 && !(placed.section == id && range.contains(&relocation.offset))
            });
            others.into_iter().any(|relocation| {
                let symbol = self.module.symbol(relocation).map(|symbol| symbol.place);
                let Some(SymbolPlace::Defined(base)) = symbol else {
                    return false;
                };
                let lowest = base.offset.wrapping_add_signed(relocation.addend);
                base.section == id && (0..=BIAS_MAX).any(|bias| range.contains(&lowest.wrapping_add(bias)))
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use crate::module::PatchModule;
    use crate::module::testing::{ALT_6_1, KLP_6_1, TestElf};
    use object::elf::{R_X86_64_32S, R_X86_64_64, R_X86_64_PC32, R_X86_64_PLT32};

    /// A section with `new_f`, which begins with `start` and continues with NOPs, and an init that enables the patch.
    fn module(start: &[u8]) -> TestElf {
        let mut text = [0x90; 28];
        text[..start.len()].copy_from_slice(start);
        text[15] = 0xc3;
        // mov $patch,%rdi; jmp klp_enable_patch
        text[16..].copy_from_slice(&[0x48, 0xc7, 0xc7, 0, 0, 0, 0, 0xe9, 0, 0, 0, 0]);
        let mut elf = TestElf::livepatch(&text);
        let init = elf.symbol("init_module", 0x12, 1, 16, 12);
        let enable = elf.undefined("klp_enable_patch");
        elf.relocation(1, 16 + 3, R_X86_64_32S, 3, 0);
        elf.relocation(1, 16 + 8, R_X86_64_PLT32, enable, -4);
        elf.drop_relocation(5, 8);
        elf.relocation(5, 8, R_X86_64_64, init, 0);
        elf
    }

    fn escapes(elf: &TestElf) -> Vec<String> {
        let file = elf.build();
        let module = PatchModule::parse(&file).unwrap();
        let patch = module.patch(&KLP_6_1).unwrap();
        module.image(&patch, &ALT_6_1).unwrap().escapes()
    }

    #[test]
    fn what_init_does_with_addresses_counts_for_nothing() {
        assert_eq!(escapes(&module(&[])), [""; 0]);
    }

    #[test]
    fn an_init_that_other_code_leads_to_counts() {
        // call init, by a distance that the assembler knows
        assert_eq!(escapes(&module(&[0xe8, 11, 0, 0, 0])), [".data"]);
        // and by one that it leaves to the linker
        let mut elf = module(&[0xe8, 0, 0, 0, 0]);
        elf.relocation(1, 1, R_X86_64_PC32, 1, 16 - 4);
        assert_eq!(escapes(&elf), [".data"]);
        // lea init(%rip),%rax
        assert_eq!(escapes(&module(&[0x48, 0x8d, 0x05, 9, 0, 0, 0])), [".data", "new_f"]);
    }
}
