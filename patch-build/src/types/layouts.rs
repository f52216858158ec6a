//! How structures and unions are laid out, for comparing them before and after a change.

use std::collections::BTreeMap;

use gimli::{AttributeValue, UnitOffset};

use super::DebugError;
use super::load::{self, DebugInfo, Slice};

/// More levels of a type than any has (arrays of pointers to structures in unions …): ends what would not end.
const DEPTH_MAX: usize = 32;

/// One structure's or union's layout, as text: its size, and each member with its offset and type.
pub type Shape = String;

/// The named structures and unions that an object file knows in full.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Layouts {
    shapes: BTreeMap<String, Shape>,
}

impl Layouts {
    /// Reads them.
    ///
    /// Errors: damaged debug information.
    pub fn read(info: &DebugInfo) -> Result<Self, DebugError> {
        let dwarf = info.dwarf()?;
        let mut shapes = BTreeMap::new();
        let mut units = dwarf.units();
        while let Some(header) = units.next()? {
            let unit = dwarf.unit(header)?;
            let mut entries = unit.entries();
            while let Some(entry) = entries.next_dfs()? {
                let what = match entry.tag() {
                    gimli::DW_TAG_structure_type => "struct",
                    gimli::DW_TAG_union_type => "union",
                    _ => continue,
                };
                let Some(name) = load::text(&dwarf, &unit, entry, gimli::DW_AT_name) else {
                    continue;
                };
                if entry.attr_value(gimli::DW_AT_declaration).is_none() {
                    let shape = shape(&dwarf, &unit, entry.offset(), 0)?;
                    shapes.entry(format!("{what} {name}")).or_insert(shape);
                }
            }
        }
        Ok(Self { shapes })
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
