//! Selects the sections that a patch needs: those of its functions, and all that they refer to, directly or through others.

use super::alternatives::Alternative;
use super::image::{ImageError, Undefined};
use super::instruction_tables::Rows;
use super::jump_table::JumpRows;
use super::layout::AreaKind;
use super::section_policy::{SectionAction, action, bars};
use super::sections::{Relocation, SectionId, SectionOffset, SymbolId, SymbolPlace};
use super::sites::TableError;
use super::{Patch, PatchModule};
use object::elf::{R_X86_64_NONE, SHN_COMMON};
use std::collections::{BTreeMap, VecDeque};

/// The sections that were found to be needed so far, and those whose references must still be followed.
pub(super) struct Selection<'m, 'd> {
    module: &'m PatchModule<'d>,
    patch: &'m Patch,
    /// The alternatives, by the section that their site is in.
    alternatives: BTreeMap<SectionId, Vec<Alternative>>,
    fixups: &'m Rows,
    bugs: &'m Rows,
    jump_rows: &'m JumpRows,
    /// The layout of what goes into the guest.
    pub(super) needed: BTreeMap<SectionId, AreaKind>,
    queue: VecDeque<SectionId>,
    /// The symbols that the guest must provide for it.
    pub(super) undefined: BTreeMap<SymbolId, Undefined>,
}

