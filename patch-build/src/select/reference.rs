//! What a reference of carried code becomes in the module.

use std::collections::BTreeSet;

use super::{Chosen, Piece, SelectError, Side};
use crate::compare::tables::Entry;
use crate::compare::{ItemId, Target, Unit, Verdict, is_by_contents, names, replacement, unnamed_piece};
use crate::elf::{At, Relocation, Section};
use crate::facts::Exports;
use crate::running::Shipped;

/// A symbol that the module leaves to the guest.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum OutSymbol {
    /// Exported to modules by the kernel.
    Exported(String),
    /// Any symbol of an object (`vmlinux` or a module).
    Livepatch {
        /// The object.
        object: String,
        /// The symbol's name.
        name: String,
        /// Its position among those of its name, from 1 on; 0: the only one.
        sympos: u64,
    },
    /// One that need not be there.
    Weak(String),
}

/// What a reference becomes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reference {
    /// A place in something that is carried.
    Carried {
        /// What.
        item: Chosen,
        /// Bytes from its start.
        offset: i64,
    },
    /// A place in the running kernel.
    Running {
        /// The symbol.
        symbol: OutSymbol,
        /// Bytes from it.
        offset: i64,
    },
    /// A text constant, and bytes from its start.
    Text(Vec<u8>, i64),
    /// A place in a piece that has no name.
    Piece {
        /// The piece, which is carried.
        piece: Piece,
        /// Bytes from its start.
        offset: i64,
    },
    /// A place in an entry of a table: code may hand over its own row of `__bug_table`.
    Entry {
        /// What the entry is about, which is carried.
        item: Chosen,
        /// Where the entry starts in the file.
        at: At,
        /// Bytes from its start.
        offset: i64,
    },
    /// A number.
    Number(i64),
}

/// Decides what references become.
pub(crate) struct Resolver<'s, 'k> {
    pub sides: &'s [Side<'k>],
    pub exports: &'s Exports,
    /// The functions that changed.
    pub patched: &'s BTreeSet<Chosen>,
}

impl Resolver<'_, '_> {
    /// The replacement that an entry names, where it is of alternatives.
    pub fn replacement(&self, side: usize, entry: &Entry) -> Option<(At, u64)> {
        let of = self.sides.get(side)?;
        (entry.table().name == ".altinstructions")
            .then(|| replacement(&of.comparison.after, entry))
            .flatten()
    }

    /// True for an entry that is left out. It names a static key or a static call of the patched module itself, which livepatch fills
    /// in only after the kernel has read the table (kernel/livepatch/core.c, `klp_init_object_loaded`): without it a static call
    /// goes through its trampoline, and a tracepoint or pr_debug() stays as it was compiled. Or it allows to seal the entry of a function
    /// that is never reached indirectly, of which objtool judges by one file, where another may keep a pointer.
    ///
    /// Error: another static key, whose state the branch would have to follow.
    pub fn is_left_out(&self, side: usize, entry: &Entry, by: &str) -> Result<bool, SelectError> {
        let (is_call, key) = match entry.table().name {
            ".static_call_sites" => (true, 4),
            "__jump_table" => (false, 8),
            ".ibt_endbr_seal" => return Ok(true),
            _ => return Ok(false),
        };
        let Some(of) = self.sides.get(side) else {
            return Ok(false);
        };
        let unit = &of.comparison.after;
        let start = entry.at.offset + key;
        let relocations = unit.object.section(entry.at.section);
        let relocations = relocations.map_or(&[][..], |section| section.relocations_in(start, start + 1));
        let Some(relocation) = relocations.first() else {
            return Ok(false);
        };
        let reference = self.resolve_entry(side, entry.at.section, relocation, by)?;
        let Reference::Running {
            symbol: OutSymbol::Livepatch { object, name, .. },
            ..
        } = reference
        else {
            return Ok(false);
        };
        let stays_off = match unit.target(entry.at.section, relocation) {
            Target::Item(id, _) => is_never_switched(&unit.section_of(unit.item(id)).name),
            _ => name.starts_with("__tracepoint_"),
        };
        match object == "vmlinux" {
            true => Ok(false),
            false if is_call || stays_off => Ok(true),
            false => Err(SelectError::ModuleKey {
                file: of.source.clone(),
                needed_by: by.to_owned(),
                key: name,
                module: object,
            }),
        }
    }

    /// What a reference in section `section` of the second version of file `side` becomes; `by` is whose it is.
    pub fn resolve(
        &self,
        side: usize,
        section: usize,
        relocation: &Relocation,
        by: &str,
    ) -> Result<Reference, SelectError> {
        let branches = |of: &Side<'_>| of.comparison.after.is_branch(section, relocation);
        let is_branch = self.sides.get(side).is_some_and(branches);
        self.reference(side, section, relocation, is_branch, by)
    }

    /// As [`Resolver::resolve`], for an entry of a table about carried code: what it says is about that code.
    pub fn resolve_entry(
        &self,
        side: usize,
        section: usize,
        relocation: &Relocation,
        by: &str,
    ) -> Result<Reference, SelectError> {
        self.reference(side, section, relocation, true, by)
    }

