//! What speaks against a patch: what a person has to have thought about before it may be built.

use std::fmt;
use std::str::FromStr;

use super::reference::is_never_switched;
use super::{SelectError, Selection, Side, left_out};
use crate::compare::tables::{ORC, TABLES};
use crate::compare::{Target, Verdict, is_of_boot, names};
use crate::elf::Section;

/// Kinds of risk, each of which `--allow` can name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Risk {
    /// Data that exists already has other contents or another size.
    ChangedData,
    /// A structure is laid out otherwise.
    Layout,
    /// Code that has already run.
    Init,
    /// A variable of the whole kernel is gone.
    RemovedGlobal,
    /// A new static key.
    StaticKey,
    /// Old code stays in places that were not compiled.
    Inlined,
    /// The kernel's code is not the one that the source gives.
    OtherCode,
    /// A static variable starts afresh.
    FreshStatic,
    /// Objects that exist already lack what new code looks for in them.
    NewState,
    /// Something new that the module does not carry.
    LeftOut,
}

const NAMES: [(Risk, &str); 10] = [
    (Risk::ChangedData, "changed-data"),
    (Risk::Layout, "layout"),
    (Risk::Init, "init"),
    (Risk::RemovedGlobal, "removed-global"),
    (Risk::StaticKey, "static-key"),
    (Risk::Inlined, "inlined"),
    (Risk::OtherCode, "other-code"),
    (Risk::FreshStatic, "fresh-static"),
    (Risk::NewState, "new-state"),
    (Risk::LeftOut, "left-out"),
];

impl Risk {
    /// All of them.
    pub fn all() -> impl Iterator<Item = Self> {
        NAMES.into_iter().map(|(risk, _)| risk)
    }

    /// Its name, as `--allow` takes it.
    pub fn name(self) -> &'static str {
        NAMES
            .iter()
            .find(|(risk, _)| *risk == self)
            .map_or("", |(_, name)| name)
    }
}

impl fmt::Display for Risk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Risk {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let found = NAMES.iter().find(|(_, name)| *name == text).map(|(risk, _)| *risk);
        found.ok_or_else(|| {
            let known: Vec<&str> = NAMES.iter().map(|(_, name)| *name).collect();
            format!("no such risk; there are {}", known.join(", "))
        })
    }
}

/// Something that speaks against a patch, or against a part of it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Finding {
    /// What kind.
    pub risk: Risk,
    /// The file, and the function, variable or type.
    pub place: String,
    /// What was found, and why it matters.
    pub reason: String,
}

impl Finding {
    pub(super) fn new(risk: Risk, place: String, reason: String) -> Self {
        Self { risk, place, reason }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {} (--allow {})", self.place, self.reason, self.risk)
    }
}

/// Sections that list functions without saying anything that their new code needs.
const LISTS: [&str; 14] = [
    "__ksymtab",
    "___ksymtab",
    "__kcrctab",
    ".initcall",
    ".exitcall",
    ".con_initcall",
    ".discard",
    "_error_injection_whitelist",
    ".export_symbol",
    ".modinfo",
    ".note",
    ".BTF",
    ".printk_index",
    ".gnu.linkonce.this_module",
];

