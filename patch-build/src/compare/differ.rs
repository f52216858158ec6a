//! Whether two pieces of two object files mean the same.

use iced_x86::Mnemonic;
use object::elf::{R_X86_64_64, R_X86_64_PC64};

use super::contents::bytes_without_lines;
use super::tables::Entry;
use super::unit::{ItemId, Target, Unit};
use super::{Pairs, names};
use crate::elf::code::{instructions, is_branch};
use crate::elf::{At, Relocation, Section};

/// How deep constants may refer to constants that have no name: ends what would not end.
const DEPTH_MAX: usize = 16;
/// Where WARN() and BUG() are described, with their lines.
const WARNINGS: &str = "__bug_table";
/// What the sanitizer of undefined behaviour says of a place in the code, each in a section of its own; first the place in the
/// source: file, line and column (lib/ubsan.h, `struct source_location`).
const SANITIZED: &str = ".data..Lubsan_data";
/// Bytes of such a place in the source.
const SOURCE_LOCATION_BYTES: u64 = 16;

/// The first thing in which two pieces differ; for people.
pub type Difference = String;

/// Compares pieces of two files whose items are paired.
pub(crate) struct Differ<'u> {
    pub before: &'u Unit,
    pub after: &'u Unit,
    pub pairs: &'u Pairs,
    pub lines: &'u super::lines::Lines,
}

/// A piece of a section.
#[derive(Clone, Copy)]
struct Piece {
    at: At,
    len: u64,
}

impl Piece {
    /// The piece without the place in the source that it begins with.
    fn behind_location(self) -> Self {
        let skipped = SOURCE_LOCATION_BYTES.min(self.len);
        Self {
            at: At {
                offset: self.at.offset + skipped,
                ..self.at
            },
            len: self.len - skipped,
        }
    }
}

