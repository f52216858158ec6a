//! The patch that a module describes: its `struct klp_patch`, found in the module's data and checked.
//!
//! The structures are the kernel's (include/linux/livepatch.h); their layouts come from the guest's BTF. In a module
//! file they are bytes with relocations for the pointers: see Documentation/livepatch/livepatch.rst, and
//! samples/livepatch/livepatch-sample.c for what such a module looks like.

use super::patch::{FUNCTIONS_MAX, OBJECTS_MAX, callback};
use super::sections::{Section, SectionOffset};
use super::{KlpLayout, Patch, PatchError, PatchFormat, PatchFunction, PatchModule, PatchObject};
use object::elf::{R_X86_64_32S, R_X86_64_64, R_X86_64_PC32, R_X86_64_PLT32};

impl PatchModule<'_> {
    /// The patch that static `klp_patch` structures describe.
    ///
    /// The `struct klp_patch` is the one place that holds the address of the module's own `struct module` and of
    /// objects, and that the code which calls `klp_enable_patch` refers to: without the first the kernel refuses the patch,
    /// without the second it never sees it.
    pub(super) fn klp_patch(&self, layout: &KlpLayout) -> Result<Patch, PatchError> {
        let at = self.find_klp_patch(layout)?;
        if let Some(states) = layout.patch_states.map(|m| at.plus(m))
            && self.pointer("klp_patch.states", states)?.is_some()
        {
            return Err(PatchError::States { at: self.place(states) });
        }
        let replace = match layout.patch_replace.map(|m| at.plus(m)) {
            Some(member) => Some(self.number::<1>("klp_patch.replace", member)? != 0),
            None => None,
        };
        let objs = at.plus(layout.patch_objs);
        let objs = self.pointer("klp_patch.objs", objs)?.ok_or(PatchError::NoPatch)?;
        let mut descriptors = vec![(at, layout.patch_size)];
        let objects = self.objects(layout, objs, &mut descriptors)?;
        Ok(Patch {
            objects,
            replace,
            format: PatchFormat::KlpPatch,
            this_module: Some(at.plus(layout.patch_mod)),
            descriptors,
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

    /// The objects from `objs` on; where their structures lie is added to `descriptors`.
    fn objects(
        &self,
        layout: &KlpLayout,
        objs: SectionOffset,
        descriptors: &mut Vec<(SectionOffset, u64)>,
    ) -> Result<Vec<PatchObject>, PatchError> {
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
            descriptors.push((at, layout.object_size));
            descriptors.push((funcs, layout.func_size.saturating_mul(found.len() as u64)));
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
            let old_name = self.name_at("klp_func.old_name", at.plus(layout.func_old_name))?;
            let sympos = self.number::<8>("klp_func.old_sympos", at.plus(layout.func_old_sympos))?;
            let Some(old_name) = old_name else {
                // Neither a name nor a function: the element that ends the array.
                if sympos == 0 && self.pointer("klp_func.new_func", new_at)?.is_none() {
                    return Ok(functions);
                }
                return Err(self.member("klp_func.old_name", at, "null", "a function's name"));
            };
            let (new, size, symbol) = self.new_function("klp_func.new_func", new_at)?;
            functions.push(PatchFunction {
                old_name,
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
                callback: callback(relocation.offset.saturating_sub(callbacks.offset)),
                at: self.place(SectionOffset {
                    offset: relocation.offset,
                    ..callbacks
                }),
            }),
            None => Ok(()),
        }
    }
}

/// Places of the elements of an array: `size` bytes each, from `start` on.
fn elements(start: SectionOffset, size: u64) -> impl Iterator<Item = SectionOffset> {
    (0_u64..).map(move |index| start.plus(index.saturating_mul(size)))
}
