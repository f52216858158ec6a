//! The review sheet: what is in a module and why, for the person who answers for it.

use std::collections::BTreeSet;
use std::fmt;

use guest_core::module::Note;
use serde::Serialize;

use crate::compare::Item;
use crate::elf::{Object, Place};
use crate::select::{Finding, Replaced, Selection, Side, Why};

/// What is in a module and why.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ReviewSheet {
    /// The patch's name.
    pub name: String,
    /// Release of the kernel that it is for.
    pub kernel: String,
    /// Identifiers of the flaws that it fixes.
    pub cves: Vec<String>,
    /// The packages that the sources came from.
    pub sources: Vec<String>,
    /// Functions and variables, with the reason for each.
    pub items: Vec<SheetItem>,
    /// Symbols of the kernel or of modules that are not exported, as livepatch names them.
    pub unexported: Vec<String>,
    /// Sections of the module: name and bytes.
    pub sections: Vec<SheetSection>,
    /// What speaks against the patch.
    pub findings: Vec<SheetFinding>,
    /// What should be known.
    pub warnings: Vec<String>,
}

/// A function or variable of a module.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct SheetItem {
    /// The source file.
    pub file: String,
    /// Its name.
    pub name: String,
    /// `changed`, `new`, `part` or `copy`.
    pub why: String,
    /// What changed, or by what it is needed.
    pub detail: String,
    /// Bytes before; none for what is not replaced.
    pub old_size: Option<u64>,
    /// Bytes in the module.
    pub new_size: u64,
    /// The module that is patched; none for the kernel itself.
    pub object: Option<String>,
    /// Position of the old function among symbols of its name.
    pub sympos: Option<u64>,
    /// Digest of the old function's code, where a guest's can be compared with it.
    pub digest: Option<String>,
}

/// A section of a module.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct SheetSection {
    /// Its name.
    pub name: String,
    /// Its bytes.
    pub size: u64,
}

/// Something that speaks against a patch.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct SheetFinding {
    /// Its name, as `--allow` takes it.
    pub risk: String,
    /// The file, and the function, variable or type.
    pub place: String,
    /// What was found, and why it matters.
    pub reason: String,
}

