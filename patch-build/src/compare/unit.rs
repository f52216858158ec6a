//! One object file as a programmer sees it: functions and variables, and what each refers to.

use std::collections::{BTreeMap, BTreeSet};

use object::elf::{R_X86_64_NONE, R_X86_64_PC32, R_X86_64_PLT32, STB_WEAK};

use super::tables::{self, Entry, TableError};
use super::{CompareError, names};
use crate::elf::code::Code;
use crate::elf::{At, Object, Place, Relocation, Section, Symbol};
use crate::types::{Order, Statics};

/// Index of an [`Item`] in its [`Unit`].
pub type ItemId = usize;

/// A function or a variable: a named piece of a section.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Item {
    /// Its symbol's name: `warned.3`.
    pub name: String,
    /// What it is, whatever the compiler counted: `f:warned`. Several items may have one key.
    pub key: String,
    /// Code.
    pub is_function: bool,
    /// Seen by this file only.
    pub is_local: bool,
    /// Where it starts.
    pub at: At,
    /// Its bytes.
    pub size: u64,
    /// Index of its symbol.
    pub symbol: usize,
    /// For a static local: where in the source it stands.
    pub order: Order,
}

impl Item {
    /// True for what objtool puts in front of a function, under the function's name (tools/objtool/elf.c of 6.2, `__pfx_`).
    pub fn is_padding(&self) -> bool {
        self.name.starts_with("__pfx_")
    }
}

/// What a relocation refers to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// A symbol of another file, and how far behind it.
    Extern(String, i64),
    /// A place in an item, counted from its start.
    Item(ItemId, i64),
    /// A text constant, and how far from its start.
    Text(Vec<u8>, i64),
    /// A label that is in no item, and how far from it.
    Unnamed(At, i64),
    /// A number.
    Number(i64),
}

/// An object file, taken apart.
#[derive(Debug)]
pub struct Unit {
    /// The file.
    pub object: Object,
    /// Its functions and variables, in the order of their places.
    pub items: Vec<Item>,
    /// By symbol.
    by_symbol: BTreeMap<usize, ItemId>,
    /// By section: items, ascending.
    by_section: BTreeMap<usize, Vec<ItemId>>,
    /// By section of code.
    code: BTreeMap<usize, Code>,
    /// What its tables say, by item; entries about no item are left out.
    entries: BTreeMap<ItemId, Vec<Entry>>,
}

impl Unit {
    /// Takes a file apart.
    ///
    /// Errors: a table that is not understood.
    pub fn new(object: Object, statics: &Statics) -> Result<Self, TableError> {
        let mut items = items(&object, statics);
        items.sort_by(|a, b| (a.at, b.size, &a.name).cmp(&(b.at, a.size, &b.name)));
        let mut by_section: BTreeMap<usize, Vec<ItemId>> = BTreeMap::new();
        for (id, item) in items.iter().enumerate() {
            by_section.entry(item.at.section).or_default().push(id);
        }
        let code = object
            .sections
            .iter()
            .enumerate()
            .filter(|(_, section)| section.is_code())
            .map(|(index, section)| (index, Code::of(section)))
            .collect();
        let by_symbol = items.iter().enumerate().map(|(id, item)| (item.symbol, id)).collect();
        let mut unit = Self {
            object,
            items,
            by_symbol,
            by_section,
            code,
            entries: BTreeMap::new(),
        };
        let mut entries = tables::entries(&unit.object)?;
        let functions = unit.items.iter().filter(|item| item.is_function && item.size > 0);
        let starts: BTreeSet<At> = functions.map(|item| item.at).collect();
        let inherited = starts
            .into_iter()
            .filter_map(|start| tables::inherited(&entries, start));
        let inherited: Vec<Entry> = inherited.collect();
        entries.extend(inherited);
        for entry in entries {
            let Some((id, _)) = unit.item_at(entry.place, true) else {
                continue;
            };
            for alias in unit.aliases(id) {
                unit.entries.entry(alias).or_default().push(entry.clone());
            }
        }
        // Which table comes first in the file, and what stands first in it, code decides that came before.
        for entries in unit.entries.values_mut() {
            let name = |entry: &Entry| unit.object.sections.get(entry.at.section).map(|section| &section.name);
            entries.sort_by(|a, b| (a.table, name(a), a.place).cmp(&(b.table, name(b), b.place)));
        }
        Ok(unit)
    }

    /// Takes a file apart without its debug information: keys of static locals do not say whose they are.
    ///
    /// Errors: as of [`Comparison::of`](super::Comparison::of).
    pub fn plain(bytes: &[u8]) -> Result<Self, CompareError> {
        Ok(Self::new(Object::parse(bytes)?, &Statics::default())?)
    }

    /// The item of an index. Indexes come from this unit.
    pub fn item(&self, id: ItemId) -> &Item {
        &self.items[id]
    }