impl Differ<'_> {
    /// In what two items differ, if they do.
    pub fn items(&self, b: ItemId, a: ItemId) -> Option<Difference> {
        let (old, new) = (self.before.item(b), self.after.item(a));
        if old.size != new.size {
            return Some(format!("{} bytes became {}", old.size, new.size));
        }
        let piece = |item: &super::Item| Piece {
            at: item.at,
            len: item.size,
        };
        if let Some(found) = self.pieces(piece(old), piece(new), 0) {
            return Some(found);
        }
        let (old_entries, new_entries) = (own_entries(self.before, b), own_entries(self.after, a));
        if old_entries.len() != new_entries.len() {
            return Some(format!(
                "{} table entries became {}",
                old_entries.len(),
                new_entries.len()
            ));
        }
        let mut both = old_entries.into_iter().zip(new_entries);
        both.find_map(|(x, y)| self.entries(old.at, x, new.at, y))
    }

    fn pieces(&self, b: Piece, a: Piece, depth: usize) -> Option<Difference> {
        if depth > DEPTH_MAX {
            return Some("constants that refer to one another without end".to_owned());
        }
        let (old, new) = (self.section(self.before, b.at)?, self.section(self.after, a.at)?);
        let is_sanitized = |section: &Section| section.name.starts_with(SANITIZED);
        if is_sanitized(old) && is_sanitized(new) && b.at.offset == 0 && a.at.offset == 0 {
            return self.pieces(b.behind_location(), a.behind_location(), depth + 1);
        }
        let relocations = self.relocations(old, b, new, a, depth);
        if relocations.is_some() {
            return relocations;
        }
        let (x, y) = (
            bytes_without_lines(old, b.at, b.len),
            bytes_without_lines(new, a.at, a.len),
        );
        if x == y {
            return None;
        }
        let (x, y) = (x.unwrap_or_default(), y.unwrap_or_default());
        if old.is_code() && self.lines.explain((b.at, a.at), &x, &y) {
            return None;
        }
        let at = x.iter().zip(&y).position(|(x, y)| x != y).unwrap_or_default();
        Some(format!("bytes at +{at:#x}"))
    }

    fn relocations(&self, old: &Section, b: Piece, new: &Section, a: Piece, depth: usize) -> Option<Difference> {
        let x = old.relocations_in(b.at.offset, b.at.offset + b.len);
        let y = new.relocations_in(a.at.offset, a.at.offset + a.len);
        if x.len() != y.len() {
            return Some(format!("{} references became {}", x.len(), y.len()));
        }
        x.iter().zip(y).find_map(|(x, y)| {
            let at = x.offset - b.at.offset;
            if at != y.offset - a.at.offset || x.kind != y.kind {
                return Some(format!("reference at +{at:#x}"));
            }
            let (old, new) = (self.before.target(b.at.section, x), self.after.target(a.at.section, y));
            let found = self.targets(&old, &new, depth)?;
            Some(format!("at +{at:#x}: {found}"))
        })
    }

    /// In what two references differ.
    fn targets(&self, b: &Target, a: &Target, depth: usize) -> Option<Difference> {
        let text = || format!("{} became {}", shown(self.before, b), shown(self.after, a));
        match (b, a) {
            (Target::Item(x, from), Target::Item(y, to)) if from == to => {
                let by_contents = |unit: &Unit, id: ItemId| is_by_contents(unit, id);
                if by_contents(self.before, *x) && by_contents(self.after, *y) {
                    let (x, y) = (self.before.item(*x), self.after.item(*y));
                    let piece = |item: &super::Item| Piece {
                        at: item.at,
                        len: item.size,
                    };
                    return if x.size == y.size {
                        self.pieces(piece(x), piece(y), depth + 1)
                    } else {
                        Some(text())
                    };
                }
                let paired = self.pairs.to_after(*x) == Some(*y);
                (!paired).then(text)
            }
            (Target::Text(x, from), Target::Text(y, to)) if from == to => (!self.lines.explain_text(x, y)).then(text),
            (Target::Unnamed(x, from), Target::Unnamed(y, to)) if from != to => Some(text()),
            (Target::Unnamed(x, _), Target::Unnamed(y, _)) if self.is_warning(*x) => {
                (!self.same_warning(*x, *y)).then(text)
            }
            (Target::Unnamed(x, _), Target::Unnamed(y, _)) => {
                let (old, new) = (unnamed(self.before, *x), unnamed(self.after, *y));
                match (old, new) {
                    (Some((x, from)), Some((y, to))) if x.len == y.len && from == to => self.pieces(x, y, depth + 1),
                    // Nor is it the same where neither piece is known.
                    _ => Some(text()),
                }
            }
            _ if b == a => None,
            _ => Some(text()),
        }
    }

    /// True for a place in the table of warnings; code hands over the address of an entry since 6.19.
    fn is_warning(&self, at: At) -> bool {
        self.section(self.before, at)
            .is_some_and(|section| section.name == WARNINGS)
    }

    /// True where two places in tables of warnings are in entries that say the same, of functions that are a pair.
    fn same_warning(&self, b: At, a: At) -> bool {
        let (Some((old, x)), Some((new, y))) = (self.before.entry_at(b), self.after.entry_at(a)) else {
            return false;
        };
        let (old_at, new_at) = (self.before.item(old).at, self.after.item(new).at);
        self.pairs.to_after(old) == Some(new)
            && b.offset - x.at.offset == a.offset - y.at.offset
            && self.entries(old_at, x, new_at, y).is_none()
    }

    /// In what the entries of two tables differ, of items at two places.
    fn entries(&self, b: At, x: &Entry, a: At, y: &Entry) -> Option<Difference> {
        let name = x.table().name;
        let same_place = x.place.offset.checked_sub(b.offset) == y.place.offset.checked_sub(a.offset);
        if x.table != y.table || x.len != y.len || x.row != y.row || !same_place {
            return Some(format!("what {name} says"));
        }
        if x.is_inherited || y.is_inherited {
            return None;
        }
        let bytes = |unit: &Unit, entry: &Entry| {
            let mut bytes = unit
                .object
                .section(entry.at.section)?
                .bytes(entry.at.offset, entry.len)?;
            let line = entry.line().unwrap_or(0..0);
            let line = usize::try_from(line.start).ok()?..usize::try_from(line.end).ok()?;
            if let Some(line) = bytes.get_mut(line) {
                line.fill(0);
            }
            Some(bytes)
        };
        if bytes(self.before, x) != bytes(self.after, y) {
            return Some(format!("what {name} says"));
        }
        let (old, new) = (self.section(self.before, x.at)?, self.section(self.after, y.at)?);
        let piece = |entry: &Entry| Piece {
            at: entry.at,
            len: entry.len,
        };
        let found = self.relocations_of_entry(old, piece(x), new, piece(y), x);
        found.map(|found| format!("{name}: {found}"))
    }

    fn relocations_of_entry(
        &self,
        old: &Section,
        b: Piece,
        new: &Section,
        a: Piece,
        entry: &Entry,
    ) -> Option<Difference> {
        if entry.table().name != ".altinstructions" {
            return self.relocations(old, b, new, a, 0);
        }
        // The replacement is as long as the entry says, and has no name.
        let other = Entry {
            at: a.at,
            ..entry.clone()
        };
        match (replacement(self.before, entry), replacement(self.after, &other)) {
            (Some(x), Some(y)) => self.pieces(x.into(), y.into(), 1),
            _ => Some("a replacement that is not understood".to_owned()),
        }
    }

    fn section<'a>(&self, unit: &'a Unit, at: At) -> Option<&'a Section> {
        unit.object.section(at.section)
    }
}