/// Looks at a selection for everything that speaks against it.
pub(super) fn look(sides: &[Side<'_>], selection: &mut Selection) -> Result<(), SelectError> {
    let mut findings = Vec::new();
    for (index, side) in sides.iter().enumerate() {
        let touched = selection.carried.keys().any(|(of, _)| *of == index);
        changed_data(side, &mut findings);
        left_out::look(index, side, selection, &mut findings);
        if touched {
            layouts(side, &mut findings);
            new_data(index, side, selection, &mut findings);
            per_cpu(index, side, selection)?;
            unknown_sections(index, side, selection)?;
            private_copies(index, side, selection, &mut findings);
        }
    }
    for replaced in &selection.replaced {
        let Some(side) = sides.get(replaced.new.0) else {
            continue;
        };
        let after = &side.comparison.after;
        let new = &after.item(replaced.new.1).name;
        // Debug information knows one of several names.
        let names = after.aliases(replaced.new.1).into_iter();
        let structures = names.filter_map(|name| side.comparison.new_behind_pointers.get(&after.item(name).name));
        for structure in structures.flatten() {
            findings.push(Finding::new(
                Risk::NewState,
                side.place(new),
                format!("it reaches a {structure} through a pointer, and that structure is new: objects that exist already have none"),
            ));
        }
        if !replaced.found.is_same {
            let name = &side.comparison.before.item(replaced.old).name;
            findings.push(Finding::new(
                Risk::OtherCode,
                side.place(name),
                "the kernel's own code is not what the source compiles to, so a guest's can't be compared with it"
                    .to_owned(),
            ));
        }
    }
    selection.findings.extend(findings);
    Ok(())
}

/// What the compiler made of a function for those of this file who call it takes its arguments as it saw fit. Where the kernel's is other
/// code, it may take others.
fn private_copies(index: usize, side: &Side<'_>, selection: &Selection, findings: &mut Vec<Finding>) {
    let unit = &side.comparison.after;
    for (_, id) in selection.carried.keys().filter(|(of, _)| *of == index) {
        let caller = unit.item(*id);
        for relocation in unit.relocations(caller) {
            let Target::Item(called, _) = unit.target(caller.at.section, relocation) else {
                continue;
            };
            let item = unit.item(called);
            let stays = item.is_function && !selection.carried.contains_key(&(index, called));
            if !stays || !names::is_private_copy(&item.name) {
                continue;
            }
            let found = side.before(called).and_then(|before| side.places.get(before));
            if found.is_some_and(|found| !found.is_same) {
                findings.push(Finding::new(
                    Risk::OtherCode,
                    side.place(&item.name),
                    format!(
                        "{} calls it, and the kernel's own is not what the source compiles to: it may take other arguments",
                        caller.name
                    ),
                ));
            }
        }
    }
}

fn changed_data(side: &Side<'_>, findings: &mut Vec<Finding>) {
    let unit = &side.comparison.after;
    for (id, item) in unit.items.iter().enumerate() {
        let Verdict::Changed(what) = side.comparison.verdict(id) else {
            continue;
        };
        let section = &unit.section_of(item).name;
        if item.is_function || is_listed(section) || crate::compare::is_by_contents(unit, id) {
            continue;
        }
        let when = if is_of_boot(section) {
            ", and is only used while the kernel starts"
        } else {
            ""
        };
        findings.push(Finding::new(
            Risk::ChangedData,
            side.place(&item.name),
            format!("the variable differs ({what}){when}: the running kernel's stays as it is"),
        ));
    }
    for item in side.comparison.gone() {
        let section = &side.comparison.before.section_of(item).name;
        if !item.is_function && !item.is_local && !is_listed(section) {
            findings.push(Finding::new(
                Risk::RemovedGlobal,
                side.place(&item.name),
                "the variable is gone, or local to the file now: other files still use the running kernel's".to_owned(),
            ));
        }
    }
}

fn layouts(side: &Side<'_>, findings: &mut Vec<Finding>) {
    for (name, before, after) in &side.comparison.types {
        findings.push(Finding::new(
            Risk::Layout,
            side.place(name),
            format!(
                "it is laid out otherwise ({}): old code and old objects know the old layout only",
                first_difference(before, after)
            ),
        ));
    }
}

/// The first member in which two layouts differ.
fn first_difference(before: &str, after: &str) -> String {
    let absent = "nothing";
    let mut old = before.split("; ");
    let mut new = after.split("; ");
    loop {
        match (old.next(), new.next()) {
            (None, None) => return "in nothing".to_owned(),
            (x, y) if x == y => {}
            (x, y) => return format!("{} became {}", x.unwrap_or(absent), y.unwrap_or(absent)),
        }
    }
}

fn new_data(index: usize, side: &Side<'_>, selection: &Selection, findings: &mut Vec<Finding>) {
    let unit = &side.comparison.after;
    for (of, id) in selection.carried.keys() {
        let item = unit.items.get(*id).filter(|item| *of == index && !item.is_function);
        let Some(item) = item else { continue };
        // What was a constant has no state, and what was only there for the start has none any more.
        let before = &side.comparison.before;
        let had_state = |other: &&crate::compare::Item| {
            let section = before.section_of(other);
            !other.is_function && other.key == item.key && section.is_writable() && !is_of_boot(&section.name)
        };
        let was = before.items.iter().filter(had_state).count();
        if was > 0
            && !crate::compare::is_forgetful(unit, item)
            && !crate::compare::is_by_contents(unit, *id)
            && unit.section_of(item).is_writable()
        {
            findings.push(Finding::new(
                Risk::FreshStatic,
                side.place(&item.name),
                format!("there were {was} variables of that name in that function, and it is not clear which one this is: it starts afresh"),
            ));
        }
    }
    // A key is known by the tables of jumps that it switches.
    for (of, id) in selection.carried.keys() {
        if *of != index {
            continue;
        }
        for entry in unit
            .entries(*id)
            .iter()
            .filter(|entry| entry.table().name == "__jump_table")
        {
            let Some(section) = unit.object.section(entry.at.section) else {
                continue;
            };
            for relocation in section.relocations_in(entry.at.offset + 8, entry.at.offset + 16) {
                let Target::Item(key, _) = unit.target(entry.at.section, relocation) else {
                    continue;
                };
                let key_section = &unit.section_of(unit.item(key)).name;
                if selection.carried.contains_key(&(index, key)) && !is_never_switched(key_section) {
                    findings.push(Finding::new(
                        Risk::StaticKey,
                        side.place(&unit.item(key).name),
                        "a new static key, whose sites only the guest itself can switch".to_owned(),
                    ));
                }
            }
        }
    }
}

/// Refuses new per-CPU variables that begin with an address: before 7.2 the kernel's loader relocates none of them (kernel/module.c
/// of 5.10, `apply_relocations`), and livepatch would, where that section lay before each CPU got its copy.
fn per_cpu(index: usize, side: &Side<'_>, selection: &Selection) -> Result<(), SelectError> {
    let unit = &side.comparison.after;
    let carried = selection.carried.keys().filter(|(of, _)| *of == index);
    let mut items = carried.map(|(_, id)| unit.item(*id));
    let has_address = |item: &&crate::compare::Item| {
        unit.section_of(item).name.starts_with(".data..percpu") && !unit.relocations(item).is_empty()
    };
    match items.find(has_address) {
        None => Ok(()),
        Some(item) => Err(SelectError::PerCpuAddress {
            file: side.source.clone(),
            name: item.name.clone(),
        }),
    }
}

/// Refuses sections that say something of carried functions and that no loader of modules reads.
fn unknown_sections(index: usize, side: &Side<'_>, selection: &Selection) -> Result<(), SelectError> {
    let unit = &side.comparison.after;
    for (number, section) in unit.object.sections.iter().enumerate() {
        if !section.is_loaded() || section.is_code() || is_understood(section) {
            continue;
        }
        for relocation in &section.relocations {
            let at = crate::elf::At {
                section: number,
                offset: relocation.offset,
            };
            let Target::Item(id, _) = unit.target(number, relocation) else {
                continue;
            };
            if unit.item(id).is_function
                && selection.carried.contains_key(&(index, id))
                && unit.item_at(at, false).is_none()
            {
                return Err(SelectError::Section {
                    file: side.source.clone(),
                    section: section.name.clone(),
                    name: unit.item(id).name.clone(),
                });
            }
        }
    }
    Ok(())
}

fn is_understood(section: &Section) -> bool {
    let name = section.name.as_str();
    let data = [".data", ".rodata", ".bss"]
        .iter()
        .any(|prefix| name.starts_with(prefix));
    data || name == ORC || TABLES.iter().any(|table| table.name == name) || is_listed(name) || is_of_boot(name)
}

fn is_listed(section: &str) -> bool {
    LISTS.iter().any(|prefix| section.starts_with(prefix))
}
