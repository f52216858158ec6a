//! That a reference leads to what the compiler meant, where the assembler alone would only say how far it is into a section.

use crate::elf::{Object, Relocation};
use crate::testing::{laid, selected};

/// What the module's code refers to: each symbol's name and what is added to it, place-relative ones without the four bytes that
/// they count from.
fn references(object: &Object) -> Vec<(String, i64)> {
    let code = object.sections.iter().filter(|section| section.is_code());
    let shown = |relocation: &Relocation| {
        let symbol = object.symbol(relocation).unwrap();
        let relative = relocation.kind == object::elf::R_X86_64_PC32.0;
        (symbol.name.clone(), relocation.addend + if relative { 4 } else { 0 })
    };
    code.flat_map(|section| section.relocations.iter().map(shown)).collect()
}

/// Laid out for a change of `from` to `to`, which replaces `f` alone.
fn changed(test: &str, before: &str, after: &str) -> Object {
    let chosen = selected(test, before, after);
    assert_eq!(chosen.replaced(), ["f"]);
    laid(&chosen)
}

const READ_MOSTLY: &str = "__attribute__((section(\".data..read_mostly\")))";

#[test]
fn the_end_of_an_array_is_not_the_start_of_the_variable_behind_it() {
    let before = format!(
        "static int a[4] {READ_MOSTLY} = {{ 1, 2, 3, 4 }};\n\
         int f(int *q) {{ int s = 0; for (int *p = a; p < a + 4; p++) s += printk(\"%d\", *p); return s; }}\n\
         void g(int i) {{ a[i] = 5; }}\n"
    );
    // The compiler writes variables in reverse order.
    let after = format!(
        "static int behind {READ_MOSTLY} = 9;\n{}",
        before.replace("return s;", "return s + behind++;")
    );
    let found = references(&changed("array-end", &before, &after));
    let of_array: Vec<i64> = found
        .iter()
        .filter(|(name, _)| name == ".klp.sym.m.a,0")
        .map(|(_, past)| *past)
        .collect();
    assert_eq!(of_array, [0, 16], "{found:?}");
}

#[test]
fn the_place_in_front_of_an_array_is_not_the_end_of_the_variable_there() {
    let before = format!(
        "static long a[4] {READ_MOSTLY} = {{ 1, 2, 3, 4 }};\nstatic long b[4] {READ_MOSTLY} = {{ 5, 6, 7, 8 }};\n\
         long f(long i) {{ return (a - 1)[i] + (b - 5)[i]; }}\nvoid g(int i) {{ a[i] = b[i]++; }}\n"
    );
    let found = references(&changed(
        "array-front",
        &before,
        &before.replace("[i] + (b", "[i] - (b"),
    ));
    let past = |array: &str| {
        let named = format!(".klp.sym.m.{array},0");
        found.iter().find(|(name, _)| *name == named).map(|(_, past)| *past)
    };
    assert_eq!((past("a"), past("b")), (Some(-8), Some(-40)), "{found:?}");
}

#[test]
fn the_place_in_front_of_a_constant_that_has_a_section_of_its_own_stays_in_front() {
    let before = "static const long a[4] = { 1, 2, 3, 4 };\nlong f(long i) { return (a - 3)[i] + 1; }\n";
    let after = before.replace("[i] + 1", "[i] + 2");
    let object = changed("constant-front", before, &after);
    assert!(
        references(&object).contains(&(".klp.sym.m.a,0".to_owned(), -24)),
        "{:?}",
        references(&object)
    );
}

