//! How structures and unions are laid out, for comparing them before and after a change.

use std::collections::{BTreeMap, BTreeSet};

use gimli::{AttributeValue, UnitOffset};

use super::load::{self, DebugInfo, MainFile, Slice};
use super::{DebugError, statics};
use crate::elf::At;

/// More levels of a type than any has (arrays of pointers to structures in unions …): ends what would not end.
const DEPTH_MAX: usize = 32;

/// One structure's or union's layout, as text: its size, and each member with its offset and type.
pub type Shape = String;

/// The named structures and unions that an object file knows in full.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Layouts {
    shapes: BTreeMap<String, Shape>,
    /// Those that the compiled file itself defines.
    own: BTreeSet<String>,
    /// By function: the structures that it reaches through a variable of its own, or of one that is inlined there.
    reached: BTreeMap<String, BTreeSet<String>>,
    /// The types of variables, by their places.
    variables: BTreeMap<At, Shape>,
}

impl Layouts {
    /// Reads them.
    ///
    /// Errors: damaged debug information.
    pub fn read(info: &DebugInfo) -> Result<Self, DebugError> {
        let dwarf = info.dwarf()?;
        let mut layouts = Self::default();
        let mut units = dwarf.units();
        while let Some(header) = units.next()? {
            let unit = dwarf.unit(header)?;
            layouts.read_unit(&dwarf, &unit)?;
        }
        Ok(layouts)
    }

