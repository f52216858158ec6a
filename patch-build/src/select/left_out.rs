//! What the change adds and the module does not carry. Every function and variable of the second version that the first has not,
//! and every entry of a list that a loader or linker reads, is in the module, or is named here, or is needed only by what is named
//! somewhere. What the module carries, [`super`] follows from the functions that are replaced; nobody refers to an initcall, an
//! export or a callback.

use std::collections::{BTreeMap, BTreeSet};

use super::{Chosen, Finding, Risk, Selection, Side};
use crate::compare::tables::{ORC, TABLES};
use crate::compare::{ItemId, Target, Unit, Verdict, is_by_contents, is_of_boot, shown};
use crate::elf::{At, Section};

/// Sections whose contents are only found by references to them; all others are lists that somebody walks.
const FOUND_BY_REFERENCE: [&str; 10] = [
    ".data",
    ".ref.data",
    ".rodata",
    ".bss",
    ".init.data",
    ".init.rodata",
    ".init.bss",
    ".exit.data",
    "__tracepoints",
    "__dyndbg",
];

/// The list of all texts that the kernel may print (kernel/printk/index.c), whose entries only this list refers to.
const PRINTED: &str = ".printk_index";
/// Lists for people and tools, for the linker, and of what a module says of itself as a whole.
const OF_NO_EFFECT: [&str; 6] = [
    ".discard",
    ".modinfo",
    ".note",
    PRINTED,
    "__tracepoint_check",
    "_error_injection_whitelist",
];

/// Names what is left out of the change of one file.
pub(super) fn look(index: usize, side: &Side<'_>, selection: &Selection, findings: &mut Vec<Finding>) {
    let added = Added {
        index,
        side,
        carried: &selection.carried.keys().copied().collect(),
    };
    let unit = &side.comparison.after;
    let new: Vec<ItemId> = (0..unit.items.len()).filter(|id| added.is_left_out(*id)).collect();
    // Who needs something that is left out is named itself, and says enough; or is of no effect.
    let mut reached: Vec<ItemId> = (0..unit.items.len())
        .filter(|id| added.is_named_as_changed(*id) || unit.section_of(unit.item(*id)).name == PRINTED)
        .collect();
    let (roots, rest): (Vec<ItemId>, Vec<ItemId>) = new.into_iter().partition(|id| {
        let item = unit.item(*id);
        item.is_function || is_list(unit.section_of(item))
    });
    for id in &roots {
        findings.push(added.finding(*id));
    }
    reached.extend(&roots);
    let mut reached = reachable(unit, reached);
    for id in rest {
        if !reached.contains(&id) {
            findings.push(added.finding(id));
            reached.extend(reachable(unit, vec![id]));
        }
    }
    let instead = (0..unit.items.len()).filter(|id| added.is_instead_of_kernels(*id));
    findings.extend(instead.map(|id| {
        let reason =
            "it is new in this file, and the kernel has one of that name, which all files use that do not change";
        Finding::new(Risk::LeftOut, side.place(&unit.item(id).name), reason.to_owned())
    }));
    for (section, what) in added.entries() {
        let reason = format!("{section} lists it, which it did not before: {}", effect(&section));
        findings.push(Finding::new(risk(&section), side.place(&what), reason));
    }
}

struct Added<'a, 'k> {
    index: usize,
    side: &'a Side<'k>,
    carried: &'a BTreeSet<Chosen>,
}

impl Added<'_, '_> {
    /// True for something new that the module does not carry and that has an effect.
    fn is_left_out(&self, id: ItemId) -> bool {
        let unit = &self.side.comparison.after;
        let item = unit.item(id);
        let is_carried = |name: ItemId| self.carried.contains(&(self.index, name));
        *self.side.comparison.verdict(id) == Verdict::New
            && !item.is_padding()
            && !is_by_contents(unit, id)
            && !has_no_effect(&unit.section_of(item).name)
            && !unit.aliases(id).into_iter().any(is_carried)
    }

    /// True for something new that the module carries, and that other files would use, too: in the place of a default, or of what
    /// another file had.
    fn is_instead_of_kernels(&self, id: ItemId) -> bool {
        let unit = &self.side.comparison.after;
        let item = unit.item(id);
        *self.side.comparison.verdict(id) == Verdict::New
            && !item.is_local
            && self.carried.contains(&(self.index, id))
            && self.side.shipped.global(&item.name).is_some()
    }

    /// True for what changed and is not carried, which a finding names.
    fn is_named_as_changed(&self, id: ItemId) -> bool {
        let is_changed = matches!(self.side.comparison.verdict(id), Verdict::Changed(_));
        let section = &self
            .side
            .comparison
            .after
            .section_of(self.side.comparison.after.item(id))
            .name;
        is_changed && !has_no_effect(section) && !self.carried.contains(&(self.index, id))
    }

