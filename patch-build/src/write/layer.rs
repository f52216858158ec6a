//! Lays what was selected into the sections of a module.

use std::collections::BTreeMap;

use object::elf::{self, R_X86_64_NONE};

use super::output::{Kind, Output};
use crate::compare::tables::{Entry, ORC};
use crate::elf::{At, Place, Relocation, Section, Symbol};
use crate::select::{Chosen, Piece, Reference, Resolver, SelectError, Selection, Side};

/// Functions keep at least so far from each other, in bytes: the end of one, where unwinding data ends, is no other's start.
const FUNCTION_GAP: u64 = 1;
/// What functions start at a multiple of, in bytes, as the compiler has it.
const FUNCTION_ALIGN: u64 = 16;

/// Lays a selection out.
pub(crate) struct Layer<'s, 'k> {
    resolver: Resolver<'s, 'k>,
    /// True for a patch of several objects, one of which may not be loaded.
    is_of_several: bool,
    pub output: Output,
    items: BTreeMap<Chosen, (At, usize)>,
    pieces: BTreeMap<Piece, At>,
    /// Entries of tables, by what they are about and where they are in the file.
    entries: BTreeMap<(Chosen, At), At>,
    /// What remains to be relocated: where from, where to, whether it is of a table, and whose it is.
    work: Vec<Work>,
}

struct Work {
    from: Piece,
    to: At,
    in_table: bool,
    by: String,
}

impl<'s, 'k> Layer<'s, 'k> {
    pub fn new(resolver: Resolver<'s, 'k>) -> Self {
        let first = resolver.sides.first().map(|side| side.shipped.name());
        Self {
            is_of_several: resolver.sides.iter().any(|side| Some(side.shipped.name()) != first),
            resolver,
            output: Output::new(),
            items: BTreeMap::new(),
            pieces: BTreeMap::new(),
            entries: BTreeMap::new(),
            work: Vec::new(),
        }
    }

    /// Lays out all that is carried.
    ///
    /// Errors: those of selecting, which would have come up there.
    pub fn lay(&mut self, selection: &Selection) -> Result<(), SelectError> {
        for chosen in selection.carried.keys() {
            self.lay_item(*chosen);
        }
        for chosen in selection.carried.keys() {
            self.lay_entries(*chosen)?;
        }
        // Relocating may need pieces without names, which have relocations in turn.
        while let Some(work) = self.work.pop() {
            self.relocate(&work)?;
        }
        for section in &mut self.output.object.sections {
            section.relocations.sort_by_key(|relocation| relocation.offset);
        }
        Ok(())
    }

    /// Index of the symbol of something that is carried.
    pub fn symbol(&self, chosen: Chosen) -> Option<usize> {
        self.items.get(&chosen).map(|(_, symbol)| *symbol)
    }

    fn lay_item(&mut self, chosen: Chosen) {
        let sides = self.resolver.sides;
        let Some(side) = sides.get(chosen.0) else { return };
        let unit = &side.comparison.after;
        let item = unit.item(chosen.1);
        let section = unit.section_of(item);
        let to = self.output.section(&self.kind_of(side, section));
        let (align, gap) = if item.is_function {
            (FUNCTION_ALIGN, FUNCTION_GAP)
        } else {
            (section.alignment_at(item.at.offset), 0)
        };
        // Even an empty variable has an address of its own.
        let mut bytes = unit.bytes(item);
        if bytes.is_empty() {
            bytes.push(0);
        }
        let at = self.output.append(to, &bytes, align, gap);
        let symbol = self.output.add_symbol(Symbol {
            name: item.name.clone(),
            place: Place::In(at),
            size: item.size,
            kind: if item.is_function {
                elf::STT_FUNC
            } else {
                elf::STT_OBJECT
            }
            .0,
            binding: elf::STB_LOCAL.0,
        });
        self.items.insert(chosen, (at, symbol));
        self.work.push(Work {
            from: Piece {
                side: chosen.0,
                at: item.at,
                len: item.size,
            },
            to: at,
            in_table: false,
            by: item.name.clone(),
        });
    }

