//! Escape analysis: finds a patch's own addresses that its code may hand to the guest, which may then use them after the revert. A timer, a
//! work item, an RCU callback, a notifier or an entry in a table of operations are all alike here: the patch has the address of its own
//! function or variable as a *value*.
//!
//! Every such value comes from a relocation, because the addresses are not known earlier, or from an instruction that computes an address
//! relative to itself. A direct call or jump, and a load or store of a variable, use an address without having it as a value. All other uses
//! count as escapes, except for an argument of a function that is known not to keep it (`flow.rs`): a format of `printk()` is the usual case.

use super::flow::Code;
use super::layout::AreaKind;
use super::sections::{Relocation, Section, SectionId, SectionOffset, SymbolPlace};
use super::{Image, PatchModule};
use crate::text::plain;
use object::elf::R_X86_64_NONE;
use std::collections::BTreeSet;
use std::ops::Range;

/// Most names that are listed. More are only counted.
const NAMES_MAX: usize = 16;

impl Image<'_, '_> {
    /// The names of the patch's own functions and variables whose addresses the guest may hold once the code has run. For an object without a name,
    /// the section's name. If it is empty, nothing in the guest leads to the patch once no task is in its code.
    pub fn escapes(&self) -> Vec<String> {
        let mut found = BTreeSet::new();
        for placed in &self.layout().sections {
            let Some(section) = self.module.section(placed.section) else {
                continue;
            };
            match placed.area {
                AreaKind::Text => self.of_code(placed.section, section, 0..section.size, &mut found),
                AreaKind::RoData | AreaKind::Data | AreaKind::PerCpu => {
                    self.of_data(placed.section, section, &mut found);
                }
                // Replacements that no alternative copies do not reach the guest.
                AreaKind::Scratch => {}
            }
        }
        for alternative in &self.alternatives {
            let Some(from) = alternative.replacement else { continue };
            let Some(section) = self.module.section(from.section) else {
                continue;
            };
            let code = from.offset..from.plus(alternative.replacement_len.into()).offset;
            self.of_code(from.section, section, code, &mut found);
        }
        let more = found.len().saturating_sub(NAMES_MAX);
        let mut names: Vec<_> = found.into_iter().take(NAMES_MAX).collect();
        if more != 0 {
            names.push(format!("{more} more"));
        }
        names
    }

    /// Any pointer in data to the module's own objects is a value. The guest does not read the livepatch descriptors.
    fn of_data(&self, id: SectionId, section: &Section<'_>, found: &mut BTreeSet<String>) {
        for relocation in &section.relocations {
            let at = SectionOffset {
                section: id,
                offset: relocation.offset,
            };
            let is_described = self.patch.descriptors.iter().any(|(start, bytes)| {
                start.section == id && (start.offset..start.plus(*bytes).offset).contains(&at.offset)
            });
            if !is_described && self.module.is_own(relocation) {
                found.insert(self.module.own_name(relocation, 0));
            }
        }
    }

    fn of_code(&self, id: SectionId, section: &Section<'_>, range: Range<u64>, found: &mut BTreeSet<String>) {
        let code = Code::decode(self, id, section, range.clone());
        let Some(code) = code else {
            // Code that cannot be decoded may do anything with what it refers to.
            let own = section.relocations_in(range.start, range.end).iter();
            found.extend(
                own.filter(|one| self.module.is_own(one))
                    .map(|one| self.module.own_name(one, 0)),
            );
            return;
        };
        let not_run = self.not_run(id, section);
        for (index, instruction) in code.instructions().enumerate() {
            let (start, end) = (instruction.ip(), instruction.next_ip());
            if not_run.iter().any(|range| range.contains(&start)) {
                continue;
            }
            let relocations = section.relocations_in(start, end);
            for relocation in relocations.iter().filter(|relocation| self.module.is_own(relocation)) {
                let escapes = !code.uses_in_place(index, relocation) && !code.hands_over(index);
                if escapes {
                    found.insert(self.module.own_name(relocation, relocation.bias(end)));
                }
            }
            // The assembler itself resolves a distance within the same section.
            if relocations.is_empty() && code.computes_own_address(index) {
                found.insert(self.module.object_at(SectionOffset {
                    section: id,
                    offset: instruction.ip_rel_memory_address(),
                }));
            }
        }
    }
}

