//! Changes of literal C, one for each rule of comparing.

use super::{CompareError, Comparison, Verdict};
use crate::testing::{compared, compiled};

/// Names of the functions and variables that are not as they were, with the words for it.
fn changes(test: &str, before: &str, after: &str) -> Vec<String> {
    let comparison = compared(test, before, after);
    let items = comparison.after.items.iter().zip(&comparison.verdicts);
    let mut changes: Vec<String> = items
        .filter_map(|(item, verdict)| match verdict {
            Verdict::Equal => None,
            Verdict::Changed(_) => Some(format!("{} changed", item.name)),
            Verdict::New => Some(format!("{} new", item.name)),
        })
        .collect();
    changes.extend(comparison.gone().map(|item| format!("{} gone", item.name)));
    changes.sort();
    changes
}

const F: &str = "int f(int a) { return printk(\"a %d\", a) + 1; }\nint g(int a) { return a * 7; }\n";

#[test]
fn a_file_is_equal_to_itself() {
    assert_eq!(changes("null", F, F), [""; 0]);
}

#[test]
fn a_changed_function_is_the_only_one() {
    let after = F.replace("* 7", "* 11");
    assert_eq!(changes("one", F, &after), ["g changed"]);
}

#[test]
fn another_text_is_a_change_and_another_place_of_it_is_not() {
    let longer = format!("int e(void) {{ return printk(\"in front\"); }}\n{F}");
    assert_eq!(changes("string-place", F, &longer), ["e new"]);
    assert_eq!(changes("string", F, &F.replace("a %d", "b %d")), ["f changed"]);
}

#[test]
fn the_line_of_a_warning_does_not_matter() {
    let warns = "void f(int a) { if (a) WARN(); }\nvoid g(void) { sleepy(__FILE__, __LINE__); }\n";
    let lower = format!("\n\n\n{warns}");
    assert_eq!(changes("lines", warns, &lower), [""; 0]);
}

#[test]
fn the_line_of_a_warning_does_not_matter_where_a_header_has_the_first_function() {
    let text = |line: u32| {
        format!(
            "# 1 \"first.h\"\nint h(int a) {{ return a; }}\n# {line} \"x.c\"\nvoid g(void) {{ sleepy(__FILE__, __LINE__); }}\n"
        )
    };
    assert_eq!(changes("header-first", &text(100), &text(103)), [""; 0]);
}

#[test]
fn the_line_that_a_sanitizer_would_name_does_not_matter_but_what_it_checks_does() {
    let text = |line: u32, kind: u32| {
        format!(
            "static struct {{ const char *file; unsigned line, column; int kind; }} site asm(\".Lsite\")\n\
                 __attribute__((section(\".data..Lubsan_data1\"))) = {{ __FILE__, {line}, 7, {kind} }};\n\
                 extern void handle(void *);\nvoid g(void) {{ handle(&site); }}\n"
        )
    };
    assert_eq!(changes("sanitizer", &text(10, 1), &text(13, 1)), [""; 0]);
    assert_eq!(changes("sanitizer-kind", &text(10, 1), &text(10, 2)), ["g changed"]);
}

#[test]
fn code_that_hands_over_its_warning_is_the_same_where_only_the_line_moved() {
    let text = |line: u32, flags: u32| {
        format!(
            "void f(int a) {{ if (a) asm volatile(\"lea 2f(%%rip), %%rdi\\n1: ud2\\n.pushsection __bug_table,\\\"aw\\\"\\n2: .long 1b - .\\n\
             .long %c0 - .\\n.word {line}\\n.word {flags}\\n.org 2b+12\\n.popsection\" : : \"i\" (__FILE__)); }}\n"
        )
    };
    assert_eq!(changes("warn-entry", &text(10, 1), &text(13, 1)), [""; 0]);
    assert_eq!(changes("warn-entry-flags", &text(10, 1), &text(10, 2)), ["f changed"]);
}

#[test]
fn a_number_that_is_no_line_matters() {
    let before = "void g(void) { sleepy(0, 5); }\n";
    assert_eq!(
        changes("number", before, "void g(void) { sleepy(0, 8); }\n"),
        ["g changed"]
    );
}

#[test]
fn a_warning_that_becomes_fatal_is_a_change_though_the_code_is_the_same() {
    let warn = "void f(void) { WARN(); }\n";
    let fatal = "#undef WARN\n#define WARN() asm volatile(\"1: ud2\\n.pushsection __bug_table,\\\"aw\\\"\\n2: .long 1b - .\\n\
                 .long %c0 - .\\n.word %c1\\n.word 1\\n.org 2b+12\\n.popsection\" : : \"i\" (__FILE__), \"i\" (__LINE__))\n";
    assert_eq!(changes("bug", warn, &format!("{fatal}{warn}")), ["f changed"]);
}

