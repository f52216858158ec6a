//! Where a selection starts: the functions that changed.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};

use super::{Chosen, Finding, Replaced, Risk, SelectError};
use crate::compare::{Comparison, ItemId, Verdict, is_of_boot, names};
use crate::elf::At;
use crate::running::{Places, Shipped};

/// One source file: what changed in it, and where its first version is in the kernel.
#[derive(Debug)]
pub struct Side<'k> {
    /// The source file.
    pub source: String,
    /// True where the guest's own livepatch can redirect the file's functions.
    pub has_ftrace: bool,
    /// Its two versions.
    pub comparison: Comparison,
    /// Where the items of the first version are.
    pub places: Places,
    /// What they are in: the kernel image, or a module.
    pub shipped: Shipped<'k>,
}

impl Side<'_> {
    /// The item of the first version that an item of the second was.
    pub fn before(&self, after: ItemId) -> Option<ItemId> {
        self.comparison.pairs.to_before(after)
    }

    /// A place for messages.
    pub fn place(&self, name: &str) -> String {
        format!("{}: {name}", self.source)
    }
}

/// A function that changed, and what changed in it.
#[derive(Debug)]
pub(super) struct Root {
    /// The new one, by the last of its names.
    pub new: Chosen,
    /// What changed.
    pub what: String,
    /// Those of its names whose function changed.
    names: BTreeSet<ItemId>,
}

/// The functions that changed. A part that was split off stands for the whole, and one name for all that a function has: system
/// calls without arguments have three.
pub(super) fn roots(sides: &[Side<'_>], findings: &mut Vec<Finding>) -> Vec<Root> {
    let mut roots: BTreeMap<Chosen, Root> = BTreeMap::new();
    for (index, side) in sides.iter().enumerate() {
        let unit = &side.comparison.after;
        for (id, item) in unit.items.iter().enumerate() {
            let Verdict::Changed(what) = side.comparison.verdict(id) else {
                continue;
            };
            if !item.is_function {
                continue;
            }
            let section = &unit.section_of(item).name;
            if is_of_boot(section) {
                findings.push(Finding::new(
                    Risk::Init,
                    side.place(&item.name),
                    format!(
                        "it changed ({what}), but is only run while the kernel or module starts or ends ({section})"
                    ),
                ));
                continue;
            }
            let whole = names::warm_part(&item.name).and_then(|name| unit.named(name));
            let (named, what) = match whole {
                Some(whole) => (whole, format!("{}: {what}", item.name)),
                None => (id, what.clone()),
            };
            let new = (index, unit.aliases(named).last().copied().unwrap_or(named));
            match roots.entry(new) {
                Entry::Vacant(slot) => {
                    let names = BTreeSet::from([named]);
                    slot.insert(Root { new, what, names });
                }
                Entry::Occupied(mut slot) => {
                    let root = slot.get_mut();
                    root.names.insert(named);
                    // What changed in the function itself says more than what changed in a part of it.
                    if whole.is_none() {
                        root.what = what;
                    }
                }
            }
        }
    }
    roots.into_values().collect()
}

/// What a changed function replaces: nothing where it is new, several where the compiler has made one of them.
pub(super) fn replaced(sides: &[Side<'_>], root: &Root) -> Result<Vec<Replaced>, SelectError> {
    let Some(side) = sides.get(root.new.0) else {
        return Ok(Vec::new());
    };
    let before = &side.comparison.before;
    // The last name of each place.
    let olds = root.names.iter().filter_map(|name| side.before(*name));
    let by_place: BTreeMap<At, ItemId> = olds.map(|old| (before.item(old).at, old)).collect();
    let replaced = by_place.into_values().map(|old| {
        check_all_names(side, old, root.new.1)?;
        let name = before.item(old).name.clone();
        let file = side.source.clone();
        match (side.places.get(old), side.places.count(old)) {
            (Some(found), _) if before.is_weak(before.item(old)) != side.shipped.is_weak(&name, found.address) => {
                Err(SelectError::Overridden { file, name })
            }
            (Some(found), _) => Ok(Replaced {
                new: root.new,
                old,
                found,
            }),
            (None, 0) => Err(SelectError::NoSymbol { file, name }),
            (None, count) => Err(SelectError::Ambiguous { file, name, count }),
        }
    });
    replaced.collect()
}

/// Refuses to replace a function that is another one, too, which did not become the same: the compiler makes one of functions whose
/// code is the same (gcc's `-fipa-icf`), and who calls the other one would get what the change makes of this one.
fn check_all_names(side: &Side<'_>, old: ItemId, new: ItemId) -> Result<(), SelectError> {
    let (before, after) = (&side.comparison.before, &side.comparison.after);
    let stays_with = |other: &ItemId| match side.comparison.pairs.to_after(*other) {
        Some(became) => after.item(became).at == after.item(new).at,
        // Whoever called it changed, too.
        None => before.item(*other).is_local && after.named(&before.item(*other).name).is_none(),
    };
    match before.aliases(old).into_iter().find(|other| !stays_with(other)) {
        None => Ok(()),
        Some(other) => Err(SelectError::Shared {
            file: side.source.clone(),
            name: before.item(old).name.clone(),
            other: before.item(other).name.clone(),
        }),
    }
}

/// Refuses to replace one function by two.
pub(super) fn check_once(sides: &[Side<'_>], replaced: &[Replaced]) -> Result<(), SelectError> {
    let mut seen: BTreeMap<(Option<&str>, u64), &Side<'_>> = BTreeMap::new();
    for one in replaced {
        let Some(side) = sides.get(one.new.0) else { continue };
        if let Some(first) = seen.insert((side.shipped.name(), one.found.address), side) {
            return Err(SelectError::Twice {
                name: side.comparison.before.item(one.old).name.clone(),
                first: first.source.clone(),
                second: side.source.clone(),
            });
        }
    }
    Ok(())
}
