//! What kind of memory a section is in: a variable or function that moved to another kind is not the one that the kernel has.

use super::is_of_boot;
use super::unit::{Item, Unit};
use crate::elf::Section;

/// A kind of memory, as far as code depends on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Storage {
    /// Gone once the kernel or module has started.
    Boot,
    /// Never written to. The compiler puts there what no code of the file writes to, whatever the source says.
    Constant,
    /// Not written to any more once the kernel or module has started.
    ConstantAfterStart,
    /// One for each CPU.
    PerCpu,
    /// Any other.
    Ordinary,
}

impl Storage {
    fn of(section: &Section) -> Self {
        let name = section.name.as_str();
        match () {
            () if is_of_boot(name) => Self::Boot,
            () if name.starts_with(".data..percpu") => Self::PerCpu,
            () if name.starts_with(".data..ro_after_init") => Self::ConstantAfterStart,
            () if section.is_writable() => Self::Ordinary,
            () => Self::Constant,
        }
    }
}

/// Whether what the kernel has as the item of the first version can be what the second version's item is: it is there when that one is,
/// may be written to if that one may, and is reached in the same manner.
pub(super) fn can_serve(before: &Unit, old: &Item, after: &Unit, new: &Item) -> bool {
    match (Storage::of(before.section_of(old)), Storage::of(after.section_of(new))) {
        (old, new) if old == new => true,
        (Storage::Boot | Storage::PerCpu, _) | (_, Storage::PerCpu) => false,
        (Storage::Constant, Storage::Ordinary | Storage::ConstantAfterStart) => false,
        // The start of the kernel filled it: `differs` names it.
        (Storage::ConstantAfterStart, _) => true,
        _ => true,
    }
}

/// In what the memory of two variables differs that are a pair, so that new code can't use the kernel's.
pub(super) fn differs(before: &Unit, old: &Item, after: &Unit, new: &Item) -> Option<String> {
    let storage = |unit: &Unit, item: &Item| Storage::of(unit.section_of(item));
    if storage(before, old) == Storage::ConstantAfterStart && storage(after, new) == Storage::Ordinary {
        return Some("it can't be written to once the kernel or module has started, and could now".to_owned());
    }
    let (was, is) = (alignment(before, old), alignment(after, new));
    (was < is).then(|| format!("a multiple of {was} bytes became one of {is}"))
}

/// What the address of an item is a multiple of, in bytes.
fn alignment(unit: &Unit, item: &Item) -> u64 {
    unit.section_of(item).alignment_at(item.at.offset)
}

#[cfg(test)]
mod tests {
    use crate::select::Risk;
    use crate::testing::{Chosen, laid, selected};

    /// The kernel's symbols that the module refers to.
    fn of_kernel(chosen: &Chosen) -> Vec<String> {
        let object = laid(chosen);
        let names = object.symbols.into_iter().map(|symbol| symbol.name);
        names.filter(|name| name.starts_with(".klp.sym.")).collect()
    }

    fn brought(chosen: &Chosen) -> Vec<&str> {
        chosen.brought().into_iter().map(|(name, _)| name).collect()
    }

    /// The compiler makes a constant of a variable that nobody writes to.
    #[test]
    fn a_variable_that_was_a_constant_is_not_written_to_in_the_kernel() {
        let before = "static int table[4] = { 1, 2, 3, 4 };\nint g(unsigned i) { return table[i] * 5; }\n\
                      int f(unsigned i) { return printk(\"%d\", table[i]); }\n";
        let chosen = selected(
            "constant-written",
            before,
            &before.replace("printk(\"%d\", table[i])", "table[i]++"),
        );
        assert_eq!(chosen.replaced(), ["g", "f"]);
        assert_eq!((brought(&chosen), of_kernel(&chosen)), (vec!["table"], Vec::new()));
        assert_eq!(chosen.findings(), []);
    }

    #[test]
    fn a_function_that_was_gone_after_the_start_is_brought() {
        let before = "static noinline __attribute__((section(\".init.text\"))) int low(int a) { return printk(\"low %d\", a); }\n\
                      int f(int a) { return low(a) + 1; }\n";
        let chosen = selected("was-init", before, &before.replace("section(\".init.text\")", "unused"));
        assert_eq!(chosen.replaced(), ["f"]);
        assert_eq!((brought(&chosen), of_kernel(&chosen)), (vec!["low"], Vec::new()));
    }

    #[test]
    fn a_variable_that_was_gone_after_the_start_is_brought() {
        let before =
            "static __attribute__((section(\".init.data\"))) int count = 3;\nint f(int a) { return ++count + a; }\n";
        let chosen = selected(
            "was-init-data",
            before,
            &before.replace("section(\".init.data\")", "unused"),
        );
        assert_eq!(chosen.replaced(), ["f"]);
        assert_eq!((brought(&chosen), of_kernel(&chosen)), (vec!["count"], Vec::new()));
    }

    #[test]
    fn a_variable_that_can_be_written_to_no_more_is_named() {
        let before = "static __attribute__((section(\".data..ro_after_init\"))) int limit = 3;\nint f(int a) { return limit++ + a; }\n";
        let after = before.replace("section(\".data..ro_after_init\")", "unused");
        for after in [after.clone(), after.replace("+ a", "- a")] {
            let chosen = selected("was-ro", before, &after);
            let found: Vec<_> = chosen
                .findings()
                .iter()
                .map(|finding| (finding.risk, finding.place.as_str()))
                .collect();
            assert_eq!(found, [(Risk::ChangedData, "x.c: limit")]);
        }
    }

    #[test]
    fn a_variable_of_each_cpu_is_not_one_of_all() {
        let before =
            "static __attribute__((section(\".data..percpu\"))) int count = 3;\nint f(int a) { return ++count + a; }\n";
        let chosen = selected(
            "was-per-cpu",
            before,
            &before.replace("section(\".data..percpu\")", "unused"),
        );
        assert_eq!((brought(&chosen), of_kernel(&chosen)), (vec!["count"], Vec::new()));
        let found: Vec<_> = chosen
            .findings()
            .iter()
            .map(|finding| (finding.risk, finding.place.as_str()))
            .collect();
        assert_eq!(found, [(Risk::FreshStatic, "x.c: count")]);
    }

    #[test]
    fn a_variable_that_has_to_be_aligned_more_than_the_kernels_is_named() {
        let before = "static long pair[2] = { 1, 2 };\nlong f(int a) { return ++pair[a]; }\n";
        let chosen = selected(
            "aligned",
            before,
            &before.replace("pair[2]", "pair[2] __attribute__((aligned(64)))"),
        );
        let found: Vec<_> = chosen
            .findings()
            .iter()
            .map(|finding| (finding.risk, finding.place.as_str()))
            .collect();
        assert_eq!(found, [(Risk::ChangedData, "x.c: pair")]);
    }
}