    fn reference(
        &self,
        side: usize,
        section: usize,
        relocation: &Relocation,
        is_branch: bool,
        by: &str,
    ) -> Result<Reference, SelectError> {
        let Some(of) = self.sides.get(side) else {
            return Ok(Reference::Number(0));
        };
        let unit = &of.comparison.after;
        match unit.target(section, relocation) {
            Target::Number(number) => Ok(Reference::Number(number)),
            Target::Text(text, offset) => Ok(Reference::Text(text, offset)),
            Target::Unnamed(at, past) => {
                if let Some((item, entry)) = unit.entry_at(at) {
                    return Ok(Reference::Entry {
                        item: (side, item),
                        at: entry.at,
                        offset: past.saturating_add_unsigned(at.offset - entry.at.offset),
                    });
                }
                if let Some(section) = unit.object.section(at.section).filter(|section| is_shared(section)) {
                    let what = format!("a variable of {} that has no name", section.name);
                    return Err(self.unknown(of, &what, by));
                }
                match unnamed_piece(unit, at) {
                    Some((at, len, inside)) => Ok(Reference::Piece {
                        piece: Piece { side, at, len },
                        offset: past.saturating_add_unsigned(inside),
                    }),
                    None => Err(self.unknown(of, "a constant without a name", by)),
                }
            }
            Target::Item(id, offset) => self.item((side, id), unit.named_by(relocation), offset, is_branch, by),
            Target::Extern(name, offset) => {
                let weak = unit
                    .object
                    .symbol(relocation)
                    .is_some_and(|symbol| symbol.binding == object::elf::STB_WEAK.0);
                self.external(side, &name, offset, weak, is_branch, by)
            }
        }
    }

    /// A reference to an item, by the last of its names and by the one that stands there.
    fn item(
        &self,
        chosen: Chosen,
        named: Option<ItemId>,
        offset: i64,
        is_branch: bool,
        by: &str,
    ) -> Result<Reference, SelectError> {
        let carried = Ok(Reference::Carried { item: chosen, offset });
        let Some(of) = self.sides.get(chosen.0) else {
            return carried;
        };
        let unit = &of.comparison.after;
        let item = unit.item(chosen.1);
        let is_part = item.is_function && names::warm_part(&item.name).is_some();
        if is_part || is_by_contents(unit, chosen.1) {
            return carried;
        }
        let patched = self.patched.contains(&chosen);
        // A pointer that is kept must stay good when the patch goes, and be equal to those of old code: it leads to the
        // old function, which leads to the new one.
        if patched && (is_branch || offset != 0 || is_entry_anew(of, chosen.1)) {
            return carried;
        }
        // Functions that became one are several in the kernel, and a pointer is to the one that is named; that may be new: then to one
        // that was there before.
        let mut names = named.into_iter().chain(unit.aliases(chosen.1).into_iter().rev());
        let Some(before) = names.find_map(|name| of.before(name)) else {
            // A new default does not take the place of what another file has.
            let others = if unit.is_weak(item) {
                global(&of.shipped, &of.source, &item.name)?
            } else {
                None
            };
            return others.map_or(carried, |symbol| Ok(Reference::Running { symbol, offset }));
        };
        if item.is_function
            && !is_branch
            && let Some(found) = of.places.get(before)
        {
            not_sealed(of, found.address, &item.name, by)?;
        }
        match self.running(of, before)? {
            Some(symbol) => Ok(Reference::Running { symbol, offset }),
            // A constant, or a copy that only this file's code has.
            None if patched || item.is_function || !unit.section_of(item).is_writable() => carried,
            None => Err(self.unknown(of, &item.name, by)),
        }
    }

    /// The symbol of an item of the first version; none where the kernel has none.
    fn running(&self, of: &Side<'_>, before: ItemId) -> Result<Option<OutSymbol>, SelectError> {
        let item = of.comparison.before.item(before);
        if !item.is_local
            && let Some(symbol) = self.exported_by_own(of, &item.name)
        {
            return Ok(Some(symbol));
        }
        let object = of.shipped.name().unwrap_or("vmlinux").to_owned();
        let name = item.name.clone();
        match (of.places.get(before), of.places.count(before)) {
            (Some(found), _) => Ok(Some(OutSymbol::Livepatch {
                object,
                name,
                sympos: found.sympos,
            })),
            (None, 0) => Ok(None),
            (None, _) if !item.is_function && !of.comparison.before.section_of(item).is_writable() => Ok(None),
            (None, count) => Err(SelectError::Ambiguous {
                file: of.source.clone(),
                name,
                count,
            }),
        }
    }