    /// Lays out what tables say of something that is carried.
    fn lay_entries(&mut self, (side, id): Chosen) -> Result<(), SelectError> {
        let sides = self.resolver.sides;
        let Some(of) = sides.get(side) else { return Ok(()) };
        let unit = &of.comparison.after;
        for entry in unit.entries(id) {
            if self.resolver.is_left_out(side, entry, &unit.item(id).name)? {
                continue;
            }
            let Some(section) = unit.object.section(entry.at.section) else {
                continue;
            };
            let bytes = section.bytes(entry.at.offset, entry.len).unwrap_or_default();
            let to = self.output.section(&kind(section));
            let at = self.output.append(to, &bytes, section.align.max(1), 0);
            if entry.is_inherited {
                self.refer_to_start((side, id), at);
                self.lay_row(side, entry);
                continue;
            }
            self.entries.insert(((side, id), entry.at), at);
            self.work.push(Work {
                from: Piece {
                    side,
                    at: entry.at,
                    len: entry.len,
                },
                to: at,
                in_table: true,
                by: unit.item(id).name.clone(),
            });
            self.lay_row(side, entry);
            if let Some((at, len)) = self.resolver.replacement(side, entry) {
                self.piece(Piece { side, at, len });
            }
        }
        Ok(())
    }

    /// Has the entry at `at` of the unwinder's table mean the start of something that is carried.
    fn refer_to_start(&mut self, chosen: Chosen, at: At) {
        let Some(symbol) = self.symbol(chosen) else { return };
        self.output.relocate(
            at.section,
            Relocation {
                offset: at.offset,
                kind: elf::R_X86_64_PC32.0,
                symbol,
                addend: 0,
            },
        );
    }

    fn lay_row(&mut self, side: usize, entry: &Entry) {
        let Some(row) = &entry.row else { return };
        let rows = self.resolver.sides.get(side);
        let Some((_, rows)) = rows.and_then(|side| side.comparison.after.object.section_named(ORC)) else {
            return;
        };
        let to = self.output.section(&kind(rows));
        self.output.append(to, row, 1, 0);
        if let Some(section) = self.output.object.sections.get_mut(to) {
            section.align = section.align.max(rows.align);
        }
    }

    /// Where a piece without a name is; laid out if need be.
    fn piece(&mut self, piece: Piece) -> At {
        if let Some(at) = self.pieces.get(&piece) {
            return *at;
        }
        let sides = self.resolver.sides;
        let none = At { section: 0, offset: 0 };
        let Some(side) = sides.get(piece.side) else { return none };
        let Some(section) = side.comparison.after.object.section(piece.at.section) else {
            return none;
        };
        let bytes = section.bytes(piece.at.offset, piece.len).unwrap_or_default();
        let to = self.output.section(&self.kind_of(side, section));
        let at = self.output.append(to, &bytes, section.alignment_at(piece.at.offset), 0);
        self.pieces.insert(piece, at);
        self.work.push(Work {
            from: piece,
            to: at,
            in_table: false,
            by: section.name.clone(),
        });
        at
    }

    fn relocate(&mut self, work: &Work) -> Result<(), SelectError> {
        let sides = self.resolver.sides;
        let Some(side) = sides.get(work.from.side) else {
            return Ok(());
        };
        let Some(section) = side.comparison.after.object.section(work.from.at.section) else {
            return Ok(());
        };
        let start = work.from.at.offset;
        for relocation in section.relocations_in(start, start + work.from.len) {
            if relocation.kind == R_X86_64_NONE.0 {
                continue;
            }
            let (symbol, addend) = self.value(side, work, relocation)?;
            self.output.relocate(
                work.to.section,
                Relocation {
                    offset: work.to.offset + (relocation.offset - start),
                    kind: relocation.kind,
                    symbol,
                    addend,
                },
            );
        }
        Ok(())
    }

