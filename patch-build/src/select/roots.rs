//! Where a selection starts: the functions that changed.

use std::collections::BTreeMap;

use super::{Chosen, Finding, Replaced, Risk, SelectError};
use crate::compare::{Comparison, ItemId, Verdict, is_of_boot, names};
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

/// The functions that changed, each with what changed in it. A part that was split off stands for the whole, and one name for all
/// that a function has: system calls without arguments have three.
pub(super) fn roots(sides: &[Side<'_>], findings: &mut Vec<Finding>) -> Vec<(Chosen, String)> {
    let mut roots = BTreeMap::new();
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
            let (id, what) = match whole {
                Some(whole) => (whole, format!("{}: {what}", item.name)),
                None => (id, what.clone()),
            };
            // What changed in the function itself says more than what changed in a part of it.
            if whole.is_none() || !roots.contains_key(&(index, id)) {
                roots.insert((index, id), what);
            }
        }
    }
    let mut by_place = BTreeMap::new();
    for ((index, id), what) in roots {
        let at = sides.get(index).map(|side| side.comparison.after.item(id).at);
        // The last name is the one that a reference without a name means, too.
        by_place.insert((index, at), ((index, id), what));
    }
    by_place.into_values().collect()
}

/// What a changed function replaces; nothing for one that is new.
pub(super) fn replaced(sides: &[Side<'_>], new: Chosen) -> Result<Option<Replaced>, SelectError> {
    let Some(side) = sides.get(new.0) else {
        return Ok(None);
    };
    let Some(old) = side.before(new.1) else {
        return Ok(None);
    };
    let name = side.comparison.before.item(old).name.clone();
    let file = side.source.clone();
    match (side.places.get(old), side.places.count(old)) {
        (Some(found), _) => Ok(Some(Replaced { new, old, found })),
        (None, 0) => Err(SelectError::NoSymbol { file, name }),
        (None, count) => Err(SelectError::Ambiguous { file, name, count }),
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
