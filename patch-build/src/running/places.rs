//! Which symbol of the kernel each item of a compiled file is, where several have one name.
//!
//! Names do not tell: hundreds of statics share one. Code does: a function is where the kernel has its very code, and a variable
//! where the code that uses it says.

use std::collections::{BTreeMap, BTreeSet};

use guest_core::pattern::Pattern;

use super::{Shipped, pattern};
use crate::compare::{Item, ItemId, Target, Unit, is_of_boot, names};
use crate::elf::{Place, Relocation};

/// More rounds than a chain of items is long of which each is only found through the one before it.
const ROUNDS_MAX: usize = 32;

/// Where an item is in the shipped kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Found {
    /// Its address.
    pub address: u64,
    /// Its position among the symbols of its name, from 1 on; 0 where it is the only one.
    pub sympos: u64,
    /// For a function: its code is the one that was compiled.
    pub is_same: bool,
}

/// Where the items of a unit are.
#[derive(Debug)]
pub struct Places {
    found: Vec<Option<Found>>,
    counts: Vec<usize>,
    codes: BTreeMap<ItemId, Pattern>,
}

impl Places {
    /// Finds the items of `unit` in what was shipped.
    ///
    /// Of several functions of one name that one is not taken for certain which has the very code, where it may be another file's: the
    /// kernel's own may differ from the compiled one in how far its jumps go. See [`Places::complete`].
    pub fn find(unit: &Unit, shipped: &Shipped<'_>) -> Self {
        Self::look(unit, shipped, false)
    }

    fn look(unit: &Unit, shipped: &Shipped<'_>, is_as_shipped: bool) -> Self {
        let candidates: Vec<Vec<u64>> = unit.items.iter().map(|item| shipped.named(&item.name)).collect();
        let mut addresses: Vec<Option<u64>> = vec![None; unit.items.len()];
        for (id, (item, candidates)) in unit.items.iter().zip(&candidates).enumerate() {
            let same: Vec<u64> = match (item.is_function && item.size > 0, candidates.len()) {
                (_, 1) => candidates.clone(),
                (true, _) => candidates
                    .iter()
                    .copied()
                    .filter(|at| has_code(unit, id, shipped, *at))
                    .collect(),
                (false, _) => Vec::new(),
            };
            if let ([only], Some(slot)) = (same.as_slice(), addresses.get_mut(id)) {
                *slot = Some(*only);
            }
        }
        if !is_as_shipped {
            for id in unsure(unit, shipped, &candidates, &addresses) {
                addresses.get_mut(id).map(Option::take);
            }
        }
        neighbours(unit, shipped, &candidates, &mut addresses);
        for _ in 0..ROUNDS_MAX {
            if !follow(unit, shipped, &candidates, &mut addresses) {
                break;
            }
        }
        let codes: BTreeMap<ItemId, Pattern> = addresses
            .iter()
            .enumerate()
            .filter_map(|(id, address)| Some((id, code(unit, id, shipped, (*address)?)?)))
            .collect();
        let found = addresses
            .iter()
            .zip(&candidates)
            .enumerate()
            .map(|(id, (address, candidates))| {
                let address = (*address)?;
                Some(Found {
                    address,
                    sympos: shipped.sympos(candidates, address)?,
                    is_same: codes.contains_key(&id),
                })
            });
        Self {
            found: found.collect(),
            counts: candidates.iter().map(Vec::len).collect(),
            codes,
        }
    }

    /// False where a function's shipped code is not the compiled one, or it is not known which of several it is. Functions that
    /// are gone when the system runs do not count, nor weak ones: another file has what the kernel took instead.
    pub fn are_complete(&self, unit: &Unit) -> bool {
        let mut functions = unit.items.iter().enumerate().filter(|(_, item)| {
            item.is_function
                && item.size > 0
                && !item.is_padding()
                && !unit.is_weak(item)
                && !is_of_boot(&unit.section_of(item).name)
        });
        functions.all(|(id, _)| self.count(id) == 0 || self.get(id).is_some_and(|found| found.is_same))
    }

    /// Adds what is only found by the same file as the kernel's own build compiles it.
    pub fn complete(&mut self, unit: &Unit, as_shipped: &Unit, shipped: &Shipped<'_>) {
        let others = Self::look(as_shipped, shipped, true);
        for (id, item) in unit.items.iter().enumerate() {
            let known = self.get(id).is_some_and(|found| found.is_same || !item.is_function);
            let other = as_shipped.named(&item.name).filter(|_| !known);
            let Some((other, found)) = other.and_then(|other| Some((other, others.get(other)?))) else {
                continue;
            };
            if let Some(slot) = self.found.get_mut(id) {
                *slot = Some(found);
            }
            if let Some(code) = others.codes.get(&other) {
                self.codes.insert(id, code.clone());
            }
        }
    }

    /// The code of a function as it was shipped, masked; none where it is not the compiled one.
    pub fn code(&self, id: ItemId) -> Option<&Pattern> {
        self.codes.get(&id)
    }

    /// Where an item is; none where it is not in the kernel, or not known which of several it is.
    pub fn get(&self, id: ItemId) -> Option<Found> {
        self.found.get(id).copied().flatten()
    }

    /// How many symbols of an item's name there are.
    pub fn count(&self, id: ItemId) -> usize {
        self.counts.get(id).copied().unwrap_or(0)
    }
}

/// True where the code at an address is the one that was compiled.
fn has_code(unit: &Unit, id: ItemId, shipped: &Shipped<'_>, at: u64) -> bool {
    code(unit, id, shipped, at).is_some()
}