    fn read_unit(&mut self, dwarf: &Dwarf<'_>, unit: &Unit<'_>) -> Result<(), DebugError> {
        let main = MainFile::of(dwarf, unit);
        let mut function: Option<(isize, String)> = None;
        let mut entries = unit.entries();
        while let Some(entry) = entries.next_dfs()? {
            if function.as_ref().is_some_and(|(depth, _)| *depth >= entry.depth()) {
                function = None;
            }
            match entry.tag() {
                gimli::DW_TAG_structure_type | gimli::DW_TAG_union_type => {
                    self.read_shape(dwarf, unit, entry, &main)?
                }
                gimli::DW_TAG_typedef => self.read_typedef(dwarf, unit, entry, &main)?,
                gimli::DW_TAG_subprogram => {
                    let name = load::name(dwarf, unit, entry).unwrap_or_default();
                    function = Some((entry.depth(), name));
                }
                gimli::DW_TAG_variable | gimli::DW_TAG_formal_parameter => {
                    self.read_variable(dwarf, unit, entry)?;
                    if let (Some((_, function)), Some(structure)) = (&function, pointee(dwarf, unit, entry)) {
                        self.reached.entry(function.clone()).or_default().insert(structure);
                    }
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn read_variable(
        &mut self,
        dwarf: &Dwarf<'_>,
        unit: &Unit<'_>,
        entry: &gimli::DebuggingInformationEntry<Slice<'_>>,
    ) -> Result<(), DebugError> {
        let Some(at) = statics::location(unit, entry) else {
            return Ok(());
        };
        // One that was declared before has its type there.
        let kind = reference(entry).or_else(|| reference(&load::origin(unit, entry)?));
        if let Some(kind) = kind {
            self.variables.insert(at, type_text(dwarf, unit, kind, 0)?);
        }
        Ok(())
    }

    /// The type of the variable at a place, as text.
    pub fn of_variable(&self, at: At) -> Option<&str> {
        self.variables.get(&at).map(String::as_str)
    }

    fn read_shape(
        &mut self,
        dwarf: &Dwarf<'_>,
        unit: &Unit<'_>,
        entry: &gimli::DebuggingInformationEntry<Slice<'_>>,
        main: &MainFile,
    ) -> Result<(), DebugError> {
        let Some(name) = structure_name(dwarf, unit, entry) else {
            return Ok(());
        };
        if entry.attr_value(gimli::DW_AT_declaration).is_none() {
            let shape = shape(dwarf, unit, entry.offset(), 0)?;
            self.add(name, shape, main.has(entry));
        }
        Ok(())
    }

    /// A structure without a tag is known by its typedef.
    fn read_typedef(
        &mut self,
        dwarf: &Dwarf<'_>,
        unit: &Unit<'_>,
        entry: &gimli::DebuggingInformationEntry<Slice<'_>>,
        main: &MainFile,
    ) -> Result<(), DebugError> {
        let (Some(name), Some(at)) = (load::text(dwarf, unit, entry, gimli::DW_AT_name), reference(entry)) else {
            return Ok(());
        };
        if is_structure_without_tag(dwarf, unit, &unit.entry(at)?) {
            self.add(name, shape(dwarf, unit, at, 0)?, main.has(entry));
        }
        Ok(())
    }

    fn add(&mut self, name: String, shape: Shape, is_own: bool) {
        if is_own {
            self.own.insert(name.clone());
        }
        self.shapes.entry(name).or_insert(shape);
    }

    /// The structures that are new in `after`, and defined by the file itself, and that its function reaches through a pointer.
    pub fn new_behind_pointers<'a>(&self, after: &'a Self, function: &str) -> Vec<&'a str> {
        let reached = after.reached.get(function).into_iter().flatten();
        reached
            .filter(|name| after.own.contains(*name) && !self.shapes.contains_key(*name))
            .map(String::as_str)
            .collect()
    }

    /// The types that both know, with another layout: name, before, after.
    pub fn changed<'a>(&'a self, after: &'a Self) -> impl Iterator<Item = (&'a str, &'a str, &'a str)> {
        self.shapes.iter().filter_map(|(name, before)| {
            let after = after.shapes.get(name)?;
            (before != after).then_some((name.as_str(), before.as_str(), after.as_str()))
        })
    }
}

type Dwarf<'d> = gimli::Dwarf<Slice<'d>>;
type Unit<'d> = gimli::Unit<Slice<'d>>;

/// `struct s` for the structure s; none for one without a name, and for what is none.
fn structure_name(
    dwarf: &Dwarf<'_>,
    unit: &Unit<'_>,
    entry: &gimli::DebuggingInformationEntry<Slice<'_>>,
) -> Option<String> {
    let what = match entry.tag() {
        gimli::DW_TAG_structure_type => "struct",
        gimli::DW_TAG_union_type => "union",
        _ => return None,
    };
    let name = load::text(dwarf, unit, entry, gimli::DW_AT_name)?;
    Some(format!("{what} {name}"))
}

fn is_structure_without_tag(
    dwarf: &Dwarf<'_>,
    unit: &Unit<'_>,
    entry: &gimli::DebuggingInformationEntry<Slice<'_>>,
) -> bool {
    let is_structure = [gimli::DW_TAG_structure_type, gimli::DW_TAG_union_type].contains(&entry.tag());
    is_structure && structure_name(dwarf, unit, entry).is_none()
}

/// The structure that a variable points to, where it is such a pointer.
fn pointee(
    dwarf: &Dwarf<'_>,
    unit: &Unit<'_>,
    variable: &gimli::DebuggingInformationEntry<Slice<'_>>,
) -> Option<String> {
    let mut at = match reference(variable) {
        Some(at) => at,
        // Of an inlined function: what its own text says.
        None => reference(&load::origin(unit, variable)?)?,
    };
    let mut is_pointer = false;
    let mut typedef = None;
    for _ in 0..DEPTH_MAX {
        let entry = unit.entry(at).ok()?;
        match entry.tag() {
            gimli::DW_TAG_pointer_type if is_pointer => return None,
            gimli::DW_TAG_pointer_type => is_pointer = true,
            gimli::DW_TAG_const_type | gimli::DW_TAG_volatile_type => {}
            gimli::DW_TAG_typedef => typedef = load::text(dwarf, unit, &entry, gimli::DW_AT_name),
            _ if !is_pointer => return None,
            _ if is_structure_without_tag(dwarf, unit, &entry) => return typedef,
            _ => return structure_name(dwarf, unit, &entry),
        }
        at = reference(&entry)?;
    }
    None
}

/// Size and members of the structure or union at `offset`.
fn shape(dwarf: &Dwarf<'_>, unit: &Unit<'_>, offset: UnitOffset, depth: usize) -> Result<Shape, DebugError> {
    let mut tree = unit.entries_tree(Some(offset))?;
    let root = tree.root()?;
    let mut shape = format!("{} bytes", number(root.entry(), gimli::DW_AT_byte_size).unwrap_or(0));
    let mut children = root.children();
    while let Some(child) = children.next()? {
        let entry = child.entry();
        if entry.tag() != gimli::DW_TAG_member {
            continue;
        }
        let name = load::text(dwarf, unit, entry, gimli::DW_AT_name).unwrap_or_default();
        let at = number(entry, gimli::DW_AT_data_member_location).unwrap_or(0);
        let kind = match reference(entry) {
            Some(of) => type_text(dwarf, unit, of, depth)?,
            None => String::new(),
        };
        shape.push_str(&format!("; +{at} {name} {kind}"));
        if let Some(bits) = number(entry, gimli::DW_AT_bit_size) {
            let start = number(entry, gimli::DW_AT_data_bit_offset).unwrap_or(0);
            shape.push_str(&format!(" bits {start}+{bits}"));
        }
    }
    Ok(shape)
}

/// A type as text; a named structure by its name only, as it has a shape of its own.
fn type_text(dwarf: &Dwarf<'_>, unit: &Unit<'_>, offset: UnitOffset, depth: usize) -> Result<String, DebugError> {
    if depth > DEPTH_MAX {
        return Ok("…".to_owned());
    }
    let entry = unit.entry(offset)?;
    let name = load::text(dwarf, unit, &entry, gimli::DW_AT_name);
    let inner = |what: &str| -> Result<String, DebugError> {
        match reference(&entry) {
            Some(of) => Ok(format!("{what}{}", type_text(dwarf, unit, of, depth + 1)?)),
            None => Ok(format!("{what}void")),
        }
    };
    match (entry.tag(), name) {
        (gimli::DW_TAG_pointer_type, _) => inner("*"),
        (gimli::DW_TAG_const_type | gimli::DW_TAG_volatile_type | gimli::DW_TAG_typedef, _) => inner(""),
        (gimli::DW_TAG_array_type, _) => {
            let mut tree = unit.entries_tree(Some(offset))?;
            let mut children = tree.root()?.children();
            let mut counts = String::new();
            while let Some(child) = children.next()? {
                let count = number(child.entry(), gimli::DW_AT_count)
                    .or_else(|| number(child.entry(), gimli::DW_AT_upper_bound).map(|last| last.wrapping_add(1)));
                counts.push_str(&format!("[{}]", count.unwrap_or(0)));
            }
            inner(&counts)
        }
        // Two functions' types differ in what is called, not in the layout.
        (gimli::DW_TAG_subroutine_type, _) => Ok("function".to_owned()),
        (gimli::DW_TAG_structure_type, Some(name)) => Ok(format!("struct {name}")),
        (gimli::DW_TAG_union_type, Some(name)) => Ok(format!("union {name}")),
        (gimli::DW_TAG_structure_type | gimli::DW_TAG_union_type, None) => {
            Ok(format!("{{{}}}", shape(dwarf, unit, offset, depth + 1)?))
        }
        (gimli::DW_TAG_enumeration_type, _) => Ok(format!(
            "enum of {} bytes",
            number(&entry, gimli::DW_AT_byte_size).unwrap_or(0)
        )),
        (_, Some(name)) => Ok(name),
        (tag, None) => Ok(tag.to_string()),
    }
}

fn reference(entry: &gimli::DebuggingInformationEntry<Slice<'_>>) -> Option<UnitOffset> {
    match entry.attr_value(gimli::DW_AT_type)? {
        AttributeValue::UnitRef(offset) => Some(offset),
        _ => None,
    }
}

fn number(entry: &gimli::DebuggingInformationEntry<Slice<'_>>, what: gimli::DwAt) -> Option<u64> {
    entry.attr_value(what)?.udata_value()
}