/// The text behind it is laid out first, for the other function.
#[test]
fn the_end_of_a_text_is_not_the_start_of_the_text_behind_it() {
    let before = "int f(int c) { int n = 0; for (const char *p = \"abc\"; p < \"abc\" + 4; p++) n += printk(p); \
                  return n + printk(\"hello\"); }\nint g(int a) { return printk(\"hello\") + a; }\n";
    let after = before.replace("return n", "return 1 + n").replace("+ a;", "- a;");
    let object = laid(&selected("text-end", before, &after));
    let (_, texts) = object.section_named(".rodata.str1.1").unwrap();
    let start = texts.data.windows(4).position(|window| window == b"abc\0").unwrap();
    let start = i64::try_from(start).unwrap();
    let found = references(&object);
    let places: Vec<i64> = found
        .iter()
        .filter(|(name, _)| name.is_empty())
        .map(|(_, past)| *past)
        .collect();
    assert!(places.contains(&start) && places.contains(&(start + 4)), "{found:?}");
}

/// As in `.noinstr.text`: the assembler does the call itself, and nobody would see that it leads out of what is carried.
#[test]
fn a_call_within_a_section_of_several_functions_leads_to_the_kernels_function() {
    let section = "__attribute__((section(\".noinstr.text\")))";
    let before = format!(
        "static noinline {section} int h(int a) {{ return printk(\"%d\", a) * 3; }}\n\
         {section} int g(int a) {{ return h(a) + 7; }}\n{section} int f(int a) {{ return h(a) + 1; }}\n"
    );
    let found = references(&changed("same-section", &before, &before.replace("+ 1", "+ 2")));
    assert!(found.contains(&(".klp.sym.m.h,0".to_owned(), 0)), "{found:?}");
}

#[test]
fn a_jump_within_a_section_of_several_functions_leads_to_the_kernels_function() {
    let section = "__attribute__((section(\".noinstr.text\")))";
    let before = format!(
        "{section} __attribute__((noipa)) int h(int a) {{ return printk(\"%d\", a) * 3; }}\n{section} int f(int a) {{ return h(a + 1); }}\n"
    );
    let found = references(&changed("same-section-jump", &before, &before.replace("+ 1", "+ 2")));
    assert!(found.iter().any(|(name, _)| name == ".klp.sym.m.h,0"), "{found:?}");
}

/// The running kernel's is the one that old code counts in, and nothing says which it is.
#[test]
fn a_variable_of_inline_assembly_that_has_no_name_is_refused() {
    let before = "int f(int a) { asm volatile(\"incl 1f(%rip)\\n.pushsection .data\\n1: .long 7\\n.popsection\"); return a + 1; }\n";
    let chosen = selected("unnamed-variable", before, &before.replace("+ 1", "+ 2"));
    let error = chosen.selection.as_ref().map(|_| ()).unwrap_err().to_string();
    assert!(
        error.contains("f needs a variable of .data that has no name"),
        "{error}"
    );
}

#[test]
fn what_a_sanitizer_notes_has_no_name_and_is_carried() {
    let site = "asm volatile(\"incl .Lsite(%rip)\\n.pushsection .data..Lubsan_data1,\\\"aw\\\"\\n.Lsite: .long 7\\n.popsection\");";
    let before = format!("int f(int a) {{ {site} return a + 1; }}\n");
    let object = changed("unnamed-note", &before, &before.replace("+ 1", "+ 2"));
    assert_eq!(object.section_named(".data").unwrap().1.size, 4);
}

#[test]
fn a_text_of_wide_characters_is_brought_and_compared_to_its_end() {
    for (test, prefix, width) in [("wide-2", "u", 2), ("wide-4", "L", 4)] {
        let before = format!("int f(int a) {{ return printk((const char *){prefix}\"Secure\") + a; }}\n");
        let object = changed(test, &before, &before.replace("Secure", "Setup"));
        let bytes: Vec<u8> = "Setup\0"
            .bytes()
            .flat_map(|byte| [vec![byte], vec![0; width - 1]].concat())
            .collect();
        let has = |section: &crate::elf::Section| section.data.windows(bytes.len()).any(|window| window == bytes);
        assert!(object.sections.iter().any(has), "{prefix}");
    }
}

