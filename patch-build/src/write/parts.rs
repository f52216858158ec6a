//! That what one object of a patch needs is only needed where that object is loaded.

use crate::elf::{Object, write};
use crate::testing::{laid, selected_of_modules};

/// Two modules that change, of which the second uses what a third one exports, and has variables of its own.
fn of_two_modules(test: &str) -> Object {
    let first = "int f(int a) { return printk(\"f %d\", a); }\n";
    let second = "extern int of_third(int);\nint g(int a) { return of_third(a) + 1; }\n";
    let changed = second
        .replace("int g", "static int calls;\nint g")
        .replace("+ 1", "+ ++calls");
    let chosen = selected_of_modules(
        test,
        &[
            ("m", first, &first.replace("return", "return 1 +")),
            ("n", second, &changed),
        ],
    );
    laid(&chosen)
}

#[test]
fn code_and_variables_of_each_module_are_in_sections_of_their_own() {
    let object = of_two_modules("parts-sections");
    let names = |section: &str| -> Vec<&str> {
        let (index, _) = object.section_named(section).unwrap();
        let here = object.symbols.iter().filter(|symbol| {
            !symbol.is_section() && matches!(symbol.place, crate::elf::Place::In(at) if at.section == index)
        });
        here.map(|symbol| symbol.name.as_str()).collect()
    };
    assert_eq!(names(".text.m"), ["f"]);
    assert_eq!(names(".text.n"), ["g"]);
    assert_eq!(names(".bss.n"), ["calls"]);
}

/// kernel/livepatch/core.c, `klp_resolve_symbols`: the section's object says when, the symbol's where.
#[test]
fn what_a_third_module_exports_is_found_when_the_module_that_uses_it_is_loaded() {
    let object = Object::parse(&write(&of_two_modules("parts-third")).unwrap()).unwrap();
    let names: Vec<&str> = object.sections.iter().map(|section| section.name.as_str()).collect();
    assert!(names.contains(&".klp.rela.n..text.n"), "{names:?}");
    assert!(
        !names.iter().any(|name| name.starts_with(".klp.rela.third.")),
        "{names:?}"
    );
    let symbols: Vec<&str> = object.symbols.iter().map(|symbol| symbol.name.as_str()).collect();
    assert!(symbols.contains(&".klp.sym.third.of_third,0"), "{symbols:?}");
    assert!(!symbols.contains(&"of_third"), "{symbols:?}");
}
