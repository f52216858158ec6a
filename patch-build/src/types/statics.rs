//! Whose a static variable is: the compiler's number in `warned.3` does not say, debug information does.

use std::collections::BTreeMap;

use gimli::{AttributeValue, Operation};

use super::DebugError;
use super::load::{self, DebugInfo, MainFile, Slice};
use crate::elf::At;

/// Where in the source a static local stands: the compiler writes them in any order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Order {
    /// How many stand before it in the file.
    pub number: usize,
    /// How many blocks of its function it is in.
    pub blocks: isize,
}

/// The functions that static local variables belong to, by the variables' places, and where functions start.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Statics {
    owners: BTreeMap<At, String>,
    /// How many stand before it in the source, and how many blocks it is in.
    order: BTreeMap<At, Order>,
    /// By name, for functions of the file itself.
    lines: BTreeMap<String, u64>,
}

impl Statics {
    /// Reads them.
    ///
    /// Errors: damaged debug information. A file without any has no static locals.
    pub fn read(info: &DebugInfo) -> Result<Self, DebugError> {
        let dwarf = info.dwarf()?;
        let mut statics = Self::default();
        let mut units = dwarf.units();
        while let Some(header) = units.next()? {
            let unit = dwarf.unit(header)?;
            statics.read_unit(&dwarf, &unit)?;
        }
        Ok(statics)
    }

    fn read_unit(&mut self, dwarf: &gimli::Dwarf<Slice<'_>>, unit: &gimli::Unit<Slice<'_>>) -> Result<(), DebugError> {
        let main = MainFile::of(dwarf, unit);
        let mut functions: Vec<(isize, String)> = Vec::new();
        let mut entries = unit.entries();
        while let Some(entry) = entries.next_dfs()? {
            let depth = entry.depth();
            while functions.last().is_some_and(|(of, _)| *of >= depth) {
                functions.pop();
            }
            match entry.tag() {
                gimli::DW_TAG_subprogram => {
                    // A function's body may stand apart from its declaration, which has the name.
                    let name = load::name(dwarf, unit, entry).unwrap_or_default();
                    let number = |what| entry.attr_value(what).and_then(|value| value.udata_value());
                    if let Some(line) = number(gimli::DW_AT_decl_line).filter(|_| main.has(entry)) {
                        self.lines.entry(name.clone()).or_insert(line);
                    }
                    functions.push((depth, name));
                }
                gimli::DW_TAG_variable => {
                    let owner = functions.last().map(|(_, name)| name.clone());
                    if let (Some(owner), Some(at)) = (owner.filter(|name| !name.is_empty()), location(unit, entry)) {
                        let blocks = functions.last().map_or(0, |(of, _)| depth.saturating_sub(*of));
                        let number = self.order.len();
                        self.order.entry(at).or_insert(Order { number, blocks });
                        self.owners.entry(at).or_insert(owner);
                    }
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// The function that the variable at a place is local to; none for a variable of the whole file.
    pub fn owner(&self, at: At) -> Option<&str> {
        self.owners.get(&at).map(String::as_str)
    }

    /// Where among the static locals of the file the one at a place stands in the source.
    pub fn order(&self, at: At) -> Order {
        self.order.get(&at).copied().unwrap_or_default()
    }
}

impl Statics {
    /// Lines at which the file's functions start, by name.
    pub fn lines(&self) -> &BTreeMap<String, u64> {
        &self.lines
    }
}

/// Where a variable is, where that is one place for the whole program.
pub(super) fn location(
    unit: &gimli::Unit<Slice<'_>>,
    entry: &gimli::DebuggingInformationEntry<Slice<'_>>,
) -> Option<At> {
    let AttributeValue::Exprloc(expression) = entry.attr_value(gimli::DW_AT_location)? else {
        return None;
    };
    let mut operations = expression.operations(unit.encoding());
    match operations.next().ok()?? {
        Operation::Address { address } => load::place(address),
        _ => None,
    }
}