impl PatchModule<'_> {
    /// True if a relocation means an address of the module's own.
    fn is_own(&self, relocation: &Relocation) -> bool {
        let Some(symbol) = self.symbol(relocation) else {
            return false;
        };
        relocation.kind != R_X86_64_NONE.0 && matches!(symbol.place, SymbolPlace::Defined(_))
    }

    /// The name of what a relocation means. `bias` is what its addend lacks.
    fn own_name(&self, relocation: &Relocation, bias: i64) -> String {
        match self.target(relocation, bias) {
            Some(target) => self.object_at(target),
            None => plain(self.symbol_name(relocation).as_bytes()),
        }
    }

    /// The name of the function or variable at a place; the section's if it has no name.
    fn object_at(&self, at: SectionOffset) -> String {
        let named = self.elf.symbols.iter().filter(|symbol| {
            let SymbolPlace::Defined(start) = symbol.place else {
                return false;
            };
            let holds = at
                .offset
                .checked_sub(start.offset)
                .is_some_and(|into| into < symbol.size.max(1));
            start.section == at.section && holds && !symbol.name.is_empty()
        });
        // Of several symbols the longest counts: an array, not an alias of its first element.
        let symbol = named.max_by_key(|symbol| symbol.size);
        let name = symbol.map_or_else(|| self.section_name(at.section), |symbol| symbol.name);
        plain(name.as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use crate::module::PatchModule;
    use crate::module::testing::{ALT_6_1, KLP_6_1, TestElf};
    use object::elf::{R_X86_64_32S, R_X86_64_64, R_X86_64_PC32, R_X86_64_PLT32, SHF_ALLOC, SHF_EXECINSTR, SHF_WRITE};

    const DATA: u64 = SHF_ALLOC.0 | SHF_WRITE.0;

    fn escapes(elf: &TestElf) -> Vec<String> {
        let file = elf.build();
        let module = PatchModule::parse(&file).unwrap();
        let patch = module.patch(&KLP_6_1).unwrap();
        module.image(&patch, &ALT_6_1).unwrap().escapes()
    }

    /// A module whose text is `text`, with a second function `helper` and a variable `counter` of its own.
    fn module(text: &[u8]) -> (TestElf, usize, usize) {
        let mut elf = TestElf::livepatch(text);
        let code = elf.section(".text.helper", SHF_ALLOC.0 | SHF_EXECINSTR.0, &[0xc3]);
        let data = elf.section(".data.counter", DATA, &[0; 8]);
        let helper = elf.symbol("helper", 2, code, 0, 1);
        let counter = elf.symbol("counter", 1, data, 0, 8);
        (elf, helper, counter)
    }

    #[test]
    fn calls_jumps_loads_and_stores_are_no_escapes() {
        // call helper; incq counter(%rip); mov counter(,%rax,8),%rdx; cmpl $1,counter(%rip); jne helper; jmp helper
        let (mut elf, helper, counter) = module(&[
            0xe8, 0, 0, 0, 0, 0x48, 0xff, 0x05, 0, 0, 0, 0, 0x48, 0x8b, 0x14, 0xc5, 0, 0, 0, 0, 0x83, 0x3d, 0, 0, 0, 0,
            1, 0x0f, 0x85, 0, 0, 0, 0, 0xe9, 0, 0, 0, 0,
        ]);
        elf.relocation(1, 1, R_X86_64_PLT32, helper, -4);
        elf.relocation(1, 8, R_X86_64_PC32, counter, -4);
        elf.relocation(1, 16, R_X86_64_32S, counter, 0);
        elf.relocation(1, 22, R_X86_64_PC32, counter, -5);
        elf.relocation(1, 29, R_X86_64_PC32, helper, -4);
        elf.relocation(1, 34, R_X86_64_PLT32, helper, -4);
        assert_eq!(escapes(&elf), [""; 0]);
    }

    #[test]
    fn an_address_in_a_register_on_the_stack_or_in_memory_escapes() {
        let forms: [(&[u8], u64, _, i64); 5] = [
            // mov $helper,%rsi; call add_timer
            (
                &[0x48, 0xc7, 0xc6, 0, 0, 0, 0, 0xe8, 0, 0, 0, 0, 0xc3],
                3,
                R_X86_64_32S,
                0,
            ),
            // lea helper(%rip),%rdi; ret
            (&[0x48, 0x8d, 0x3d, 0, 0, 0, 0, 0xc3], 3, R_X86_64_PC32, -4),
            // movabs $helper,%rax; ret
            (&[0x48, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0xc3], 2, R_X86_64_64, 0),
            // movq $helper,0x18(%rbx); ret
            (&[0x48, 0xc7, 0x43, 0x18, 0, 0, 0, 0, 0xc3], 4, R_X86_64_32S, 0),
            // push $helper; ret
            (&[0x68, 0, 0, 0, 0, 0xc3], 1, R_X86_64_32S, 0),
        ];
        for (text, at, kind, addend) in forms {
            let (mut elf, helper, _) = module(text);
            elf.relocation(1, at, kind, helper, addend);
            if text.len() == 13 {
                let add_timer = elf.undefined("add_timer");
                elf.relocation(1, 8, R_X86_64_PLT32, add_timer, -4);
            }
            assert_eq!(escapes(&elf), ["helper"], "{text:02x?}");
        }
    }

    #[test]
    fn an_address_that_the_assembler_has_resolved_escapes() {
        // lea new_f(%rip),%rdi; ret
        let elf = TestElf::livepatch(&[0x48, 0x8d, 0x3d, 0xf9, 0xff, 0xff, 0xff, 0xc3]);
        assert_eq!(escapes(&elf), ["new_f"]);
    }

    #[test]
    fn a_pointer_in_the_patchs_own_data_escapes() {
        // incq counter(%rip); ret
        let (mut elf, helper, counter) = module(&[0x48, 0xff, 0x05, 0, 0, 0, 0, 0xc3]);
        elf.relocation(1, 3, R_X86_64_PC32, counter, -4);
        assert_eq!(escapes(&elf), [""; 0]);
        elf.relocation(8, 0, R_X86_64_64, helper, 0);
        assert_eq!(escapes(&elf), ["helper"]);
    }

    #[test]
    fn pointers_in_the_livepatch_descriptors_do_not_escape() {
        // mov .data+0x10(%rip),%eax; ret: the section with the descriptors is placed for the sake of a variable in it
        let mut elf = TestElf::livepatch(&[0x8b, 0x05, 0, 0, 0, 0, 0xc3]);
        elf.relocation(1, 2, R_X86_64_PC32, 3, 0x10 - 4);
        assert_eq!(escapes(&elf), [""; 0]);
    }

    #[test]
    fn all_that_undecodable_code_refers_to_escapes() {
        // call helper; (no instruction)
        let (mut elf, helper, _) = module(&[0xe8, 0, 0, 0, 0, 0x06]);
        elf.relocation(1, 1, R_X86_64_PLT32, helper, -4);
        assert_eq!(escapes(&elf), ["helper"]);
    }

    #[test]
    fn a_replacement_of_an_alternative_counts_as_code() {
        // seven NOPs, or lea counter(%rip),%rdi; ret
        let (mut elf, _, counter) = module(&[0x90, 0x90, 0x90, 0x90, 0x90, 0x90, 0x90, 0xc3]);
        let flags = SHF_ALLOC.0 | SHF_EXECINSTR.0;
        let code = elf.section(".altinstr_replacement", flags, &[0x48, 0x8d, 0x3d, 0, 0, 0, 0]);
        let at = elf.section_symbol(code);
        let table = elf.section(".altinstructions", SHF_ALLOC.0, &[0, 0, 0, 0, 0, 0, 0, 0, 35, 0, 7, 7]);
        elf.relocation(table, 0, R_X86_64_PC32, 1, 0);
        elf.relocation(table, 4, R_X86_64_PC32, at, 0);
        elf.relocation(code, 3, R_X86_64_PC32, counter, -4);
        assert_eq!(escapes(&elf), ["counter"]);
    }

    #[test]
    fn names_beyond_the_limit_are_counted() {
        let (mut elf, _, counter) = module(&[0x48, 0xff, 0x05, 0, 0, 0, 0, 0xc3]);
        elf.relocation(1, 3, R_X86_64_PC32, counter, -4);
        elf.set_bytes(8, &[0; 8 * 18]);
        let code = elf.section(".text.many", SHF_ALLOC.0 | SHF_EXECINSTR.0, &[0xc3; 18]);
        for index in 0..18 {
            let function = elf.symbol(&format!("f{index:02}"), 2, code, index, 1);
            elf.relocation(8, 8 * index, R_X86_64_64, function, 0);
        }
        let found = escapes(&elf);
        assert_eq!(
            (found[0].as_str(), found[15].as_str(), found[16].as_str()),
            ("f00", "f15", "2 more")
        );
    }
}