    /// The item of that symbol name, where there is one.
    pub fn named(&self, name: &str) -> Option<ItemId> {
        self.items.iter().position(|item| item.name == name)
    }

    /// The section that an item is in.
    pub fn section_of(&self, item: &Item) -> &Section {
        &self.object.sections[item.at.section]
    }

    /// True for what the linker only takes where no other file has it.
    pub fn is_weak(&self, item: &Item) -> bool {
        let symbol = self.object.symbols.get(item.symbol);
        symbol.is_some_and(|symbol| symbol.binding == STB_WEAK.0)
    }

    /// Bytes of an item: zeros for one that has none in the file.
    pub fn bytes(&self, item: &Item) -> Vec<u8> {
        self.section_of(item)
            .bytes(item.at.offset, item.size)
            .unwrap_or_default()
    }

    /// The relocations in an item.
    pub fn relocations(&self, item: &Item) -> &[Relocation] {
        let start = item.at.offset;
        self.section_of(item).relocations_in(start, start + item.size)
    }

    /// What tables say of an item.
    pub(crate) fn entries(&self, id: ItemId) -> &[Entry] {
        self.entries.get(&id).map(Vec::as_slice).unwrap_or_default()
    }

    /// The entry of a table that a place is in, and the item that it is about.
    pub(crate) fn entry_at(&self, at: At) -> Option<(ItemId, &Entry)> {
        let holds = |entry: &&Entry| {
            let past = at.offset.checked_sub(entry.at.offset);
            !entry.is_inherited && entry.at.section == at.section && past.is_some_and(|past| past < entry.len)
        };
        // Of several names of one piece the last one is meant, as by `item_at`.
        let mut items = self.entries.iter().rev();
        items.find_map(|(id, entries)| Some((*id, entries.iter().find(holds)?)))
    }

    /// The item that a place is in, and the bytes from its start. With `end`, the place may also be just behind an item.
    pub fn item_at(&self, at: At, end: bool) -> Option<(ItemId, i64)> {
        let ids = self.by_section.get(&at.section)?;
        let behind = ids.partition_point(|id| self.items[*id].at.offset <= at.offset);
        let candidates = ids.get(..behind)?.iter().rev();
        let holds = |id: &&ItemId| {
            let item = &self.items[**id];
            let past = at.offset - item.at.offset;
            past < item.size || past == 0 || (end && past == item.size)
        };
        // Nested symbols are rare (aliases, entry points of assembly): a few steps back find the holder.
        let id = *candidates.take(8).find(holds)?;
        let offset = i64::try_from(at.offset - self.items[id].at.offset).ok()?;
        Some((id, offset))
    }

    /// An item and all others that are but names for the same piece: written as such, or functions whose code is the same, of which
    /// the compiler makes one. The last of them is what [`Unit::item_at`] gives for all.
    pub(crate) fn aliases(&self, id: ItemId) -> Vec<ItemId> {
        let item = self.item(id);
        let ids = self
            .by_section
            .get(&item.at.section)
            .map(Vec::as_slice)
            .unwrap_or_default();
        let same = |other: &&ItemId| {
            let other = self.item(**other);
            other.at == item.at && other.size == item.size
        };
        ids.iter().filter(same).copied().collect()
    }

    /// The last of an item's names, which stands for all.
    fn last_alias(&self, id: ItemId) -> ItemId {
        self.aliases(id).last().copied().unwrap_or(id)
    }

    /// What a relocation of section `section` refers to.
    pub fn target(&self, section: usize, relocation: &Relocation) -> Target {
        if relocation.kind == R_X86_64_NONE.0 {
            return Target::Number(0);
        }
        let Some(symbol) = self.object.symbol(relocation) else {
            return Target::Number(relocation.addend);
        };
        let addend = relocation.addend.saturating_add(self.bias(section, relocation));
        match symbol.place {
            Place::In(base) => match self.by_symbol.get(&relocation.symbol) {
                // A named symbol is what is meant, even where the value lies outside it: `&table[-1]`.
                Some(id) => Target::Item(self.last_alias(*id), addend),
                None => self.label_target(section, relocation, base, addend),
            },
            Place::Absolute(value) => Target::Number(addend.saturating_add_unsigned(value)),
            _ => Target::Extern(symbol.name.clone(), addend),
        }
    }

    /// The item that a relocation names; none where it means a label. Of several names of one piece it is the one that the source has there.
    pub(crate) fn named_by(&self, relocation: &Relocation) -> Option<ItemId> {
        self.by_symbol.get(&relocation.symbol).copied()
    }

