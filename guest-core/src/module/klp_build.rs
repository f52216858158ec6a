//! What a module of klp-build patches: `.init.klp_objects`, an array of `struct klp_object_ext`, each with its array of
//! `struct klp_func_ext` in `.init.klp_funcs`, from which the module's init makes a `klp_patch` at run time.
//!
//! Format: include/linux/livepatch_external.h and tools/objtool/klp-diff.c of Linux 7.2 (new in 6.19).

use super::patch::{FUNCTIONS_MAX, OBJECTS_MAX, callback};
use super::sections::{Section, SectionId, SectionOffset};
use super::{Patch, PatchError, PatchFormat, PatchFunction, PatchModule, PatchObject};

/// The objects.
pub(super) const OBJECTS: &str = ".init.klp_objects";
/// Bytes of a `klp_object_ext`: name, funcs, callbacks (four pointers and a bool), nr_funcs.
const OBJECT_BYTES: u64 = 64;
const FUNCS: u64 = 8;
const CALLBACKS: u64 = 16;
const NR_FUNCS: u64 = 56;
/// Bytes of a `klp_func_ext`: old_name, new_func, sympos.
const FUNC_BYTES: u64 = 24;
const NEW_FUNC: u64 = 8;
const SYMPOS: u64 = 16;

impl PatchModule<'_> {
    /// The patch that klp-build's tables describe.
    pub(super) fn klp_build(&self) -> Result<Patch, PatchError> {
        let Some((id, section)) = self.section_named(OBJECTS) else {
            return Err(PatchError::NoPatch);
        };
        let start = SectionOffset { section: id, offset: 0 };
        if section.size % OBJECT_BYTES != 0 {
            let found = format!("{} bytes", section.size);
            return Err(self.member("klp_object_ext", start, &found, "a whole number of 64 bytes"));
        }
        if section.size / OBJECT_BYTES > OBJECTS_MAX as u64 {
            return Err(PatchError::TooMany {
                what: "objects",
                max: OBJECTS_MAX,
            });
        }
        let mut objects = Vec::new();
        let mut left = FUNCTIONS_MAX;
        let mut at = start;
        while at.offset < section.size {
            let object = self.klp_build_object(id, section, at, left)?;
            left = left.saturating_sub(object.functions.len());
            objects.push(object);
            at = at.plus(OBJECT_BYTES);
        }
        Ok(Patch {
            objects,
            replace: None,
            format: PatchFormat::KlpBuild,
            this_module: None,
            descriptors: Vec::new(),
        })
    }

    fn klp_build_object(
        &self,
        id: SectionId,
        section: &Section<'_>,
        at: SectionOffset,
        max: usize,
    ) -> Result<PatchObject, PatchError> {
        let name = self.name_at("klp_object_ext.name", at)?;
        let callbacks = section.relocations_in(at.plus(CALLBACKS).offset, at.plus(NR_FUNCS).offset);
        if let Some(pointer) = callbacks.first() {
            let offset = pointer.offset;
            return Err(PatchError::Callback {
                object: name.unwrap_or("vmlinux".into()),
                callback: callback(offset.saturating_sub(at.plus(CALLBACKS).offset)),
                at: self.place(SectionOffset { section: id, offset }),
            });
        }
        let funcs = self.pointer("klp_object_ext.funcs", at.plus(FUNCS))?;
        let funcs = funcs.ok_or_else(|| self.member("klp_object_ext.funcs", at.plus(FUNCS), "null", "a pointer"))?;
        let count = self.number::<4>("klp_object_ext.nr_funcs", at.plus(NR_FUNCS))?;
        let count = usize::try_from(count).ok().filter(|count| *count <= max);
        let count = count.ok_or(PatchError::TooMany {
            what: "functions",
            max: FUNCTIONS_MAX,
        })?;
        let places = (0_u64..).map(|index| funcs.plus(index.saturating_mul(FUNC_BYTES)));
        let functions = places.take(count).map(|at| self.klp_build_function(at));
        Ok(PatchObject {
            name,
            functions: functions.collect::<Result<_, _>>()?,
        })
    }

    fn klp_build_function(&self, at: SectionOffset) -> Result<PatchFunction, PatchError> {
        let (new, size, symbol) = self.new_function("klp_func_ext.new_func", at.plus(NEW_FUNC))?;
        let old_name = self.name_at("klp_func_ext.old_name", at)?;
        Ok(PatchFunction {
            old_name: old_name.ok_or_else(|| self.member("klp_func_ext.old_name", at, "null", "a name"))?,
            sympos: self.number::<8>("klp_func_ext.sympos", at.plus(SYMPOS))?,
            new,
            size,
            symbol,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::module::testing::{KLP_6_1, TestElf};
    use object::elf::{R_X86_64_64, SHF_ALLOC, SHF_EXECINSTR};

    /// A function of vmlinux, and two of af_alg.
    fn klp_build() -> (TestElf, u16) {
        let mut elf = TestElf::new();
        let text = elf.section(".text", SHF_ALLOC.0 | SHF_EXECINSTR.0, &[0xc3; 24]);
        let strings = elf.section(".rodata.klp.str1.1", SHF_ALLOC.0, b"\0f\0g\0af_alg\0");
        let mut entries = vec![0; 72];
        entries[40] = 3;
        let funcs = elf.section(".init.klp_funcs", SHF_ALLOC.0, &entries);
        let mut entries = vec![0; 128];
        (entries[56], entries[64 + 56]) = (1, 2);
        let objects = elf.section(OBJECTS, SHF_ALLOC.0, &entries);
        elf.section(
            ".modinfo",
            SHF_ALLOC.0,
            b"livepatch=Y\0name=livepatch_x\0vermagic=7.2.0 SMP\0",
        );
        let [text, strings, funcs_symbol] = [text, strings, funcs].map(|section| elf.section_symbol(section));
        elf.relocation(objects, 8, R_X86_64_64, funcs_symbol, 0);
        elf.relocation(objects, 64, R_X86_64_64, strings, 5);
        elf.relocation(objects, 64 + 8, R_X86_64_64, funcs_symbol, 24);
        for (at, name) in [(0, 1), (24, 1), (48, 3)] {
            elf.relocation(funcs, at, R_X86_64_64, strings, name);
            let new = i64::try_from(at / 3).unwrap();
            elf.relocation(funcs, at + 8, R_X86_64_64, text, new);
        }
        elf.enable();
        (elf, objects)
    }

    fn patch(elf: &TestElf) -> Result<Patch, PatchError> {
        PatchModule::parse(&elf.build()).unwrap().patch(&KLP_6_1)
    }

    #[test]
    fn objects_and_functions_are_read() {
        let patch = patch(&klp_build().0).unwrap();
        assert_eq!(patch.format, PatchFormat::KlpBuild);
        let said: Vec<_> = patch
            .objects
            .iter()
            .map(|object| {
                let functions = object.functions.iter();
                let functions = functions.map(|f| (f.old_name.as_str(), f.sympos, f.new.offset));
                (object.name.as_deref(), functions.collect::<Vec<_>>())
            })
            .collect();
        let vmlinux = (None, vec![("f", 0, 0)]);
        assert_eq!(said, [vmlinux, (Some("af_alg"), vec![("f", 3, 8), ("g", 0, 16)])]);
    }

    #[test]
    fn a_callback_is_refused_with_its_object() {
        let (mut elf, objects) = klp_build();
        elf.relocation(objects, 64 + 24, R_X86_64_64, 1, 0);
        assert_eq!(
            patch(&elf),
            Err(PatchError::Callback {
                object: "af_alg".into(),
                callback: "post_patch".into(),
                at: ".init.klp_objects+0x58".into()
            })
        );
    }

    #[test]
    fn a_count_beyond_the_table_or_beyond_reason_is_refused() {
        let (mut elf, _) = klp_build();
        elf.named(OBJECTS).size -= 8;
        let error = patch(&elf).unwrap_err().to_string();
        assert!(error.contains("a whole number of 64 bytes"), "{error}");
        let (mut elf, objects) = klp_build();
        elf.patch_bytes(objects, 64 + 56, &[3]);
        let error = patch(&elf).unwrap_err().to_string();
        assert!(error.contains(".init.klp_funcs+0x50 is outside its section"), "{error}");
        elf.patch_bytes(objects, 64 + 56, &[0xff; 4]);
        assert!(matches!(patch(&elf), Err(PatchError::TooMany { .. })));
    }
}
