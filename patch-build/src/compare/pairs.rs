//! Which item of one version is which of the other.

use std::collections::BTreeMap;

use super::unit::{ItemId, Unit};
use super::{contents, names, storage};

/// More rounds of finding renamed functions than a chain of calls between such functions is long.
const ROUNDS_MAX: usize = 16;

/// Pairs of items of two files.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pairs {
    to_after: Vec<Option<ItemId>>,
    to_before: Vec<Option<ItemId>>,
}

impl Pairs {
    /// Pairs items of one name, as the source has it, and where a macro or the compiler counts, of one name with the same contents.
    /// Where there are several (static locals of one name in one function), they pair in the source's order if both files have as many,
    /// each in as many blocks, else none of them does. Nor does one whose memory in the kernel can't be that of the second file's.
    pub(super) fn by_key(before: &Unit, after: &Unit) -> Self {
        let mut pairs = Self {
            to_after: vec![None; before.items.len()],
            to_before: vec![None; after.items.len()],
        };
        let (old, new) = (by_key(before), by_key(after));
        for (key, old) in old {
            let blocks = |unit: &Unit, ids: &[ItemId]| -> Vec<isize> {
                ids.iter().map(|id| unit.item(*id).order.blocks).collect()
            };
            let is_as_many = |new: &&Vec<ItemId>| match old.as_slice() {
                [_] => new.len() == 1,
                old => blocks(before, old) == blocks(after, new),
            };
            if let Some(new) = new.get(&key).filter(is_as_many) {
                let both = old.into_iter().zip(new);
                both.filter(|(b, a)| storage::can_serve(before, before.item(*b), after, after.item(**a)))
                    .for_each(|(b, a)| pairs.pair(b, *a));
            }
        }
        pairs
    }

    /// Pairs functions that only got another name, in the source or by the compiler.
    pub(super) fn pair_renamed(
        &mut self,
        before: &Unit,
        after: &Unit,
        is_equal: impl Fn(&Pairs, ItemId, ItemId) -> bool,
    ) {
        let free = |unit: &Unit, paired: &[Option<ItemId>]| -> Vec<ItemId> {
            let free = unit.items.iter().enumerate().zip(paired);
            free.filter(|((_, item), paired)| item.is_function && item.size > 0 && paired.is_none())
                .map(|((id, _), _)| id)
                .collect()
        };
        for _ in 0..ROUNDS_MAX {
            let (old, new) = (free(before, &self.to_after), free(after, &self.to_before));
            let mut found = None;
            for b in &old {
                // A function may call itself: equality is asked for as if the two were a pair.
                let equal = |a: &&ItemId| {
                    let mut with = self.clone();
                    with.pair(*b, **a);
                    before.item(*b).size == after.item(**a).size
                        && storage::can_serve(before, before.item(*b), after, after.item(**a))
                        && is_equal(&with, *b, **a)
                };
                let same: Vec<&ItemId> = new.iter().filter(equal).collect();
                let written = |id: &ItemId| names::written(&after.item(*id).name);
                let mut of_name = same
                    .iter()
                    .filter(|a| written(a) == names::written(&before.item(*b).name));
                let a = match (same.as_slice(), of_name.next(), of_name.next()) {
                    ([only], _, _) => Some(**only),
                    (_, Some(only), None) => Some(**only),
                    _ => None,
                };
                if let Some(a) = a {
                    found = Some((*b, a));
                    break;
                }
            }
            match found {
                Some((b, a)) => self.pair(b, a),
                None => return,
            }
        }
    }

    fn pair(&mut self, b: ItemId, a: ItemId) {
        if let Some(slot) = self.to_after.get_mut(b) {
            *slot = Some(a);
        }
        if let Some(slot) = self.to_before.get_mut(a) {
            *slot = Some(b);
        }
    }

    /// The item of the second file that an item of the first became.
    pub fn to_after(&self, before: ItemId) -> Option<ItemId> {
        self.to_after.get(before).copied().flatten()
    }

    /// The item of the first file that an item of the second was.
    pub fn to_before(&self, after: ItemId) -> Option<ItemId> {
        self.to_before.get(after).copied().flatten()
    }
}

fn by_key(unit: &Unit) -> BTreeMap<(&str, Option<String>), Vec<ItemId>> {
    let mut keys: BTreeMap<_, Vec<ItemId>> = BTreeMap::new();
    for (id, item) in unit.items.iter().enumerate() {
        let key = (item.key.as_str(), contents::of_counted(unit, id));
        keys.entry(key).or_default().push(id);
    }
    for ids in keys.values_mut() {
        ids.sort_by_key(|id| (unit.item(*id).order.number, *id));
    }
    keys
}