impl<'m, 'd> Selection<'m, 'd> {
    pub(super) fn new(
        module: &'m PatchModule<'d>,
        patch: &'m Patch,
        alternatives: &[Alternative],
        [fixups, bugs]: [&'m Rows; 2],
        jump_rows: &'m JumpRows,
    ) -> Self {
        let mut by_section: BTreeMap<SectionId, Vec<Alternative>> = BTreeMap::new();
        for alternative in alternatives {
            by_section
                .entry(alternative.site.section)
                .or_default()
                .push(*alternative);
        }
        Self {
            module,
            patch,
            alternatives: by_section,
            fixups,
            bugs,
            jump_rows,
            needed: BTreeMap::new(),
            queue: VecDeque::new(),
            undefined: BTreeMap::new(),
        }
    }

    /// Follows all references from the needed sections, until no new section is found. Each section is visited once.
    pub(super) fn close(&mut self) -> Result<(), ImageError> {
        while let Some(id) = self.queue.pop_front() {
            let Some(section) = self.module.section(id) else {
                continue;
            };
            for relocation in &section.relocations {
                self.follow(id, relocation)?;
            }
            for table in [self.fixups, self.bugs] {
                for (from, relocation) in table.references(self.module, id) {
                    self.follow(from, relocation)?;
                }
            }
            for (from, relocation) in self.jump_rows.references(self.module, id) {
                self.follow(from, relocation)?;
            }
            // A replacement is only needed if it may be copied into needed code.
            for alternative in self.alternatives.remove(&id).unwrap_or_default() {
                let Some(replacement) = alternative.replacement else {
                    continue;
                };
                let Some(section) = self.module.section(replacement.section) else {
                    continue;
                };
                let area = action(section);
                if area != SectionAction::CopyTo(AreaKind::Scratch) {
                    let found = format!("a replacement in {}", section.name);
                    let table = self.module.section_name(alternative.entry.section);
                    return Err(TableError::named(
                        table,
                        alternative.entry.offset,
                        found,
                        "one in .altinstr_replacement",
                    )
                    .into());
                }
                self.needed.insert(replacement.section, AreaKind::Scratch);
                let end = replacement.plus(alternative.replacement_len.into()).offset;
                for relocation in section.relocations_in(replacement.offset, end) {
                    self.follow(replacement.section, relocation)?;
                }
            }
        }
        Ok(())
    }

    /// Adds what a relocation in a needed section refers to.
    fn follow(&mut self, from: SectionId, relocation: &Relocation) -> Result<(), ImageError> {
        if relocation.kind == R_X86_64_NONE.0 {
            return Ok(());
        }
        let at = SectionOffset {
            section: from,
            offset: relocation.offset,
        };
        let module = self.module;
        let Some(symbol) = module.symbol(relocation) else {
            return Ok(());
        };
        let (object, weak) = match symbol.place {
            SymbolPlace::Absolute(_) => return Ok(()),
            // `klp_patch.mod`: the guest does not read the descriptor.
            SymbolPlace::Defined(_) if Some(at) == self.patch.this_module => return Ok(()),
            // The guest gets a `struct module` that vmpatch fills, not the file's.
            SymbolPlace::Defined(target) if module.is_this_module(target) => return Ok(()),
            SymbolPlace::Defined(target) => {
                let bugs = self.bugs;
                let row = bugs.referred(module, at, relocation)?.and_then(|row| bugs.site(row));
                let needed = row.unwrap_or(target);
                let section = module.section_name(needed.section);
                if let Some(reason) = bars(section, module.section_name(from)) {
                    return Err(ImageError::NotPlaced {
                        needed_by: module.place(at),
                        symbol: symbol.name.to_owned(),
                        section: section.to_owned(),
                        reason,
                    });
                }
                return self.need(needed.section, symbol.name, || module.place(at));
            }
            SymbolPlace::Undefined { weak } => (None, weak),
            SymbolPlace::Livepatch { object, sympos, .. } => (Some((object.to_owned(), sympos)), false),
            SymbolPlace::Common => return Err(self.symbol_kind(at, symbol.name, SHN_COMMON.0)),
            SymbolPlace::Unknown(index) => return Err(self.symbol_kind(at, symbol.name, index)),
        };
        let name = match symbol.place {
            SymbolPlace::Livepatch { name, .. } => name,
            _ => symbol.name,
        };
        self.undefined.entry(relocation.symbol).or_insert_with(|| Undefined {
            name: name.to_owned(),
            object,
            weak,
            needed_by: module.place(at),
        });
        Ok(())
    }

    /// Adds a needed section. Refuses one that cannot be placed.
    pub(super) fn need(
        &mut self,
        id: SectionId,
        symbol: &str,
        needed_by: impl Fn() -> String,
    ) -> Result<(), ImageError> {
        if self.needed.get(&id).is_some_and(|area| *area != AreaKind::Scratch) {
            return Ok(());
        }
        let refuse = |reason| ImageError::NotPlaced {
            needed_by: needed_by(),
            symbol: symbol.to_owned(),
            section: self.module.section_name(id).to_owned(),
            reason,
        };
        let Some(section) = self.module.section(id) else {
            return Err(refuse("empty, or not loaded by the kernel either"));
        };
        match action(section) {
            SectionAction::CopyTo(AreaKind::Scratch) => Err(refuse("it is only copied from")),
            SectionAction::Process => Err(refuse("it is a table for the loader")),
            SectionAction::Drop(reason) => Err(refuse(reason)),
            SectionAction::Refuse(reason) => Err(ImageError::UnsupportedSection {
                section: section.name.into(),
                concerns: needed_by(),
                reason,
            }),
            SectionAction::CopyTo(area) => {
                self.needed.insert(id, area);
                self.queue.push_back(id);
                Ok(())
            }
        }
    }

    /// Refuses unhandled sections that concern a needed section.
    pub(super) fn refuse_unhandled(&self) -> Result<(), ImageError> {
        for (_, section) in self.module.sections() {
            let SectionAction::Refuse(reason) = action(section) else {
                continue;
            };
            let concerned = section.relocations.iter().find_map(|relocation| {
                let SymbolPlace::Defined(at) = self.module.symbol(relocation)?.place else {
                    return None;
                };
                let target = self.module.target(relocation, 0).unwrap_or(at);
                self.needed.contains_key(&at.section).then_some(target)
            });
            if let Some(target) = concerned {
                let concerns = self.module.place(target);
                return Err(ImageError::UnsupportedSection {
                    section: section.name.into(),
                    concerns,
                    reason,
                });
            }
        }
        Ok(())
    }

    fn symbol_kind(&self, at: SectionOffset, symbol: &str, index: u16) -> ImageError {
        ImageError::SymbolKind {
            needed_by: self.module.place(at),
            symbol: symbol.into(),
            index,
        }
    }
}
