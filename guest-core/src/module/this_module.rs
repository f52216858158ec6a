//! The module's own `struct module`, to which code and data refer as `THIS_MODULE`. The file's section is not placed: vmpatch fills one in the guest
//! ([`PreparedModule`](crate::guest_module::PreparedModule)), and every reference means that one.

use super::flow::Code;
use super::layout::AreaKind;
use super::sections::{Relocation, SectionId, SectionOffset, SymbolPlace};
use super::{Image, PatchModule};
use object::elf::{R_X86_64_32, R_X86_64_32S, R_X86_64_64, R_X86_64_NONE, RelocationType};

/// Its section in the file. The only pointers in there lead to init and exit (include/linux/module.h).
pub(super) const SECTION: &str = ".gnu.linkonce.this_module";

/// A place in the guest's memory that refers to the patch's `struct module`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ThisModuleUse {
    /// The place of the reference: section and offset.
    pub at: String,
    /// Offset in the structure in bytes; `None` if it cannot be told.
    pub offset: Option<u64>,
}

impl PatchModule<'_> {
    /// Size of the module's `struct module` in bytes, as the module was compiled; `None` if the file has none.
    pub fn this_module_bytes(&self) -> Option<u64> {
        self.section_named(SECTION).map(|(_, section)| section.size)
    }

    /// Offsets of the pointers to init and exit in it, in bytes.
    pub fn this_module_pointers(&self) -> impl Iterator<Item = u64> {
        let section = self.section_named(SECTION).map(|(_, section)| section);
        let relocations = section.into_iter().flat_map(|section| &section.relocations);
        relocations.map(|relocation| relocation.offset)
    }

    /// True for a place in the module's `struct module`.
    pub(super) fn is_this_module(&self, at: SectionOffset) -> bool {
        self.section_name(at.section) == SECTION
    }
}

impl Image<'_, '_> {
    /// All references to the patch's `struct module`, without `klp_patch.mod`, which the guest does not read.
    pub fn this_module_uses(&self) -> Vec<ThisModuleUse> {
        let mut uses = Vec::new();
        for placed in &self.layout().sections {
            let Some(section) = self.module.section(placed.section) else {
                continue;
            };
            let found = section.relocations.iter().filter(|one| self.means_this_module(one));
            let found = found.map(|one| (place_of(placed.section, one), one));
            let found: Vec<_> = found.filter(|(at, _)| Some(*at) != self.patch.this_module).collect();
            if found.is_empty() {
                continue;
            }
            let code = matches!(placed.area, AreaKind::Text | AreaKind::Scratch)
                .then(|| Code::decode(self, placed.section, section, 0..section.size))
                .flatten();
            uses.extend(found.into_iter().map(|(at, relocation)| ThisModuleUse {
                at: self.module.place(at),
                offset: self.offset_in_this_module(relocation, code.as_ref()),
            }));
        }
        uses
    }

    fn means_this_module(&self, relocation: &Relocation) -> bool {
        let symbol = self.module.symbol(relocation);
        relocation.kind != R_X86_64_NONE.0
            && symbol.is_some_and(
                |symbol| matches!(symbol.place, SymbolPlace::Defined(at) if self.module.is_this_module(at)),
            )
    }

    fn offset_in_this_module(&self, relocation: &Relocation, code: Option<&Code<'_>>) -> Option<u64> {
        let is_address = matches!(
            RelocationType(relocation.kind),
            R_X86_64_64 | R_X86_64_32 | R_X86_64_32S
        );
        let bias = match code {
            _ if is_address => 0,
            Some(code) => relocation.bias(code.at(relocation.offset)?.next_ip()),
            None => return None,
        };
        self.module.target(relocation, bias).map(|target| target.offset)
    }
}