    /// What the addend of a relocation lacks to what is meant: a place-relative value counts from where it is stored, the
    /// processor from the end of the instruction.
    pub(crate) fn bias(&self, section: usize, relocation: &Relocation) -> i64 {
        let relative = [R_X86_64_PC32.0, R_X86_64_PLT32.0].contains(&relocation.kind);
        let code = self.code.get(&section).filter(|_| relative);
        match code.map(|code| code.place(relocation)) {
            Some(Some(place)) => i64::try_from(place.end - relocation.offset).unwrap_or(4),
            Some(None) => 4,
            None => 0,
        }
    }

    /// What a label of the compiler's or of inline assembly means: of a section's own symbol, the addend says where the label is.
    fn label_target(&self, section: usize, relocation: &Relocation, base: At, addend: i64) -> Target {
        let size = self.object.section(base.section).map_or(0, |section| section.size);
        let is_section = self.object.symbol(relocation).is_some_and(Symbol::is_section);
        let moved = base
            .offset
            .checked_add_signed(addend)
            .filter(|offset| is_section && *offset <= size);
        let (label, past) = match moved {
            Some(offset) => (At { offset, ..base }, 0),
            None => (base, addend),
        };
        if let Some((id, inside)) = self.item_of_label(section, relocation, label) {
            return Target::Item(id, inside.saturating_add(past));
        }
        let strings = self
            .object
            .section(label.section)
            .filter(|section| section.is_strings());
        match strings.and_then(|section| text_at(section, label.offset)) {
            Some(text) => Target::Text(text, past),
            None => Target::Unnamed(label, past),
        }
    }

    /// The item that a label is in. Where one function ends and another starts, the label is of the function that refers to it.
    fn item_of_label(&self, section: usize, relocation: &Relocation, label: At) -> Option<(ItemId, i64)> {
        let holder = self.item_at(label, false);
        if !self.code.contains_key(&label.section) {
            return holder.filter(|(id, _)| self.item(*id).size > 0);
        }
        let Some((ended, size)) = self.item_that_ends_at(label) else {
            return holder;
        };
        let from = At {
            section,
            offset: relocation.offset,
        };
        let by = self.item_at(from, false).map(|(id, _)| id);
        let by = by.or_else(|| Some(self.entry_at(from)?.0));
        let is_own = by.is_some_and(|by| {
            let whole = names::warm_part(&self.item(by).name).and_then(|name| self.named(name));
            [Some(by), whole]
                .into_iter()
                .flatten()
                .any(|by| self.last_alias(by) == ended)
        });
        match holder {
            Some(_) if !is_own => holder,
            _ => Some((ended, size)),
        }
    }

    /// The item that ends at a place, and its size.
    fn item_that_ends_at(&self, at: At) -> Option<(ItemId, i64)> {
        let ids = self.by_section.get(&at.section)?;
        let ends = |id: &&ItemId| {
            let item = self.item(**id);
            item.size > 0 && item.at.offset.checked_add(item.size) == Some(at.offset)
        };
        let id = *ids.iter().rev().find(ends)?;
        Some((id, i64::try_from(self.item(id).size).ok()?))
    }

    /// True where a relocation of code is the target of a call or jump: the value is run, not kept.
    pub fn is_branch(&self, section: usize, relocation: &Relocation) -> bool {
        let place = self.code.get(&section).and_then(|code| code.place(relocation));
        place.is_some_and(|place| place.is_branch)
    }
}

/// Code that is gone, or never runs again, once the system is up.
pub fn is_of_boot(section: &str) -> bool {
    [".init.", ".exit.", ".meminit.", ".head."]
        .iter()
        .any(|prefix| section.starts_with(prefix))
}

/// The text constant at an offset of its section, with the zero byte that ends it.
fn text_at(section: &Section, offset: u64) -> Option<Vec<u8>> {
    let rest = section.data.get(usize::try_from(offset).ok()?..)?;
    let end = rest.iter().position(|byte| *byte == 0)?;
    rest.get(..=end).map(<[u8]>::to_vec)
}

fn items(object: &Object, statics: &Statics) -> Vec<Item> {
    let mut items = Vec::new();
    for (index, symbol) in object.symbols.iter().enumerate() {
        let Place::In(at) = symbol.place else { continue };
        let loaded = object.section(at.section).is_some_and(Section::is_loaded);
        if !loaded || !(symbol.is_function() || symbol.is_data()) {
            continue;
        }
        let key = if symbol.is_function() {
            names::function(&symbol.name)
        } else {
            match statics.owner(at) {
                Some(owner) => format!("{owner}:{}", names::variable(&symbol.name)),
                None if symbol.is_local() => names::variable(&symbol.name).to_owned(),
                None => symbol.name.clone(),
            }
        };
        items.push(Item {
            name: symbol.name.clone(),
            key,
            is_function: symbol.is_function(),
            is_local: symbol.is_local(),
            at,
            size: symbol.size,
            symbol: index,
            order: statics.order(at),
        });
    }
    items
}