    fn external(
        &self,
        side: usize,
        name: &str,
        offset: i64,
        weak: bool,
        is_branch: bool,
        by: &str,
    ) -> Result<Reference, SelectError> {
        let Some(of) = self.sides.get(side) else {
            return Ok(Reference::Number(0));
        };
        for (index, other) in self.sides.iter().enumerate().filter(|(index, _)| *index != side) {
            let unit = &other.comparison.after;
            let defines = |item: &crate::compare::Item| !item.is_local && item.name == name;
            let Some(id) = unit.items.iter().position(defines) else {
                continue;
            };
            let chosen = (index, id);
            if *other.comparison.verdict(id) == Verdict::New || (is_branch && self.patched.contains(&chosen)) {
                return Ok(Reference::Carried { item: chosen, offset });
            }
        }
        if !is_branch && let Some(address) = of.shipped.global(name) {
            not_sealed(of, address, name, by)?;
        }
        // The linker takes what another file of the same object has, whatever is exported to modules elsewhere.
        let is_of_own = of.shipped.global(name).is_some();
        let exported = match is_of_own {
            true => self.exported_by_own(of, name),
            false => self.exported(of, name),
        };
        let symbol = match exported {
            None => global(&of.shipped, &of.source, name)?,
            exported => exported,
        };
        let symbol = symbol.or_else(|| weak.then(|| OutSymbol::Weak(name.to_owned())));
        match symbol {
            Some(symbol) => Ok(Reference::Running { symbol, offset }),
            None => Err(self.unknown(of, name, by)),
        }
    }

    /// The export of something that the kernel image itself has, for its own code.
    fn exported_by_own(&self, of: &Side<'_>, name: &str) -> Option<OutSymbol> {
        let is_image = |export: &&crate::facts::Export| of.shipped.name().is_none() && export.module.is_none();
        let export = self.exports.get(name).filter(is_image);
        export.map(|_| OutSymbol::Exported(name.to_owned()))
    }

    /// A symbol that modules may use; none of the patched module itself. One that a module exports is a livepatch symbol, which is
    /// found when the patched module is there, which needs that one: else the patch could not be loaded before them.
    fn exported(&self, of: &Side<'_>, name: &str) -> Option<OutSymbol> {
        let export = self.exports.get(name)?;
        match &export.module {
            None => Some(OutSymbol::Exported(name.to_owned())),
            Some(module) if Some(module.as_str()) == of.shipped.name() => None,
            // The kernel image uses nothing of a module.
            Some(_) if of.shipped.name().is_none() => None,
            // Of a name that is exported there is one.
            Some(module) => Some(OutSymbol::Livepatch {
                object: module.clone(),
                name: name.to_owned(),
                sympos: 0,
            }),
        }
    }

    fn unknown(&self, of: &Side<'_>, name: &str, by: &str) -> SelectError {
        SelectError::Unknown {
            file: of.source.clone(),
            name: name.to_owned(),
            needed_by: by.to_owned(),
        }
    }
}

/// True for a section of what has a static key that stays as it was compiled in a patch: pr_debug(), and tracepoints.
pub(super) fn is_never_switched(section: &str) -> bool {
    ["__dyndbg", "__tracepoints"]
        .iter()
        .any(|name| section.starts_with(name))
}

/// True for a section of variables that old code may use, too. What the compiler itself has no name for is a constant (`.data.rel.ro`),
/// or the note of one place in the code.
fn is_shared(section: &Section) -> bool {
    let own = [".data.rel.ro", ".data..L"];
    section.is_writable() && !own.iter().any(|prefix| section.name.starts_with(prefix))
}

/// True for a changed function that indirect calls may lead to, and to the kernel's they may not: no code kept its address before.
fn is_entry_anew(of: &Side<'_>, id: ItemId) -> bool {
    let code = |unit: &Unit, id: ItemId| unit.bytes(unit.item(id));
    let was_none = |before: ItemId| {
        let sealed = of
            .places
            .get(before)
            .is_some_and(|found| of.shipped.is_sealed(found.address));
        sealed || !Shipped::is_entry(&code(&of.comparison.before, before))
    };
    Shipped::is_entry(&code(&of.comparison.after, id)) && of.before(id).is_some_and(was_none)
}

/// Refuses to keep the address of a function that the kernel seals.
fn not_sealed(of: &Side<'_>, address: u64, name: &str, by: &str) -> Result<(), SelectError> {
    match of.shipped.is_sealed(address) {
        false => Ok(()),
        true => Err(SelectError::Sealed {
            file: of.source.clone(),
            name: name.to_owned(),
            needed_by: by.to_owned(),
        }),
    }
}

/// A symbol that all files of the kernel image, or of a module, see.
///
/// Error: others of that name are gone once the module has started, and the rest then counted anew.
fn global(shipped: &Shipped<'_>, file: &str, name: &str) -> Result<Option<OutSymbol>, SelectError> {
    let all = shipped.named(name);
    let address = match all.as_slice() {
        [only] => Some(*only),
        _ => shipped.global(name),
    };
    let Some(address) = address else { return Ok(None) };
    let sympos = shipped.sympos(&all, address).ok_or_else(|| SelectError::Ambiguous {
        file: file.to_owned(),
        name: name.to_owned(),
        count: all.len(),
    })?;
    Ok(Some(OutSymbol::Livepatch {
        object: shipped.name().unwrap_or("vmlinux").to_owned(),
        name: name.to_owned(),
        sympos,
    }))
}