    fn finding(&self, id: ItemId) -> Finding {
        let unit = &self.side.comparison.after;
        let item = unit.item(id);
        let section = &unit.section_of(item).name;
        let reason = if item.is_function && !is_of_boot(section) {
            "it is new, and no function that the patch replaces uses it: it is not in the module".to_owned()
        } else {
            format!("it is new, in {section}: {}", effect(section))
        };
        Finding::new(risk(section), self.side.place(&item.name), reason)
    }

    /// Entries that have no names of their own and that the first version has not, or not so often: section and what it refers to. A
    /// text is only a part of an entry where that refers to something else, too.
    fn entries(&self) -> Vec<(String, String)> {
        let was = entries(&self.side.comparison.before);
        let is_new = |(entry, count): &(&Entry, &usize)| was.get(entry).is_none_or(|was| *count > was);
        let now = entries(&self.side.comparison.after);
        let (texts, others): (Vec<&Entry>, Vec<&Entry>) = now
            .iter()
            .filter(is_new)
            .map(|(entry, _)| entry)
            .partition(|entry| entry.is_text);
        let alone = |text: &&&Entry| !others.iter().any(|other| other.section == text.section);
        let alone: Vec<&Entry> = texts.iter().filter(alone).copied().collect();
        let named = others.iter().chain(&alone);
        named
            .map(|entry| (entry.section.clone(), entry.target.clone()))
            .collect()
    }
}

/// A reference in a list, where nothing has a name.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Entry {
    section: String,
    target: String,
    is_text: bool,
}

/// Entries without names, with how many there are of each.
fn entries(unit: &Unit) -> BTreeMap<Entry, usize> {
    let mut entries = BTreeMap::new();
    for (number, section) in unit.object.sections.iter().enumerate() {
        if !is_list(section) || has_no_effect(&section.name) {
            continue;
        }
        for relocation in &section.relocations {
            let at = At {
                section: number,
                offset: relocation.offset,
            };
            if unit.item_at(at, false).is_none() {
                let target = unit.target(number, relocation);
                let entry = Entry {
                    section: section.name.clone(),
                    target: shown(unit, &target),
                    is_text: matches!(target, Target::Text(..)),
                };
                *entries.entry(entry).or_insert(0) += 1;
            }
        }
    }
    entries
}

/// These items and all that they refer to, directly or not.
fn reachable(unit: &Unit, from: Vec<ItemId>) -> BTreeSet<ItemId> {
    let mut seen: BTreeSet<ItemId> = from.iter().copied().collect();
    let mut queue = from;
    while let Some(id) = queue.pop() {
        let item = unit.item(id);
        for relocation in unit.relocations(item) {
            if let Target::Item(of, _) = unit.target(item.at.section, relocation)
                && seen.insert(of)
            {
                queue.push(of);
            }
        }
    }
    seen
}

/// True for a section of which no reference says what is found in it.
fn is_list(section: &Section) -> bool {
    let name = section.name.as_str();
    let is_table = name == ORC || TABLES.iter().any(|table| table.is(name));
    let by_reference = FOUND_BY_REFERENCE.iter().any(|prefix| is_of(name, prefix));
    section.is_loaded() && !section.is_code() && !section.is_strings() && !is_table && !by_reference
}

/// True for the section of that name, and for those that the compiler makes of it.
fn is_of(section: &str, name: &str) -> bool {
    section
        .strip_prefix(name)
        .is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
}

fn has_no_effect(section: &str) -> bool {
    OF_NO_EFFECT.iter().any(|prefix| section.starts_with(prefix))
}

fn risk(section: &str) -> Risk {
    let at_start = [".initcall", ".con_initcall", ".exitcall"];
    match is_of_boot(section) || at_start.iter().any(|prefix| section.starts_with(prefix)) {
        true => Risk::Init,
        false => Risk::LeftOut,
    }
}

/// What becomes of what is in a section.
fn effect(section: &str) -> &'static str {
    match risk(section) {
        Risk::Init => "what is run or read while the kernel or a module starts or ends is not in the module",
        _ => "it is not in the module, and the kernel does not learn of it",
    }
}

#[cfg(test)]
mod tests {
    use crate::testing::selected;

    /// What speaks against a change that adds a text behind a function, which replaces nothing.
    fn added(test: &str, text: &str) -> Vec<String> {
        let before = "int f(int a) { return printk(\"f %d\", a); }\n";
        let chosen = selected(test, before, &format!("{before}{text}"));
        assert_eq!(chosen.replaced(), [""; 0]);
        let shown = |finding: &crate::select::Finding| format!("{} {}", finding.risk, finding.place);
        chosen.findings().iter().map(shown).collect()
    }