#[test]
fn static_locals_are_known_by_their_function_not_by_their_number() {
    let two = "int f(void) { static int n; return printk(\"f\") + n++; }\nint g(void) { static int n; return printk(\"g\") - n++; }\n";
    let three = format!("int e(void) {{ static int n; return printk(\"e\") * n++; }}\n{two}");
    let found = changes("statics", two, &three);
    assert_eq!(found.len(), 2, "{found:?}");
    assert!(found.iter().all(|change| change.ends_with(" new")), "{found:?}");
}

#[test]
fn static_locals_of_one_name_are_known_by_their_order_in_the_source() {
    let before = "#define OWN __attribute__((section(\".data..own\")))\n\
        int f(int a) { { static int OWN n = 1; a += n++; } { static int n = 1; a -= n++; } return a; }\n";
    // The section comes first in the file where something else begins it.
    let begun = "asm(\".pushsection .data..own,\\\"aw\\\"\\n.popsection\");";
    let after = format!("{begun}\n{before}");
    assert_eq!(changes("statics-order", before, &after), [""; 0]);
}

#[test]
fn static_locals_of_one_name_in_other_blocks_are_others() {
    let before = "int f(int a) { if (a > 1) { static int n; a += n++; } { static int n; a -= n++; } return a; }\n";
    let after = "int f(int a) { static int n; if (a > 1) { static int n; a += n++; } a -= n++; return a; }\n";
    let found = changes("statics-blocks", before, after);
    assert_eq!(
        found.iter().filter(|change| change.ends_with(" new")).count(),
        2,
        "{found:?}"
    );
}

#[test]
fn a_function_that_only_got_another_name_is_no_change_for_those_who_call_it() {
    let before =
        "static noinline int low(int a) { return printk(\"low %d\", a); }\nint high(int a) { return low(a) + 1; }\n";
    assert_eq!(changes("renamed", before, &before.replace("low(", "lower(")), [""; 0]);
}

#[test]
fn a_clone_that_the_compiler_numbered_otherwise_is_the_same() {
    let f = |name: &str| {
        format!(
            "struct {name} {{ int x, y; }};\nstatic noinline int {name}_low(struct {name} *p, int unused) {{ return printk(\"%d\", p->x); }}\n\
             int {name}(struct {name} *p) {{ return {name}_low(p, 3) + 1; }}\n"
        )
    };
    assert_eq!(
        changes("isra", &f("a"), &format!("{}{}", f("b"), f("a")))
            .iter()
            .filter(|change| change.contains("a "))
            .count(),
        0
    );
}

#[test]
fn changed_data_and_changed_layouts_are_seen() {
    let before = "int size = 3;\nstruct s { int a; };\nint f(struct s *s) { return s->a; }\n";
    assert_eq!(changes("data", before, &before.replace("= 3", "= 4")), ["size changed"]);
    let comparison = compared("layout", before, &before.replace("{ int a; }", "{ int a; int b; }"));
    let names: Vec<&str> = comparison.types.iter().map(|(name, _, _)| name.as_str()).collect();
    assert_eq!(names, ["struct s"]);
}

#[test]
fn a_variable_of_another_type_is_changed_though_its_bytes_are_the_same() {
    let before = "int size;\nint f(void) { static int last; return size + ++last; }\n";
    assert_eq!(
        changes("retyped", before, &before.replace("int size", "unsigned size")),
        ["size changed"]
    );
    let found = changes("retyped-local", before, &before.replace("static int", "static float"));
    assert!(found.contains(&"last.0 changed".to_owned()), "{found:?}");
    let renamed = format!("typedef int number;\n{}", before.replace("int size", "number size"));
    assert_eq!(changes("typedef", before, &renamed), [""; 0]);
}

#[test]
fn a_constant_without_a_name_is_known_by_its_contents() {
    let before = "int f(unsigned a) { switch (a) { case 0: return 9; case 1: return 4; case 2: return 7; case 3: return 1; case 4: return 8; } return 0; }\n";
    assert_eq!(
        changes(
            "switch-same",
            before,
            &format!("int h(int a) {{ return a + 2; }}\n{before}")
        ),
        ["h new"]
    );
    let found = changes("switch", before, &before.replace("return 7", "return 6"));
    assert!(found.contains(&"f changed".to_owned()), "{found:?}");
}