/// What tables say of places in an item. The unwinder's table also says where a section's code ends, right behind the last
/// function of it, whichever that is (tools/objtool/orc_gen.c of 6.1).
fn own_entries(unit: &Unit, id: ItemId) -> Vec<&Entry> {
    let item = unit.item(id);
    let is_inside = |entry: &&Entry| {
        let past = entry.place.offset.saturating_sub(item.at.offset);
        past == 0 || past < item.size
    };
    unit.entries(id).iter().filter(is_inside).collect()
}

impl From<(At, u64)> for Piece {
    fn from((at, len): (At, u64)) -> Self {
        Self { at, len }
    }
}

/// A constant that is the same wherever it stands.
pub(crate) fn is_by_contents(unit: &Unit, id: ItemId) -> bool {
    let item = unit.item(id);
    let constant = item.is_local && !item.is_function && !unit.section_of(item).is_writable();
    // A lock's class is an empty structure where locks are not checked.
    (constant && names::is_known_by_contents(&item.name)) || (item.is_local && !item.is_function && item.size == 0)
}

/// The replacement that an entry of `.altinstructions` names.
pub(crate) fn replacement(unit: &Unit, entry: &Entry) -> Option<(At, u64)> {
    let section = unit.object.section(entry.at.section)?;
    let relocation = section
        .relocations_in(entry.at.offset + 4, entry.at.offset + 5)
        .first()?;
    let len = *section
        .bytes(entry.at.offset, entry.len)?
        .get(replacement_len_offset(entry.len))?;
    match unit.target(entry.at.section, relocation) {
        Target::Unnamed(at, 0) => Some((at, u64::from(len))),
        _ => None,
    }
}

/// Offset of `alt_instr.replacementlen`, by the size of an entry (5.10 has another field behind it).
fn replacement_len_offset(len: u64) -> usize {
    if len == 14 { 13 } else { 11 }
}

/// The piece that a reference to no item means, and how far into it the reference goes: a constant, a table of jumps, or
/// code that the assembler put elsewhere.
pub(crate) fn unnamed_piece(unit: &Unit, at: At) -> Option<(At, u64, u64)> {
    let (piece, inside) = unnamed(unit, at)?;
    Some((piece.at, piece.len, inside))
}

fn unnamed(unit: &Unit, at: At) -> Option<(Piece, u64)> {
    let section = unit.object.section(at.section)?;
    if section.is_code() {
        let rest = section.data.get(usize::try_from(at.offset).ok()?..)?;
        return Some((
            Piece {
                at,
                len: code_len(rest)?,
            },
            0,
        ));
    }
    if let Some(len) = section.wide_text_len(at.offset) {
        return Some((Piece { at, len }, 0));
    }
    if section.entry_size > 0 && !section.is_strings() {
        let inside = at.offset % section.entry_size;
        let at = At {
            offset: at.offset - inside,
            ..at
        };
        return Some((
            Piece {
                at,
                len: section.entry_size,
            },
            inside,
        ));
    }
    let whole = Piece {
        at: At { offset: 0, ..at },
        len: section.size,
    };
    (at.offset <= section.size).then_some((whole, at.offset))
}

/// The length of code that the assembler put elsewhere: up to where it goes back, behind all that it jumps to itself. `None` where
/// that is not known.
fn code_len(bytes: &[u8]) -> Option<u64> {
    let bytes_len = u64::try_from(bytes.len()).ok()?;
    let mut reached = 0;
    for instruction in instructions(bytes) {
        // Where it leads elsewhere the linker fills that in, and what is there means the next instruction.
        if is_branch(&instruction) && instruction.near_branch_target() != instruction.next_ip() {
            reached = reached.max(instruction.near_branch_target());
            if reached >= bytes_len {
                return None;
            }
        }
        let ends = matches!(instruction.mnemonic(), Mnemonic::Jmp | Mnemonic::Ret);
        if ends && reached < instruction.next_ip() {
            return Some(instruction.next_ip());
        }
    }
    None
}

/// What a reference refers to, for people.
pub(crate) fn shown(unit: &Unit, target: &Target) -> String {
    let with = |name: &str, offset: i64| match offset {
        0 => name.to_owned(),
        _ => format!("{name}{offset:+#x}"),
    };
    match target {
        Target::Extern(name, offset) => with(name, *offset),
        Target::Item(id, offset) => with(&unit.item(*id).name, *offset),
        Target::Text(text, offset) => {
            let text = String::from_utf8_lossy(text);
            with(&format!("{:?}", text.trim_end_matches('\0')), *offset)
        }
        Target::Unnamed(at, past) => {
            let name = unit
                .object
                .section(at.section)
                .map_or("?", |section| section.name.as_str());
            with(name, past.saturating_add_unsigned(at.offset))
        }
        Target::Number(number) => format!("{number:#x}"),
    }
}

/// Bytes that a relocation of that kind changes.
pub(crate) fn width(relocation: &Relocation) -> u64 {
    let wide = [R_X86_64_64.0, R_X86_64_PC64.0];
    if wide.contains(&relocation.kind) { 8 } else { 4 }
}