    /// As include/linux/init.h of 6.1 makes an initcall: an entry without a name.
    #[test]
    fn a_new_initcall_is_named() {
        let found = added(
            "initcall",
            "__attribute__((section(\".init.text\"))) int start(void) { return printk(\"start\"); }\n\
             asm(\".section \\\".initcall6.init\\\", \\\"a\\\"\\n__initcall__start:\\n.long start - .\\n.previous\");\n",
        );
        assert_eq!(found, ["init x.c: start", "init x.c: start"]);
        let same = added(
            "initcall-old",
            "asm(\".section \\\".initcall6.init\\\", \\\"a\\\"\\n__initcall__f:\\n.long f - .\\n.previous\");\n",
        );
        assert_eq!(same, ["init x.c: f"]);
    }

    #[test]
    fn a_callback_of_kpatch_is_named() {
        let found = added(
            "callback",
            "static int before_patch(void *o) { return printk(\"%p\", o); }\n\
             static void *callback __attribute__((section(\".kpatch.callbacks.pre_patch\"), used)) = before_patch;\n",
        );
        assert_eq!(found, ["left-out x.c: before_patch", "left-out x.c: callback"]);
    }

    /// As include/linux/export.h of 6.1 and of 6.5 make an export.
    #[test]
    fn a_new_export_is_named() {
        for (test, section) in [("export", "___ksymtab+f"), ("export-symbol", ".export_symbol")] {
            let text =
                format!("asm(\".section \\\"{section}\\\", \\\"a\\\"\\n__export_f: .long f - .\\n.previous\");\n");
            assert_eq!(added(test, &text), ["left-out x.c: f"]);
        }
    }

    #[test]
    fn a_new_parameter_is_named_and_what_it_needs_is_not_named_again() {
        let found = added(
            "parameter",
            "static int limit;\nstruct param { const char *name; int *value; };\n\
             static const struct param __param_limit __attribute__((section(\"__param\"), used)) = { \"limit\", &limit };\n",
        );
        assert_eq!(found, ["left-out x.c: __param_limit"]);
    }

    #[test]
    fn a_new_function_that_nothing_calls_and_a_new_variable_are_named() {
        let found = added(
            "nobody",
            "int limit = 3;\nint g(int a) { return printk(\"g %d\", a); }\n",
        );
        assert_eq!(found, ["left-out x.c: g", "left-out x.c: limit"]);
    }

    #[test]
    fn a_constant_for_people_and_tools_is_not_missed() {
        let found = added(
            "index",
            "struct entry { const char *text; };\nstatic struct entry _entry = { \"f\" };\n\
             static struct entry *_entry_ptr __attribute__((section(\".printk_index\"), used)) = &_entry;\n\
             static const char about[] __attribute__((section(\".modinfo\"), used)) = \"about=f\";\n",
        );
        assert_eq!(found, [""; 0]);
    }

    #[test]
    fn what_a_macro_only_numbered_otherwise_is_not_new() {
        let numbered = |number: u32| {
            format!(
                "int f(int a) {{ return printk(\"f %d\", a); }}\nstatic const char __UNIQUE_ID_x{number}[] __attribute__((section(\".list\"), used)) = \"a\";\n\
                 static const char __UNIQUE_ID_x{}[] __attribute__((section(\".list\"), used)) = \"b\";\n",
                number + 1
            )
        };
        let one_more = format!(
            "static const char __UNIQUE_ID_x1[] __attribute__((section(\".list\"), used)) = \"new\";\n{}",
            numbered(5)
        );
        let chosen = selected("numbered", &numbered(1), &one_more);
        let found: Vec<&str> = chosen.findings().iter().map(|finding| finding.place.as_str()).collect();
        assert_eq!(found, ["x.c: __UNIQUE_ID_x1"]);
    }

    #[test]
    fn what_changed_functions_need_is_not_left_out() {
        let before = "int f(int a) { return printk(\"f %d\", a); }\n";
        let after = "static int limit = 3;\nstatic const int table[3] = { 1, 2, 3 };\n\
                     int f(int a) { return printk(\"f %d\", table[a] + limit++); }\n";
        assert_eq!(selected("needed", before, after).findings(), []);
    }

    /// Shipped as a kernel that has a default of that name, which other files call.
    #[test]
    fn what_would_take_the_place_of_the_kernels_own_for_other_files_is_named() {
        let before = "int f(int a) { return a; }\n";
        let after = "noinline int g(int a) { return printk(\"%d\", a) * 3; }\nint limit = 1;\n\
                     int f(int a) { return g(a) + ++limit; }\n";
        let linked = "__attribute__((weak)) int limit = 1;\n__attribute__((weak)) int g(int a) { return a * 5; }\n\
                      int f(int a) { return a; }\nint other(int a) { return g(a) + limit; }\n";
        let object = crate::elf::Object::parse(&crate::testing::compiled("taken", linked, false)).unwrap();
        let comparison = crate::testing::compared("taken", before, after);
        let chosen = crate::testing::selected_of(comparison, object);
        let found: Vec<String> = chosen
            .findings()
            .iter()
            .map(|finding| format!("{} {}", finding.risk, finding.place))
            .collect();
        assert_eq!(found, ["left-out x.c: g", "left-out x.c: limit"]);
    }
}