fn place_of(section: SectionId, relocation: &Relocation) -> SectionOffset {
    SectionOffset {
        section,
        offset: relocation.offset,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::module::testing::{ALT_6_1, BASES, KLP_6_1, TestElf, TestGuest};
    use object::elf::{R_X86_64_PC32, R_X86_64_PLT32, SHF_ALLOC, SHF_WRITE};

    /// Symbol 7 of [`TestElf::livepatch`].
    const THIS_MODULE: usize = 7;

    fn uses(elf: &TestElf) -> Vec<(String, Option<u64>)> {
        let file = elf.build();
        let module = PatchModule::parse(&file).unwrap();
        let patch = module.patch(&KLP_6_1).unwrap();
        let image = module.image(&patch, &ALT_6_1).unwrap();
        let places = image.layout().sections.iter().map(|placed| placed.name.as_str());
        assert!(places.into_iter().all(|name| name != SECTION));
        let uses = image.this_module_uses().into_iter();
        uses.map(|one| (one.at, one.offset)).collect()
    }

    /// mov $__this_module,%rdi; call try_module_get; cmpl $1,__this_module+4(%rip); ret
    fn code() -> TestElf {
        let text = [
            0x48, 0xc7, 0xc7, 0, 0, 0, 0, 0xe8, 0, 0, 0, 0, 0x83, 0x3d, 0, 0, 0, 0, 1, 0xc3,
        ];
        let mut elf = TestElf::livepatch(&text);
        let get = elf.undefined("try_module_get");
        elf.relocation(1, 3, R_X86_64_32S, THIS_MODULE, 0);
        elf.relocation(1, 8, R_X86_64_PLT32, get, -4);
        elf.relocation(1, 14, R_X86_64_PC32, THIS_MODULE, 4 - 5);
        elf
    }

    #[test]
    fn each_use_has_its_offset_in_the_structure() {
        let expected = [(".text+0x3", Some(0)), (".text+0xe", Some(4))];
        assert_eq!(uses(&code()), expected.map(|(at, offset)| (at.to_owned(), offset)));
    }

    #[test]
    fn a_use_that_cannot_be_understood_has_no_offset() {
        let mut elf = code();
        elf.patch_bytes(1, 19, &[0x06]);
        assert_eq!(uses(&elf)[1].1, None);
        // incq data(%rip); ret, and a distance in that data
        let mut elf = TestElf::livepatch(&[0x48, 0xff, 0x05, 0, 0, 0, 0, 0xc3]);
        let data = elf.section(".data.distance", SHF_ALLOC.0 | SHF_WRITE.0, &[0; 8]);
        let symbol = elf.section_symbol(data);
        elf.relocation(1, 3, R_X86_64_PC32, symbol, -4);
        elf.relocation(data, 0, R_X86_64_PC32, THIS_MODULE, 0);
        assert_eq!(uses(&elf), [(".data.distance+0x0".to_owned(), None)]);
    }

    #[test]
    fn references_lead_to_the_structure_in_the_guest() {
        let guest = TestGuest {
            exported: [("try_module_get", BASES.text.0 + 0x100)].into(),
            ..Default::default()
        };
        let linked = guest.link_text(&code().build(), &ALT_6_1);
        assert_eq!(linked[3..7], 0x8300_0400_u32.to_le_bytes());
        let distance = BASES.module.0 + 4 - (BASES.text.0 + 19);
        assert_eq!(linked[14..18], u32::try_from(distance).unwrap().to_le_bytes());
    }

    #[test]
    fn taking_a_reference_lets_nothing_escape_but_an_owner_in_data_does() {
        let escapes = |elf: &TestElf| {
            let file = elf.build();
            let module = PatchModule::parse(&file).unwrap();
            let patch = module.patch(&KLP_6_1).unwrap();
            module.image(&patch, &ALT_6_1).unwrap().escapes()
        };
        let mut elf = code();
        assert_eq!(escapes(&elf), [""; 0]);
        let data = elf.section(".data.operations", SHF_ALLOC.0 | SHF_WRITE.0, &[0; 8]);
        let symbol = elf.section_symbol(data);
        elf.relocation(data, 0, R_X86_64_64, THIS_MODULE, 0);
        elf.drop_relocation(1, 14);
        elf.relocation(1, 14, R_X86_64_PC32, symbol, -5);
        assert_eq!(escapes(&elf), ["__this_module"]);
    }
}