#[test]
fn what_a_table_says_holds_for_every_name_of_a_function() {
    let before = "int f(int a) { if (a) WARN(); return a; }\nint g(int) __attribute__((alias(\"f\")));\n";
    let comparison = compared("alias", before, before);
    let unit = &comparison.before;
    let entries = |name| unit.entries(unit.named(name).unwrap()).len();
    assert_eq!((entries("f"), entries("g")), (1, 1));
}

#[test]
fn tables_that_stand_in_another_order_change_nothing() {
    let before = "#define FIXED_UP() asm volatile(\"1: nop\\n.pushsection __ex_table,\\\"a\\\"\\n.long 1b - .\\n.long 1b - .\\n.long 0\\n.popsection\")\n\
                  void f(int a) { FIXED_UP(); if (a) WARN(); }\n";
    let after = before.replace("void f", "void e(void) { WARN(); }\nvoid f");
    assert_eq!(changes("table-order", before, &after), ["e new"]);
}

#[test]
fn where_a_section_ends_is_nothing_of_its_last_function() {
    let end = "#define __init __attribute__((section(\".init.text\")))\n\
               asm(\".pushsection .init.text,99,\\\"ax\\\"\\n9:\\n.popsection\\n.pushsection .orc_unwind_ip,\\\"a\\\"\\n.long 9b - .\\n.popsection\\n\
               .pushsection .orc_unwind,\\\"a\\\"\\n.fill 6\\n.popsection\");\n";
    let before = format!("{end}int __init f(int a) {{ return a + 1; }}\nint __init g(int a) {{ return a * 7; }}\n");
    let after = format!("{before}int __init h(int a) {{ return a - 3; }}\n");
    let found = changes("section-end", &before, &after);
    assert_eq!(found, ["h new"]);
    let turned = format!("{end}int __init g(int a) {{ return a * 7; }}\nint __init f(int a) {{ return a + 1; }}\n");
    assert_eq!(changes("section-end-turned", &before, &turned), [""; 0]);
}

/// A debug print as the kernel's macros make it, with the number that its descriptor gets.
fn debug_print(number: u32, format: &str) -> String {
    format!(
        "do {{ static struct _ddebug __attribute__((aligned(8), section(\"__dyndbg\"))) __UNIQUE_ID_ddebug{number} =\n\
         {{ \"m\", __func__, __FILE__, \"{format}\", __LINE__, 63, 0 }}; say(&__UNIQUE_ID_ddebug{number}); }} while (0);\n"
    )
}

const DEBUG_PRINTS: &str = "struct _ddebug { const char *modname, *function, *filename, *format; unsigned lineno:18, class_id:6, flags:8; void *key; };\n\
                            extern void say(struct _ddebug *);\n";

#[test]
fn one_more_debug_print_changes_its_function_only() {
    let text = |in_f: &str, numbers: [u32; 2]| {
        let [first, second] = numbers.map(|number| debug_print(number, &format!("g {}", number % 2)));
        format!("{DEBUG_PRINTS}void f(void) {{ {in_f} }}\nvoid g(void) {{ {first} {second} }}\n")
    };
    let before = text(&debug_print(1, "f"), [2, 3]);
    let after = text(&format!("{}{}", debug_print(1, "f"), debug_print(2, "more")), [4, 5]);
    let found = changes("debug-print", &before, &after);
    assert_eq!(found, ["__UNIQUE_ID_ddebug2.4 new", "f changed"]);
    // Only the numbers differ, as after a changed header.
    let after = text(&debug_print(8, "f"), [14, 15]);
    assert_eq!(changes("debug-print-numbers", &before, &after), [""; 0]);
}

#[test]
fn of_several_debug_prints_of_a_function_each_is_known_by_its_text() {
    let text = |prints: &[(u32, &str)]| {
        let prints: String = prints
            .iter()
            .map(|(number, format)| debug_print(*number, format))
            .collect();
        format!(
            "{DEBUG_PRINTS}static inline void h(void) {{ {prints} }}\nvoid f(void) {{ h(); }}\nvoid g(void) {{ f(); }}\n"
        )
    };
    let before = text(&[(1, "a"), (2, "b"), (3, "c")]);
    let found = changes("debug-print-one-less", &before, &text(&[(1, "b"), (2, "c")]));
    let only = |name: &str| found.iter().any(|change| change.starts_with(name));
    assert!(
        only("f changed")
            && !found
                .iter()
                .any(|change| change.starts_with("__UNIQUE") && change.ends_with("changed")),
        "{found:?}"
    );
    let gone = found.iter().filter(|change| change.ends_with("gone")).count();
    assert_eq!(gone, 1, "{found:?}");
}

