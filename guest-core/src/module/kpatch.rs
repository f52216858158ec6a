//! What a module of kpatch-build patches: `.kpatch.funcs`, an array of `struct kpatch_patch_func`, from which the module's
//! init makes a `klp_patch` at run time.
//!
//! Format: kmod/patch/kpatch-patch.h and kmod/patch/kpatch.lds.S of kpatch 0.9.10 and 0.9.11; the same 56 bytes since 0.3.3,
//! before which there was no `sympos`.

use super::patch::{FUNCTIONS_MAX, group};
use super::sections::{Section, SectionId, SectionOffset};
use super::{Patch, PatchError, PatchFormat, PatchFunction, PatchModule};

/// The functions.
pub(super) const FUNCS: &str = ".kpatch.funcs";
/// Bytes of a `kpatch_patch_func`: new_addr, new_size, old_addr, old_size, sympos, name, objname.
const FUNC_BYTES: u64 = 56;
const SYMPOS: u64 = 32;
const NAME: u64 = 40;
const OBJNAME: u64 = 48;
/// Callbacks: a function and an object's name each, and eight zero bytes behind the last.
const CALLBACKS: &str = ".kpatch.callbacks.";
/// Bytes of a callback.
const CALLBACK_BYTES: u64 = 16;
/// What `create-klp-module` turns into livepatch relocations and removes, and what only kpatch's own module reads.
const UNFINISHED: [&str; 4] = [
    ".kpatch.relocations",
    ".kpatch.symbols",
    ".kpatch.arch",
    ".kpatch.dynrelas",
];

impl PatchModule<'_> {
    /// The patch that kpatch-build's tables describe.
    pub(super) fn kpatch(&self) -> Result<Patch, PatchError> {
        if let Some(section) = UNFINISHED.into_iter().find(|name| self.section_named(name).is_some()) {
            return Err(PatchError::Unfinished { section });
        }
        let Some((id, section)) = self.section_named(FUNCS) else {
            return Err(PatchError::NoPatch);
        };
        self.refuse_kpatch_callbacks()?;
        let start = SectionOffset { section: id, offset: 0 };
        if section.size % FUNC_BYTES != 0 {
            let found = format!("{} bytes", section.size);
            return Err(self.member("kpatch_patch_func", start, &found, "a whole number of 56 bytes"));
        }
        if section.size / FUNC_BYTES > FUNCTIONS_MAX as u64 {
            return Err(PatchError::TooMany {
                what: "functions",
                max: FUNCTIONS_MAX,
            });
        }
        let mut functions = Vec::new();
        let mut at = start;
        while at.offset < section.size {
            functions.push(self.kpatch_function(at)?);
            at = at.plus(FUNC_BYTES);
        }
        Ok(Patch {
            objects: group(functions),
            replace: None,
            format: PatchFormat::Kpatch,
            this_module: None,
            descriptors: Vec::new(),
        })
    }

    fn kpatch_function(&self, at: SectionOffset) -> Result<(Option<String>, PatchFunction), PatchError> {
        let (new, size, symbol) = self.new_function("kpatch_patch_func.new_addr", at)?;
        let name = |member, offset| {
            let found = self.name_at(member, at.plus(offset))?;
            found.ok_or_else(|| self.member(member, at.plus(offset), "null", "a name"))
        };
        let object = name("kpatch_patch_func.objname", OBJNAME)?;
        let function = PatchFunction {
            old_name: name("kpatch_patch_func.name", NAME)?,
            sympos: self.number::<8>("kpatch_patch_func.sympos", at.plus(SYMPOS))?,
            new,
            size,
            symbol,
        };
        Ok(((object != "vmlinux").then_some(object), function))
    }

    fn refuse_kpatch_callbacks(&self) -> Result<(), PatchError> {
        let sections = self
            .sections()
            .filter(|(_, section)| section.name.starts_with(CALLBACKS));
        for (id, section) in sections {
            if let Some(at) = first_use(id, section) {
                let entry = SectionOffset {
                    offset: at.offset - at.offset % CALLBACK_BYTES,
                    ..at
                };
                let object = self.name_at("callback's objname", entry.plus(8));
                return Err(PatchError::Callback {
                    object: object.ok().flatten().unwrap_or("of no name".into()),
                    callback: section.name.trim_start_matches(CALLBACKS).to_owned(),
                    at: self.place(at),
                });
            }
        }
        Ok(())
    }
}

