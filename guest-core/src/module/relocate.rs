//! Applies x86-64 relocations, those that kernel modules use (`__apply_relocate_add` in arch/x86/kernel/module.c).

use super::LinkError;
use super::layout::AreaKind;
use super::link::Linker;
use super::sections::{Relocation, SectionOffset, SymbolPlace};
use object::elf::{
    R_X86_64_32, R_X86_64_32S, R_X86_64_64, R_X86_64_NONE, R_X86_64_PC32, R_X86_64_PC64, R_X86_64_PLT32, RelocationType,
};

/// How a relocation type stores a value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Form {
    name: &'static str,
    /// Bytes stored.
    width: usize,
    /// True if the stored value is the distance from the place itself.
    relative: bool,
    /// True if the stored bytes are sign-extended, false if they are zero-extended.
    signed: bool,
}

/// The form of a relocation type; `None` for types that no kernel module uses.
fn form(kind: u32) -> Option<Form> {
    let (name, width, relative, signed) = match RelocationType(kind) {
        R_X86_64_64 => ("R_X86_64_64", 8, false, true),
        R_X86_64_PC64 => ("R_X86_64_PC64", 8, true, true),
        R_X86_64_32 => ("R_X86_64_32", 4, false, false),
        R_X86_64_32S => ("R_X86_64_32S", 4, false, true),
        R_X86_64_PC32 => ("R_X86_64_PC32", 4, true, true),
        R_X86_64_PLT32 => ("R_X86_64_PLT32", 4, true, true),
        _ => return None,
    };
    Some(Form {
        name,
        width,
        relative,
        signed,
    })
}

impl Form {
    /// The bytes to store for `value`, an address or distance modulo 2^64; `None` if they cannot hold it.
    fn encode(self, value: u64) -> Option<Vec<u8>> {
        let fits = match (self.width, self.signed) {
            (8, _) => true,
            (_, true) => i32::try_from(value.cast_signed()).is_ok(),
            (_, false) => u32::try_from(value).is_ok(),
        };
        fits.then(|| value.to_le_bytes().into_iter().take(self.width).collect())
    }
}

impl Linker<'_, '_, '_> {
    /// Applies all relocations of placed sections. In the section that alternatives copy from, only those of
    /// replacements for placed code: others may refer to what is not placed.
    pub(super) fn relocate(&mut self) -> Result<(), LinkError> {
        let module = self.image.module;
        for placed in self
            .image
            .layout()
            .sections
            .iter()
            .filter(|placed| placed.area != AreaKind::Scratch)
        {
            let Some(section) = module.section(placed.section) else {
                continue;
            };
            for relocation in &section.relocations {
                self.apply(
                    SectionOffset {
                        section: placed.section,
                        offset: relocation.offset,
                    },
                    relocation,
                )?;
            }
        }
        let mut done = std::collections::BTreeSet::new();
        for alternative in &self.image.alternatives {
            let Some(from) = alternative.replacement else {
                continue;
            };
            let Some(section) = module.section(from.section) else {
                continue;
            };
            for relocation in section.relocations_in(from.offset, from.plus(alternative.replacement_len.into()).offset)
            {
                let at = SectionOffset {
                    section: from.section,
                    offset: relocation.offset,
                };
                // Entries may share a replacement.
                if done.insert(at) {
                    self.apply(at, relocation)?;
                }
            }
        }
        Ok(())
    }

    fn apply(&mut self, at: SectionOffset, relocation: &Relocation) -> Result<(), LinkError> {
        if relocation.kind == R_X86_64_NONE.0 || Some(at) == self.image.patch.this_module {
            return Ok(());
        }
        if let Some(SymbolPlace::Livepatch { object, .. }) =
            self.image.module.symbol(relocation).map(|symbol| symbol.place)
            && self.guest.pending.iter().any(|pending| pending == object)
        {
            return Ok(());
        }
        let bytes = self.relocated(at, relocation, self.address(at)?)?;
        // Other bytes than zeroes mean two relocations in one place, or a damaged file.
        let found = self.bytes(at, bytes.len())?;
        if found.iter().any(|byte| *byte != 0) {
            return Err(LinkError::NotZero {
                at: self.image.module.place(at),
                symbol: self.image.module.symbol_name(relocation).into(),
                found: found.to_vec(),
            });
        }
        self.write(at, &bytes)
    }

    /// The bytes of a relocation at `at` in the file for the address `place`.
    pub(super) fn relocated(
        &mut self,
        at: SectionOffset,
        relocation: &Relocation,
        place: u64,
    ) -> Result<Vec<u8>, LinkError> {
        let module = self.image.module;
        let symbol = module.symbol_name(relocation);
        let form = form(relocation.kind).ok_or_else(|| LinkError::RelocationKind {
            at: module.place(at),
            kind: relocation.kind,
            symbol: symbol.into(),
        })?;
        let target = match self.bug_target(at, relocation)? {
            Some(row) => row,
            None => self
                .symbol_address(at, relocation)?
                .wrapping_add_signed(relocation.addend),
        };
        let value = if form.relative {
            target.wrapping_sub(place)
        } else {
            target
        };
        form.encode(value).ok_or_else(|| LinkError::Overflow {
            at: module.place(at),
            place,
            kind: form.name,
            symbol: symbol.into(),
            target,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signed_field_holds_the_top_two_gibibytes_and_the_bottom_two() {
        let field = form(R_X86_64_32S.0).unwrap();
        assert_eq!(field.encode(0xffff_ffff_8100_0000), Some(vec![0, 0, 0, 0x81]));
        assert_eq!(field.encode(0x7fff_ffff), Some(vec![0xff, 0xff, 0xff, 0x7f]));
        assert_eq!(field.encode(0x8000_0000), None);
        assert_eq!(field.encode(0xffff_8880_0000_0000), None);
    }

    #[test]
    fn an_unsigned_field_holds_the_bottom_four_gibibytes_only() {
        let field = form(R_X86_64_32.0).unwrap();
        assert_eq!(field.encode(0xffff_ffff), Some(vec![0xff; 4]));
        assert_eq!(field.encode(0xffff_ffff_8100_0000), None);
    }

    #[test]
    fn types_that_need_a_got_are_refused() {
        assert_eq!(form(object::elf::R_X86_64_GOTPCREL.0), None);
    }
}