impl ReviewSheet {
    pub(crate) fn of(note: &Note, sides: &[Side<'_>], selection: &Selection, object: &Object) -> Self {
        let sections = object.sections.iter().skip(1).map(|section| SheetSection {
            name: section.name.clone(),
            size: section.size,
        });
        let unexported: BTreeSet<&str> = object
            .symbols
            .iter()
            .filter(|symbol| symbol.place == Place::Livepatch)
            .filter_map(|symbol| symbol.name.strip_prefix(".klp.sym."))
            .collect();
        Self {
            name: note.name.clone(),
            kernel: note.kernel.clone(),
            cves: note.cves.clone(),
            sources: note.sources.clone(),
            items: items(note, sides, selection),
            unexported: unexported.into_iter().map(str::to_owned).collect(),
            sections: sections.collect(),
            findings: selection.findings.iter().map(finding).collect(),
            warnings: warnings(sides, selection),
        }
    }
}

fn finding(finding: &Finding) -> SheetFinding {
    SheetFinding {
        risk: finding.risk.name().to_owned(),
        place: finding.place.clone(),
        reason: finding.reason.clone(),
    }
}

fn items(note: &Note, sides: &[Side<'_>], selection: &Selection) -> Vec<SheetItem> {
    let of_chosen = |(chosen, why): (&(usize, usize), &Why)| {
        let replaced = selection.replaced.iter().filter(|replaced| replaced.new == *chosen);
        let replaced: Vec<_> = replaced.map(Some).collect();
        let each = if replaced.is_empty() { vec![None] } else { replaced };
        let items = each
            .into_iter()
            .filter_map(|replaced| item(note, sides, *chosen, why, replaced));
        items.collect::<Vec<_>>()
    };
    selection.carried.iter().flat_map(of_chosen).collect()
}

/// Something that is carried, and what it replaces.
fn item(
    note: &Note,
    sides: &[Side<'_>],
    chosen: (usize, usize),
    why: &Why,
    replaced: Option<&Replaced>,
) -> Option<SheetItem> {
    let side = sides.get(chosen.0)?;
    let new = side.comparison.after.item(chosen.1);
    let old = replaced.map(|replaced| side.comparison.before.item(replaced.old));
    let noted = note.functions.iter().find(|noted| {
        Some(noted.name.as_str()) == old.map(|old| old.name.as_str())
            && noted.object.as_deref() == side.shipped.name()
            && Some(noted.sympos) == replaced.map(|replaced| replaced.found.sympos)
    });
    let (why, detail) = match why {
        Why::Changed(what) => ("changed", what.clone()),
        Why::New(by) => ("new", format!("needed by {by}")),
        Why::Part(of) => ("part", format!("split off {of}")),
        Why::Copy(by) => ("copy", format!("needed by {by}")),
    };
    // Functions that became one are told by their old names.
    let is_alias = |old: &&Item| side.comparison.after.named(&old.name).is_some();
    Some(SheetItem {
        file: side.source.clone(),
        name: old.filter(is_alias).unwrap_or(new).name.clone(),
        why: why.to_owned(),
        detail,
        old_size: noted.map(|noted| noted.size).or(old.map(|old| old.size)),
        new_size: new.size,
        object: side.shipped.name().map(str::to_owned),
        sympos: replaced.map(|replaced| replaced.found.sympos),
        digest: noted.map(|noted| noted.digest.clone()),
    })
}

fn warnings(sides: &[Side<'_>], selection: &Selection) -> Vec<String> {
    let mut warnings = Vec::new();
    for (index, side) in sides.iter().enumerate() {
        let here = selection.replaced.iter().filter(|replaced| replaced.new.0 == index);
        let without: Vec<&str> = here
            .filter(|replaced| {
                let entries = side.comparison.before.entries(replaced.old);
                !side.has_ftrace || !entries.iter().any(|entry| entry.table().name == "__mcount_loc")
            })
            .map(|replaced| side.comparison.before.item(replaced.old).name.as_str())
            .collect();
        if !without.is_empty() {
            warnings.push(format!(
                "{}: {} {} no ftrace site, so a guest can't load this module itself; vmpatch redirects behind the entry",
                side.source,
                without.join(", "),
                if without.len() == 1 { "has" } else { "have" }
            ));
        }
    }
    warnings
}

impl fmt::Display for ReviewSheet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{} for {}", self.name, self.kernel)?;
        for (what, list) in [("fixes", &self.cves), ("from", &self.sources)] {
            if !list.is_empty() {
                writeln!(f, "  {what}: {}", list.join(", "))?;
            }
        }
        writeln!(
            f,
            "\n  {:<8} {:<36} {:>7} {:>7}  reason",
            "", "function or variable", "old", "new"
        )?;
        for item in &self.items {
            let old = item.old_size.map_or("-".to_owned(), |size| size.to_string());
            let place = match &item.object {
                Some(module) => format!("{} [{module}]", item.file),
                None => item.file.clone(),
            };
            writeln!(
                f,
                "  {:<8} {:<36} {old:>7} {:>7}  {place}: {}",
                item.why, item.name, item.new_size, item.detail
            )?;
        }
        if !self.unexported.is_empty() {
            writeln!(f, "\n  not exported, found by the guest's symbols:")?;
            for symbol in &self.unexported {
                writeln!(f, "    {symbol}")?;
            }
        }
        let sections: Vec<String> = self
            .sections
            .iter()
            .map(|section| format!("{} {}", section.name, section.size))
            .collect();
        writeln!(f, "\n  sections, in bytes: {}", sections.join(", "))?;
        for finding in &self.findings {
            writeln!(
                f,
                "  against it: {}: {} ({})",
                finding.place, finding.reason, finding.risk
            )?;
        }
        for warning in &self.warnings {
            writeln!(f, "  warning: {warning}")?;
        }
        Ok(())
    }
}