/// The code at an address, masked, where it is the one that was compiled.
fn code(unit: &Unit, id: ItemId, shipped: &Shipped<'_>, at: u64) -> Option<Pattern> {
    let item = unit.item(id);
    let code = shipped.bytes(at, item.size).filter(|_| item.is_function)?;
    let is_same = pattern(unit, id, &unit.bytes(item)).mismatch(&code).is_none();
    is_same.then(|| pattern(unit, id, &code))
}

/// Those of the functions that were found by their code alone which do not lie where the rest of the file does: no function of the same kind
/// of section whose name is the only one is so near that they can be of one file.
fn unsure(unit: &Unit, shipped: &Shipped<'_>, candidates: &[Vec<u64>], addresses: &[Option<u64>]) -> BTreeSet<ItemId> {
    /// Functions are aligned to no more, in bytes.
    const ALIGN_MAX: u64 = 64;
    let is_one_of = |id: ItemId| candidates.get(id).is_some_and(|all| all.len() > 1);
    let functions = unit
        .items
        .iter()
        .enumerate()
        .filter(|(_, item)| item.is_function && item.size > 0);
    let placed = functions.filter_map(|(id, item)| Some((id, item, addresses.get(id).copied().flatten()?)));
    let (several, only): (Vec<_>, Vec<_>) = placed.partition(|(id, _, _)| is_one_of(*id));
    let kind = |item: &Item| {
        let name = &unit.section_of(item).name;
        let own = names::warm_part(&item.name).unwrap_or(&item.name);
        let kind = name.strip_suffix(own).and_then(|kind| kind.strip_suffix('.'));
        kind.unwrap_or(name).to_owned()
    };
    let mut sizes: BTreeMap<String, u64> = BTreeMap::new();
    for item in unit.items.iter().filter(|item| item.is_function) {
        *sizes.entry(kind(item)).or_default() += item.size.next_multiple_of(ALIGN_MAX) + ALIGN_MAX;
    }
    let is_alone = |(_, item, address): &(ItemId, &Item, u64)| {
        let of = kind(item);
        let reach = sizes.get(&of).copied().unwrap_or_default();
        !only.iter().any(|(id, other, at)| {
            at.abs_diff(*address) <= reach && kind(other) == of && has_code(unit, *id, shipped, *at)
        })
    };
    several
        .iter()
        .filter(|one| is_alone(one))
        .map(|(id, _, _)| *id)
        .collect()
}

/// Finds functions by those of the same section: what the compiler put there lies as far apart in the kernel.
fn neighbours(unit: &Unit, shipped: &Shipped<'_>, candidates: &[Vec<u64>], addresses: &mut [Option<u64>]) {
    let mut starts: BTreeMap<usize, u64> = BTreeMap::new();
    // One of which there is only one comes first.
    let is_one_of = |(id, _): &(usize, &Item)| candidates.get(*id).is_some_and(|all| all.len() > 1);
    let (several, only): (Vec<_>, Vec<_>) = unit.items.iter().enumerate().partition(is_one_of);
    for (id, item) in only.into_iter().chain(several) {
        if let Some(Some(address)) = addresses.get(id)
            && has_code(unit, id, shipped, *address)
        {
            starts
                .entry(item.at.section)
                .or_insert(address.wrapping_sub(item.at.offset));
        }
    }
    for (id, item) in unit.items.iter().enumerate() {
        let start = starts.get(&item.at.section);
        let (Some(start), Some(slot @ None)) = (start, addresses.get_mut(id)) else {
            continue;
        };
        let address = start.wrapping_add(item.at.offset);
        let is_named = candidates.get(id).is_some_and(|all| all.contains(&address));
        if is_named && has_code(unit, id, shipped, address) {
            *slot = Some(address);
        }
    }
}

/// Reads, from the code of functions that are known, where what they refer to is. True where something new was found.
fn follow(unit: &Unit, shipped: &Shipped<'_>, candidates: &[Vec<u64>], addresses: &mut [Option<u64>]) -> bool {
    let mut news = false;
    for (id, item) in unit.items.iter().enumerate() {
        let Some(Some(start)) = addresses.get(id).copied() else {
            continue;
        };
        if item.is_function && !has_code(unit, id, shipped, start) {
            continue;
        }
        for relocation in unit.relocations(item) {
            let Target::Item(target, _) = unit.target(item.at.section, relocation) else {
                continue;
            };
            let known = addresses.get(target).copied().flatten().is_some();
            let at = start.wrapping_add(relocation.offset - item.at.offset);
            let address = (!known).then(|| value(unit, shipped, relocation, at, target)).flatten();
            let address = address.filter(|address| candidates.get(target).is_some_and(|all| all.contains(address)));
            if let (Some(address), Some(slot)) = (address, addresses.get_mut(target)) {
                *slot = Some(address);
                news = true;
            }
        }
    }
    news
}

/// The address of item `target` by what was shipped at `at` for a relocation that refers to it.
fn value(unit: &Unit, shipped: &Shipped<'_>, relocation: &Relocation, at: u64, target: ItemId) -> Option<u64> {
    let stored = shipped.stored(at, relocation.kind)?;
    // Stored is symbol plus addend; the item lies in the symbol's section, as far from it as here.
    let symbol = stored.wrapping_sub(relocation.addend.cast_unsigned());
    let Place::In(base) = unit.object.symbol(relocation)?.place else {
        return None;
    };
    let item = unit.item(target).at;
    (base.section == item.section).then(|| symbol.wrapping_add(item.offset.wrapping_sub(base.offset)))
}
