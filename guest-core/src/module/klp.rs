//! The patch that a module describes: its `struct klp_patch`, found in the module's data and checked.
//!
//! The structures are the kernel's (include/linux/livepatch.h); their layouts come from the guest's BTF. In a module
//! file they are bytes with relocations for the pointers: see Documentation/livepatch/livepatch.rst, and
//! samples/livepatch/livepatch-sample.c for what such a module looks like.

use super::sections::{Relocation, Section, SectionOffset};
use super::{KlpLayout, Patch, PatchError, PatchFunction, PatchModule, PatchObject};
use object::elf::{R_X86_64_32S, R_X86_64_64, R_X86_64_PC32, R_X86_64_PLT32};

/// Most functions that one module may patch, over all its objects.
const FUNCTIONS_MAX: usize = 10_000;
/// Most objects.
const OBJECTS_MAX: usize = 1_000;
/// Longest function or object name, in bytes (`KSYM_NAME_LEN`, include/linux/kallsyms.h).
const NAME_BYTES_MAX: usize = 512;
/// Where other tools than a compiler keep what they patch.
const OTHER_FORMATS: [&str; 3] = [".kpatch.funcs", ".init.klp_funcs", ".init.klp_objects"];

impl PatchModule<'_> {
    /// Reads what the module patches.
    ///
    /// The `struct klp_patch` is the one place that holds the address of the module's own `struct module` and of
    /// objects, and that the code which calls `klp_enable_patch` refers to: without the first the kernel refuses the patch,
    /// without the second it never sees it.
    ///
    /// Errors: see [`PatchError`].
    pub fn patch(&self, layout: &KlpLayout) -> Result<Patch, PatchError> {
        if let Some(section) = OTHER_FORMATS
            .into_iter()
            .find(|name| self.section_named(name).is_some())
        {
            return Err(PatchError::Format { section });
        }
        let at = self.find_klp_patch(layout)?;
        if let Some(states) = layout.patch_states.map(|m| at.plus(m))
            && self.pointer("klp_patch.states", states)?.is_some()
        {
            return Err(PatchError::States { at: self.place(states) });
        }
        let replace = match layout.patch_replace.map(|m| at.plus(m)) {
            Some(member) => self.number::<1>("klp_patch.replace", member)? != 0,
            None => false,
        };
        let objs = at.plus(layout.patch_objs);
        let objs = self.pointer("klp_patch.objs", objs)?.ok_or(PatchError::NoPatch)?;
        let objects = self.objects(layout, objs)?;
        if objects.iter().all(|object| object.functions.is_empty()) {
            return Err(PatchError::Empty { at: self.place(at) });
        }
        Ok(Patch {
            objects,
            replace,
            descriptor: at,
            this_module: at.plus(layout.patch_mod),
        })
    }

    fn find_klp_patch(&self, layout: &KlpLayout) -> Result<SectionOffset, PatchError> {
        let enablers: Vec<&Section<'_>> = self
            .sections()
            .filter(|(_, s)| s.is_executable())
            .filter(|(_, s)| s.relocations.iter().any(|r| self.symbol_name(r) == "klp_enable_patch"))
            .map(|(_, s)| s)
            .collect();
        if enablers.is_empty() {
            return Err(PatchError::NotEnabled);
        }
        let mut found = None;
        for (id, section) in self.sections().filter(|(_, s)| s.is_writable()) {
            for relocation in section
                .relocations
                .iter()
                .filter(|r| self.symbol_name(r) == "__this_module")
            {
                let Some(offset) = relocation.offset.checked_sub(layout.patch_mod) else {
                    continue;
                };
                let at = SectionOffset { section: id, offset };
                let has_objects = section.relocation_at(at.plus(layout.patch_objs).offset).is_some();
                let fits = offset
                    .checked_add(layout.patch_size)
                    .is_some_and(|end| end <= section.size);
                if !has_objects || !fits || !enablers.iter().any(|s| self.refers_to(s, at)) {
                    continue;
                }
                if let Some(first) = found.replace(at) {
                    return Err(PatchError::SeveralPatches {
                        first: self.place(first),
                        second: self.place(at),
                    });
                }
            }
        }
        found.ok_or(PatchError::NoPatch)
    }

    /// True where code in `section` takes the address `at`.
    fn refers_to(&self, section: &Section<'_>, at: SectionOffset) -> bool {
        section.relocations.iter().any(|relocation| {
            // A 32-bit displacement is relative to its own end: the addend says 4 less than what is meant.
            let bias = match relocation.kind {
                kind if kind == R_X86_64_PC32.0 || kind == R_X86_64_PLT32.0 => 4,
                kind if kind == R_X86_64_32S.0 || kind == R_X86_64_64.0 => 0,
                _ => return false,
            };
            self.target(relocation, bias) == Some(at)
        })
    }

    fn objects(&self, layout: &KlpLayout, objs: SectionOffset) -> Result<Vec<PatchObject>, PatchError> {
        let mut objects = Vec::new();
        let mut functions = 0;
        for at in elements(objs, layout.object_size).take(OBJECTS_MAX) {
            let name = self.pointer("klp_object.name", at.plus(layout.object_name))?;
            let funcs = self.pointer("klp_object.funcs", at.plus(layout.object_funcs))?;
            // The array ends with an element that has neither (klp_for_each_object_static).
            if name.is_none() && funcs.is_none() {
                return Ok(objects);
            }
            let Some(funcs) = funcs else {
                return Err(self.member("klp_object.funcs", at.plus(layout.object_funcs), "null", "a pointer"));
            };
            let name = name.map(|name| self.text("klp_object.name", name)).transpose()?;
            self.refuse_callbacks(layout, at, name.as_deref())?;
            let found = self.functions(layout, funcs, FUNCTIONS_MAX - functions)?;
            functions += found.len();
            objects.push(PatchObject { name, functions: found });
        }
        Err(PatchError::TooMany {
            what: "objects",
            max: OBJECTS_MAX,
        })
    }

    fn functions(
        &self,
        layout: &KlpLayout,
        funcs: SectionOffset,
        max: usize,
    ) -> Result<Vec<PatchFunction>, PatchError> {
        let mut functions = Vec::new();
        // One more than allowed, for the element that ends the array.
        for at in elements(funcs, layout.func_size).take(max.saturating_add(1)) {
            let new_at = at.plus(layout.func_new_func);
            let old_name = self.pointer("klp_func.old_name", at.plus(layout.func_old_name))?;
            let new = self.pointer("klp_func.new_func", new_at)?;
            let sympos = self.number::<8>("klp_func.old_sympos", at.plus(layout.func_old_sympos))?;
            let (old_name, new) = match (old_name, new) {
                (None, None) if sympos == 0 => return Ok(functions),
                (Some(old_name), Some(new)) => (old_name, new),
                (None, _) => return Err(self.member("klp_func.old_name", at, "null", "a function's name")),
                (_, None) => return Err(self.member("klp_func.new_func", new_at, "null", "a function")),
            };
            let (size, symbol) = self.function_at(new).ok_or_else(|| {
                let found = self.place(new);
                self.member("klp_func.new_func", new_at, &found, "a function in executable code")
            })?;
            functions.push(PatchFunction {
                old_name: self.text("klp_func.old_name", old_name)?,
                sympos,
                new,
                size,
                symbol,
            });
        }
        Err(PatchError::TooMany {
            what: "functions",
            max: FUNCTIONS_MAX,
        })
    }

    fn refuse_callbacks(
        &self,
        layout: &KlpLayout,
        object: SectionOffset,
        name: Option<&str>,
    ) -> Result<(), PatchError> {
        let Some(callbacks) = layout.object_callbacks.map(|m| object.plus(m)) else {
            return Ok(());
        };
        let Some(section) = self.section(callbacks.section) else {
            return Ok(());
        };
        let end = callbacks.plus(layout.callbacks_size).offset;
        match section.relocations_in(callbacks.offset, end).first() {
            Some(relocation) => Err(PatchError::Callback {
                object: name.unwrap_or("vmlinux").into(),
                at: self.place(SectionOffset {
                    offset: relocation.offset,
                    ..callbacks
                }),
            }),
            None => Ok(()),
        }
    }

    /// Size and name of the function that begins at `at`; none where that is not code.
    fn function_at(&self, at: SectionOffset) -> Option<(u64, Option<String>)> {
        let section = self.section(at.section).filter(|s| s.is_executable())?;
        let rest = section.size.checked_sub(at.offset).filter(|rest| *rest > 0)?;
        Some(match self.elf.function_at(at) {
            Some(symbol) => (symbol.size.min(rest), Some(symbol.name.to_owned())),
            None => (rest, None),
        })
    }

    /// The place that a pointer at `at` will hold the address of; none for a null pointer.
    fn pointer(&self, member: &'static str, at: SectionOffset) -> Result<Option<SectionOffset>, PatchError> {
        let value = self.number::<8>(member, at)?;
        if value != 0 {
            return Err(self.member(
                member,
                at,
                &format!("{value:#x}"),
                "a pointer to this module's data, or null",
            ));
        }
        let Some(relocation) = self.section(at.section).and_then(|s| s.relocation_at(at.offset)) else {
            return Ok(None);
        };
        match self.target(relocation, 0).filter(|_| relocation.kind == R_X86_64_64.0) {
            Some(target) => Ok(Some(target)),
            None => Err(self.member(
                member,
                at,
                &self.describe(relocation),
                "a pointer to this module's data, or null",
            )),
        }
    }

    /// The little-endian number of `N` bytes, at most 8, at `at`.
    fn number<const N: usize>(&self, member: &'static str, at: SectionOffset) -> Result<u64, PatchError> {
        let bytes: [u8; N] = self
            .section(at.section)
            .and_then(|s| s.bytes(at.offset))
            .ok_or_else(|| self.member(member, at, "outside its section", "a whole structure"))?;
        Ok(bytes
            .iter()
            .rev()
            .fold(0, |value, byte| (value << 8) | u64::from(*byte)))
    }

    fn text(&self, member: &'static str, at: SectionOffset) -> Result<String, PatchError> {
        let bytes = self
            .section(at.section)
            .and_then(|s| s.data.get(usize::try_from(at.offset).ok()?..));
        let bytes = bytes.unwrap_or_default();
        let end = bytes.iter().take(NAME_BYTES_MAX).position(|byte| *byte == 0);
        let text = end
            .and_then(|end| std::str::from_utf8(bytes.get(..end)?).ok())
            .filter(|text| !text.is_empty());
        text.map(str::to_owned)
            .ok_or_else(|| self.member(member, at, "no text", "a name of 1 to 511 bytes"))
    }

    fn member(&self, member: &'static str, at: SectionOffset, found: &str, expected: &'static str) -> PatchError {
        PatchError::Member {
            member,
            at: self.place(at),
            found: found.into(),
            expected,
        }
    }

    fn describe(&self, relocation: &Relocation) -> String {
        format!(
            "a relocation of type {} against {}",
            relocation.kind,
            self.symbol_name(relocation)
        )
    }
}

/// Places of the elements of an array: `size` bytes each, from `start` on.
fn elements(start: SectionOffset, size: u64) -> impl Iterator<Item = SectionOffset> {
    (0_u64..).map(move |index| start.plus(index.saturating_mul(size)))
}