#[test]
fn a_debug_print_that_is_on_from_the_start_is_another_one() {
    let before = format!("{DEBUG_PRINTS}void f(void) {{ {} }}\n", debug_print(1, "f"));
    let after = before.replace("63, 0 }", "63, 1 }");
    let found = changes("debug-print-on", &before, &after);
    assert!(found.contains(&"f changed".to_owned()), "{found:?}");
}

#[test]
fn a_limit_of_messages_that_a_header_counts_otherwise_is_the_same() {
    let text = |more: &str| {
        format!(
            "struct limit {{ int interval, burst; }};\nextern int limited(struct limit *);\n\
             static inline void h(int a) {{ {{ static struct limit _rs = {{ 5, 10 }}; if (limited(&_rs)) printk(\"h\"); }}\n\
             {{ static struct limit _rs = {{ 5, 20 }}; if (limited(&_rs)) printk(\"h2\"); }} {more} }}\n\
             void f(void) {{ h(1); }}\n"
        )
    };
    let more = "{ static struct limit _rs = { 1, 1 }; if (limited(&_rs)) printk(\"more\"); }";
    let found = changes("limits", &text(""), &text(more));
    let new = found.iter().filter(|change| change.ends_with(" new")).count();
    assert!(new == 1 && found.len() == 2, "{found:?}");
}

/// Code that the assembler puts elsewhere, to come back from there.
fn elsewhere(code: &str) -> String {
    format!(
        "int f(int a) {{ asm volatile(\"jmp 1f\\n3:\\n.pushsection .fixup,\\\"ax\\\"\\n1: {code}\\n.popsection\" : \"+a\" (a)); return a; }}\n"
    )
}

#[test]
fn code_elsewhere_is_compared_to_its_end() {
    for (test, code) in [
        ("elsewhere", "movl $1, %%eax\\njmp 3b"),
        (
            "elsewhere-branch",
            "test %%eax, %%eax\\njz 2f\\njmp 3b\\n2: movl $1, %%eax\\njmp 3b",
        ),
        ("elsewhere-end", "movl $1, %%eax\\nud2"),
    ] {
        let before = elsewhere(code);
        assert_eq!(
            changes(test, &before, &before.replace("$1", "$2")),
            ["f changed"],
            "{test}"
        );
    }
}

#[test]
fn a_layout_without_a_tag_is_known_by_its_typedef() {
    let before = "typedef struct { int a; } s_t;\nint f(s_t *s) { return s->a; }\n";
    let comparison = compared("layout-typedef", before, &before.replace("int a;", "long b; int a;"));
    let names: Vec<&str> = comparison.types.iter().map(|(name, _, _)| name.as_str()).collect();
    assert_eq!(names, ["s_t"]);
    assert_eq!(compared("layout-typedef-same", before, before).types, []);
}

#[test]
fn a_number_that_grows_as_its_function_moves_is_no_line_where_no_code_of_the_function_has_that_line() {
    let before = "void g(void) { sleepy(0, 100); }\n";
    let after = format!("\n{}", before.replace("100", "101"));
    assert_eq!(changes("number-moved", before, &after), ["g changed"]);
    let far = "void f(void) { sleepy(0, 1); }\n\n\n\nvoid g(void) { sleepy(0, 1); }\n";
    let line = |text: &str| crate::testing::PROLOGUE.lines().count() + 1 + text.lines().count();
    let of_f = line("");
    let before = far.replace("(0, 1)", &format!("(0, {of_f})"));
    let after = format!("\n{}", far.replace("(0, 1)", &format!("(0, {})", of_f + 1)));
    assert_eq!(changes("number-of-other", &before, &after), ["g changed"]);
}

#[test]
fn files_of_which_objtool_has_read_only_one_are_not_compared() {
    let rows = "asm(\".pushsection .orc_unwind_ip,\\\"a\\\"\\n.long f - .\\n.popsection\\n.pushsection .orc_unwind,\\\"a\\\"\\n.fill 6\\n.popsection\");\n";
    let [with, without, data] = [
        ("half-with", format!("{F}{rows}")),
        ("half-without", F.to_owned()),
        ("half-data", "int a = 3;\n".to_owned()),
    ]
    .map(|(test, text)| compiled(test, &text, true));
    let half = |before: &[u8], after: &[u8]| Comparison::of(before, after).map(drop);
    assert_eq!(half(&with, &without), Err(CompareError::Half { half: "new" }));
    assert_eq!(half(&without, &with), Err(CompareError::Half { half: "old" }));
    for (before, after) in [(&with, &with), (&without, &without), (&data, &with), (&with, &data)] {
        assert_eq!(half(before, after), Ok(()));
    }
}