/// The first place in a section that is not empty: a relocation, or a byte that is not zero.
fn first_use(id: SectionId, section: &Section<'_>) -> Option<SectionOffset> {
    let relocated = section.relocations.first().map(|relocation| relocation.offset);
    let byte = section.data.iter().position(|byte| *byte != 0);
    let byte = byte.and_then(|at| u64::try_from(at).ok());
    let offset = relocated.into_iter().chain(byte).min()?;
    Some(SectionOffset { section: id, offset })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::module::testing::{KLP_6_1, TestElf};
    use object::elf::{R_X86_64_64, SHF_ALLOC, SHF_EXECINSTR, SHF_WRITE};

    const STRINGS: &[u8] = b"f\0vmlinux\0g\0af_alg\0";
    /// Name, object's name and position, as offsets in [`STRINGS`].
    const FUNCTIONS: [(i64, i64, u64); 3] = [(0, 2, 0), (10, 12, 2), (10, 2, 0)];

    /// Two functions of vmlinux, and in between one of af_alg, as kpatch-build leaves them.
    fn kpatch() -> (TestElf, u16) {
        kpatch_enabled_after(&[])
    }

    /// The same with an init that executes `code` first.
    fn kpatch_enabled_after(code: &[u8]) -> (TestElf, u16) {
        let mut elf = TestElf::new();
        let text = elf.section(".text.f", SHF_ALLOC.0 | SHF_EXECINSTR.0, &[0xc3; 24]);
        let strings = elf.section(".kpatch.strings", SHF_ALLOC.0, STRINGS);
        let mut entries = Vec::new();
        for (_, _, sympos) in FUNCTIONS {
            // new_size, old_addr and old_size are for kpatch's own module and for people.
            for word in [0, 8, 0xffff_ffff_8123_4560, 100, sympos, 0, 0] {
                entries.extend(word.to_le_bytes());
            }
        }
        let funcs = elf.section(".kpatch.funcs", SHF_ALLOC.0, &entries);
        elf.section(".kpatch.callbacks.pre_patch", SHF_ALLOC.0 | SHF_WRITE.0, &[0; 8]);
        elf.section(".kpatch.force", SHF_ALLOC.0 | SHF_WRITE.0, &[0; 8]);
        elf.section(
            ".modinfo",
            SHF_ALLOC.0,
            b"livepatch=Y\0name=livepatch_x\0vermagic=6.1.0 SMP\0",
        );
        let text_symbol = elf.section_symbol(text);
        let strings_symbol = elf.section_symbol(strings);
        elf.symbol("f", 2, text, 0, 8);
        for (at, (name, object, _)) in (0_u64..).step_by(56).zip(FUNCTIONS) {
            let new = i64::try_from(at / 56 * 8).unwrap();
            elf.relocation(funcs, at, R_X86_64_64, text_symbol, new);
            elf.relocation(funcs, at + 40, R_X86_64_64, strings_symbol, name);
            elf.relocation(funcs, at + 48, R_X86_64_64, strings_symbol, object);
        }
        elf.enable_after(code);
        (elf, funcs)
    }

    fn patch(elf: &TestElf) -> Result<Patch, PatchError> {
        PatchModule::parse(&elf.build()).unwrap().patch(&KLP_6_1)
    }

    #[test]
    fn replace_is_the_constant_that_init_writes() {
        // movb $1,24(%rax); movb $0,24(%rax); movb $1,25(%rax); mov %cl,24(%rax); movq $1,24(%rax)
        let (yes, no) = ([0xc6, 0x40, 24, 1].as_slice(), [0xc6, 0x40, 24, 0].as_slice());
        let (beside, computed, wider) = (
            [0xc6, 0x40, 25, 1],
            [0x88, 0x48, 24],
            [0x48, 0xc7, 0x40, 24, 1, 0, 0, 0],
        );
        for (code, replace) in [
            (yes.to_vec(), Some(true)),
            (no.to_vec(), Some(false)),
            (beside.to_vec(), Some(false)),
            (wider.to_vec(), Some(false)),
            (computed.to_vec(), None),
            ([yes, no].concat(), None),
        ] {
            let (elf, _) = kpatch_enabled_after(&code);
            assert_eq!(patch(&elf).unwrap().replace, replace, "{code:x?}");
        }
    }

    #[test]
    fn functions_are_read_and_grouped_by_their_object() {
        let patch = patch(&kpatch().0).unwrap();
        assert_eq!((patch.format, patch.replace), (PatchFormat::Kpatch, Some(false)));
        let said: Vec<_> = patch
            .objects
            .iter()
            .map(|object| {
                let functions = object.functions.iter();
                let functions = functions.map(|f| (f.old_name.as_str(), f.sympos, f.new.offset));
                (object.name.as_deref(), functions.collect::<Vec<_>>())
            })
            .collect();
        let vmlinux = (None, vec![("f", 0, 0), ("g", 0, 16)]);
        assert_eq!(said, [vmlinux, (Some("af_alg"), vec![("g", 2, 8)])]);
        assert_eq!(patch.objects[0].functions[0].size, 8);
    }

    #[test]
    fn a_callback_is_refused_with_its_object() {
        let (mut elf, _) = kpatch();
        let callbacks = elf.section(".kpatch.callbacks.post_unpatch", SHF_ALLOC.0 | SHF_WRITE.0, &[0; 24]);
        elf.relocation(callbacks, 0, R_X86_64_64, 1, 0);
        elf.relocation(callbacks, 8, R_X86_64_64, 2, 12);
        assert_eq!(
            patch(&elf),
            Err(PatchError::Callback {
                object: "af_alg".into(),
                callback: "post_unpatch".into(),
                at: ".kpatch.callbacks.post_unpatch+0x0".into()
            })
        );
    }

    #[test]
    fn a_table_cut_short_or_with_a_null_name_is_refused() {
        let (mut elf, funcs) = kpatch();
        elf.set_bytes(funcs, &[0; 50]);
        let error = patch(&elf).unwrap_err().to_string();
        assert!(error.contains("50 bytes"), "{error}");
        let (mut elf, funcs) = kpatch();
        elf.drop_relocation(funcs, 40);
        let error = patch(&elf).unwrap_err().to_string();
        assert!(
            error.contains("kpatch_patch_func.name at .kpatch.funcs+0x28 is null"),
            "{error}"
        );
        elf.relocation(funcs, 40, R_X86_64_64, 2, 1 << 24);
        let error = patch(&elf).unwrap_err().to_string();
        assert!(error.contains("kpatch_patch_func.name"), "{error}");
    }

    #[test]
    fn a_module_that_kpatch_build_has_not_finished_is_refused() {
        let (mut elf, _) = kpatch();
        elf.section(".kpatch.relocations", SHF_ALLOC.0, &[0; 8]);
        let section = ".kpatch.relocations";
        assert_eq!(patch(&elf), Err(PatchError::Unfinished { section }));
    }
}