/// GCC makes one of the two, and only the address of the one is kept somewhere: the kernel's other one has another address.
#[test]
fn of_two_functions_that_became_one_the_pointer_is_to_the_one_that_is_named() {
    let before = "static noinline int kept(int a) { return printk(\"x %d\", a) + 1; }\n\
                  static noinline int only_called(int a) { return printk(\"x %d\", a) + 2; }\n\
                  int g(int a) { return only_called(a) * 3; }\nvoid *f(int a) { return a ? kept : 0; }\n";
    let after = before.replace("+ 2", "+ 1").replace("a ? kept", "a > 1 ? kept");
    let object = laid(&selected("became-same-pointer", before, &after));
    let found = references(&object);
    let named = |name: &str| found.iter().any(|(found, _)| found == name);
    assert!(
        named(".klp.sym.m.kept,0") && !named(".klp.sym.m.only_called,0"),
        "{found:?}"
    );
}

/// A module may have a function of a name that the kernel exports.
#[test]
fn a_function_of_the_modules_own_is_not_the_one_that_the_kernel_exports() {
    let own = "__attribute__((noipa)) int panic(int a) { return a * 7; }\n";
    let caller = "extern int panic(int);\nint f(int a) { return panic(a) + 1; }\n";
    let changed_caller = caller.replace("+ 1", "+ 2");
    let before = format!("{own}{caller}");
    let same_file = references(&changed("own-export", &before, &format!("{own}{changed_caller}")));
    let object = Object::parse(&crate::testing::compiled("own-export-other", &before, false)).unwrap();
    let comparison = crate::testing::compared("own-export-other", caller, &changed_caller);
    let other_file = references(&laid(&crate::testing::selected_of(comparison, object)));
    for found in [same_file, other_file] {
        assert!(found.iter().any(|(name, _)| name == ".klp.sym.m.panic,0"), "{found:?}");
    }
}

/// Functions with an entry that IBT lets an indirect call land on, and a kernel that seals that of `sealed`, of which nobody keeps the address.
const ENTRIES: &str = "asm(\".pushsection .ibt_endbr_seal,\\\"a\\\"\\n.long sealed - .\\n.popsection\");\n\
     __attribute__((noipa)) int sealed(int a) { asm volatile(\"endbr64\"); return a * 7; }\n\
     __attribute__((noipa)) int open(int a) { asm volatile(\"endbr64\"); return a * 5; }\n\
     void *f(int a) { return a ? (void *)open : 0; }\n";

#[test]
fn new_code_that_keeps_the_address_of_a_sealed_function_is_refused_by_name() {
    let calls = "return sealed(a) ? (void *)open : 0;";
    let found = references(&changed(
        "sealed-call",
        ENTRIES,
        &ENTRIES.replace("return a ? (void *)open : 0;", calls),
    ));
    assert!(found.iter().any(|(name, _)| name == ".klp.sym.m.open,0"), "{found:?}");
    let chosen = selected(
        "sealed-address",
        ENTRIES,
        &ENTRIES.replace("(void *)open", "(void *)sealed"),
    );
    let error = chosen.selection.as_ref().map(|_| ()).unwrap_err().to_string();
    assert!(error.contains("f keeps the address of sealed"), "{error}");
}

/// gcc gives no such entry to a static function whose address nobody takes.
#[test]
fn the_address_of_a_function_without_an_entry_for_it_is_that_of_the_new_one() {
    let other =
        "__attribute__((noipa)) static int low(int a) { ENTRY return a * 3; }\nint g(int a) { return low(a); }\n";
    let before = format!("{ENTRIES}{}", other.replace("ENTRY", ""));
    let after = format!("{ENTRIES}{}", other.replace("ENTRY", "asm volatile(\"endbr64\");"));
    let after = after
        .replace("void *f(int a)", "static int low(int);\nvoid *f(int a)")
        .replace("a ? (void *)open", "a ? (void *)low");
    let object = laid(&selected("entry-less", &before, &after));
    let found = references(&object);
    assert!(
        !found.iter().any(|(name, _)| name.starts_with(".klp.sym.m.low")),
        "{found:?}"
    );
    assert!(found.iter().any(|(name, _)| name == "low"), "{found:?}");
}