    /// Symbol and addend of a relocation in the module.
    fn value(&mut self, side: &Side<'_>, work: &Work, relocation: &Relocation) -> Result<(usize, i64), SelectError> {
        let (index, section) = (work.from.side, work.from.at.section);
        let bias = bias(side, section, relocation);
        if work.in_table
            && let Some(replacement) = self.replacement(side, work, relocation)
        {
            let at = self.piece(replacement);
            return Ok(self.at(at, -bias));
        }
        let reference = if work.in_table {
            self.resolver.resolve_entry(index, section, relocation, &work.by)?
        } else {
            self.resolver.resolve(index, section, relocation, &work.by)?
        };
        Ok(match reference {
            Reference::Number(number) => (0, number - bias),
            Reference::Text(text, offset) => {
                let at = self.output.text(&text);
                self.at(at, offset - bias)
            }
            Reference::Running { symbol, offset } => {
                (self.output.out_symbol(&symbol, side.shipped.name()), offset - bias)
            }
            Reference::Carried { item, offset } => match self.items.get(&item) {
                Some((_, symbol)) => (*symbol, offset - bias),
                None => return Err(self.not_laid(side, section, work)),
            },
            Reference::Entry { item, at, offset } => match self.entries.get(&(item, at)) {
                Some(at) => self.at(*at, offset - bias),
                None => return Err(self.not_laid(side, section, work)),
            },
            Reference::Piece { piece, offset } => {
                let at = self.piece(piece);
                self.at(at, offset - bias)
            }
        })
    }

    /// Something in `section` is needed that selecting did not carry.
    fn not_laid(&self, side: &Side<'_>, section: usize, work: &Work) -> SelectError {
        let section = side.comparison.after.object.section(section);
        SelectError::Unknown {
            file: side.source.clone(),
            name: section.map_or_else(String::new, |section| format!("what {} refers to", section.name)),
            needed_by: work.by.clone(),
        }
    }

    /// The replacement that a relocation of an entry of alternatives means.
    fn replacement(&self, side: &Side<'_>, work: &Work, relocation: &Relocation) -> Option<Piece> {
        if relocation.offset != work.from.at.offset + 4 {
            return None;
        }
        let unit = &side.comparison.after;
        let items = (0..unit.items.len()).flat_map(|id| unit.entries(id));
        let mut of_place = items.filter(|entry| entry.at == work.from.at);
        let (at, len) = self.resolver.replacement(work.from.side, of_place.next()?)?;
        Some(Piece {
            side: work.from.side,
            at,
            len,
        })
    }

    /// The section for what a module's code or variables become: its own where the patch is for several objects, so that what a module
    /// needs that is not loaded is only needed where it is.
    fn kind_of(&self, side: &Side<'_>, section: &Section) -> Kind {
        let mut kind = kind(section);
        if let Some(module) = side.shipped.name().filter(|_| self.is_of_several)
            && [".text", ".rodata", ".data", ".bss"].contains(&kind.name.as_str())
        {
            kind.name = format!("{}.{module}", kind.name);
        }
        kind
    }

    /// Symbol and addend that mean a place in the module.
    fn at(&mut self, at: At, addend: i64) -> (usize, i64) {
        let symbol = self.output.section_symbol(at.section);
        (symbol, addend.saturating_add_unsigned(at.offset))
    }
}

/// What the addend of a place-relative relocation in code has on top of what is meant: the processor counts from the end of the
/// instruction.
fn bias(side: &Side<'_>, section: usize, relocation: &Relocation) -> i64 {
    side.comparison.after.bias(section, relocation)
}

/// The section of the module that a section's pieces go to: the compiler's section for each function or variable is not needed
/// any more.
fn kind(section: &Section) -> Kind {
    let name = section.name.as_str();
    let plain = match name {
        _ if name.starts_with(".text.") => ".text",
        _ if name.starts_with(".data..ro_after_init") => ".data..ro_after_init",
        _ if name.starts_with(".data..percpu") => ".data..percpu",
        _ if name.starts_with(".data") => ".data",
        _ if name.starts_with(".bss") => ".bss",
        _ if name.starts_with(".rodata") => ".rodata",
        _ => name,
    };
    // Constants are laid out here, nothing is left to merge; and no section is of a group.
    let dropped = elf::SHF_MERGE.0 | elf::SHF_STRINGS.0 | elf::SHF_GROUP.0 | elf::SHF_LINK_ORDER.0;
    Kind {
        name: plain.to_owned(),
        kind: section.kind,
        flags: section.flags & !dropped,
        entry_size: 0,
    }
}
