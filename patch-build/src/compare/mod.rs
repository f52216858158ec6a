//! Two versions of an object file, function by function and variable by variable.
//!
//! Compared is what code does, not how the compiler numbered it: line numbers, counted names, the order in the file and where a
//! text constant stands make no difference.

mod contents;
mod differ;
mod lines;
pub(crate) mod names;
mod pairs;
mod storage;
pub(crate) mod tables;
#[cfg(test)]
mod tests;
mod unit;

pub(crate) use contents::is_forgetful;
pub use differ::Difference;
pub(crate) use differ::{is_by_contents, replacement, shown, unnamed_piece, width};
pub use pairs::Pairs;
pub use tables::TableError;
pub use unit::{Item, ItemId, Target, Unit, is_of_boot};

use std::collections::BTreeMap;

use crate::elf::{ElfError, Object};
use crate::types::{DebugError, DebugInfo, Layouts, Rows, Statics};
use differ::Differ;
use lines::Lines;

/// Why two versions could not be compared.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CompareError {
    /// An object file is damaged.
    #[error(transparent)]
    Elf(#[from] ElfError),
    /// A table is not understood.
    #[error(transparent)]
    Table(#[from] TableError),
    /// It was assembled by another program than the one that keeps names.
    #[error(
        "the object file does not say which variables and functions its references mean: was it assembled by GNU as, and is awk there?"
    )]
    Nameless,
    /// Only one of the two object files is whole.
    #[error("only one of the two object files says how to unwind its code: objtool was not run on the {half} one")]
    Half {
        /// Which one is not: `old` or `new`.
        half: &'static str,
    },
    /// Debug information is damaged.
    #[error(transparent)]
    Debug(#[from] DebugError),
}

/// What became of an item.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is as it was.
    Equal,
    /// It differs, in this first of all.
    Changed(Difference),
    /// It was not there before.
    New,
}

/// What two versions of an object file have in common, and what not.
#[derive(Debug)]
pub struct Comparison {
    /// The first version.
    pub before: Unit,
    /// The second.
    pub after: Unit,
    /// Which item of one is which of the other.
    pub pairs: Pairs,
    /// By item of `after`.
    pub verdicts: Vec<Verdict>,
    /// Types whose layout differs: name, before, after.
    pub types: Vec<(String, String, String)>,
    /// By function of `after`: structures of the file that are new and that it reaches through a pointer.
    pub new_behind_pointers: BTreeMap<String, Vec<String>>,
}

impl Comparison {
    /// Compares two object files of one source file.
    ///
    /// Errors: see [`CompareError`].
    pub fn of(before: &[u8], after: &[u8]) -> Result<Self, CompareError> {
        let (before, old_lines, old_rows, old_types) = read(before)?;
        let (after, new_lines, new_rows, new_types) = read(after)?;
        check_both_are_whole(&before, &after)?;
        let lines = Lines::new((old_lines.lines(), old_rows), (new_lines.lines(), new_rows));
        let mut pairs = Pairs::by_key(&before, &after);
        pairs.pair_renamed(&before, &after, |pairs, b, a| {
            let differ = Differ {
                before: &before,
                after: &after,
                pairs,
                lines: &lines,
            };
            differ.items(b, a).is_none()
        });
        let differ = Differ {
            before: &before,
            after: &after,
            pairs: &pairs,
            lines: &lines,
        };
        let verdict = |a: ItemId| match pairs.to_before(a) {
            Some(b) => {
                let (old, new) = (before.item(b), after.item(a));
                let found = differ.items(b, a).or_else(|| {
                    let is_data = !new.is_function && !is_by_contents(&after, a);
                    let differs = is_data.then(|| storage::differs(&before, old, &after, new)).flatten();
                    differs.or_else(|| retyped(old_types.of_variable(old.at)?, new_types.of_variable(new.at)?))
                });
                found.map_or(Verdict::Equal, Verdict::Changed)
            }
            None => Verdict::New,
        };
        let verdicts = (0..after.items.len()).map(verdict).collect();
        let types = old_types
            .changed(&new_types)
            .map(|(name, x, y)| (name.to_owned(), x.to_owned(), y.to_owned()))
            .collect();
        let functions = after.items.iter().filter(|item| item.is_function);
        let new_behind_pointers = functions
            .map(|item| {
                let new = old_types.new_behind_pointers(&new_types, names::written(&item.name));
                (
                    item.name.clone(),
                    new.into_iter().map(str::to_owned).collect::<Vec<_>>(),
                )
            })
            .filter(|(_, new)| !new.is_empty())
            .collect();
        Ok(Self {
            before,
            after,
            pairs,
            verdicts,
            types,
            new_behind_pointers,
        })
    }

    /// What became of an item of `after`.
    pub fn verdict(&self, after: ItemId) -> &Verdict {
        self.verdicts.get(after).unwrap_or(&Verdict::New)
    }

    /// Items of `before` that are not there any more.
    pub fn gone(&self) -> impl Iterator<Item = &Item> {
        let gone = |id: &ItemId| self.pairs.to_after(*id).is_none();
        (0..self.before.items.len()).filter(gone).map(|id| self.before.item(id))
    }

    /// True where neither code nor data differ.
    pub fn is_null(&self) -> bool {
        let counts = |(id, verdict): (ItemId, &Verdict)| match verdict {
            Verdict::Equal => false,
            // What a constant without a name holds, the code that uses it says.
            Verdict::Changed(_) => !is_by_contents(&self.after, id),
            Verdict::New => self.after.item(id).is_function,
        };
        !self.verdicts.iter().enumerate().any(counts)
    }
}

/// What to say of a variable whose type became another one of the same size.
fn retyped(before: &str, after: &str) -> Option<Difference> {
    (before != after).then(|| format!("its type was {before}, and is {after}"))
}

/// objtool finds what the kernel has to know of the code (return sites, calls of other kinds, how to unwind) and leaves a row for each
/// function, but where the build excepts the whole file.
fn check_both_are_whole(before: &Unit, after: &Unit) -> Result<(), CompareError> {
    let has_code = |unit: &Unit| unit.items.iter().any(|item| item.is_function && item.size > 0);
    let has_rows = |unit: &Unit| unit.object.section_named(tables::ORC).is_some();
    if !has_code(before) || !has_code(after) {
        return Ok(());
    }
    match (has_rows(before), has_rows(after)) {
        (true, false) => Err(CompareError::Half { half: "new" }),
        (false, true) => Err(CompareError::Half { half: "old" }),
        _ => Ok(()),
    }
}

fn read(bytes: &[u8]) -> Result<(Unit, Statics, Rows, Layouts), CompareError> {
    let object = Object::parse(bytes)?;
    if !object.names_what_is_meant() {
        return Err(CompareError::Nameless);
    }
    let info = DebugInfo::of(&object);
    let statics = Statics::read(&info)?;
    let layouts = Layouts::read(&info)?;
    let rows = Rows::read(&info)?;
    Ok((Unit::new(object, &statics)?, statics, rows, layouts))
}
