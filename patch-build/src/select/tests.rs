//! Changes of literal C, one for each rule of selecting.

use super::{Risk, SelectError, Why};
use crate::elf::Object;
use crate::running::{Places, Shipped};
use crate::testing::{compared, compiled, laid, selected, selected_of};

#[test]
fn a_static_local_stays_the_running_one_and_a_new_one_is_carried() {
    let before = "int f(void) { static int count; return ++count; }\n";
    let after = "int f(void) { static int count; static int other = 5; return ++count + other++; }\n";
    let chosen = selected("static-local", before, after);
    assert_eq!(chosen.replaced(), ["f"]);
    let brought = chosen.brought();
    assert_eq!(brought.len(), 1, "{brought:?}");
    assert!(brought[0].0.starts_with("other"), "{brought:?}");
    assert_eq!(brought[0].1, Why::New("f".to_owned()));
    assert_eq!(chosen.findings(), []);
}

/// The compiler's copy takes what the structure's member holds, and no pointer.
#[test]
fn a_copy_of_the_compilers_is_not_called_beside_other_code() {
    let before = "struct s { int x, y; };\n\
                  static noinline int low(struct s *p, int unused) { return printk(\"%d\", p->x * 3); }\n\
                  int f(struct s *p) { return low(p, 3) + 1; }\n";
    let after = before.replace("+ 1", "+ 2");
    let of = |shipped: &str| {
        let object = Object::parse(&compiled("copy-shipped", shipped, false)).unwrap();
        let chosen = selected_of(compared("copy", before, &after), object);
        let findings = chosen
            .findings()
            .iter()
            .map(|finding| (finding.risk, finding.place.clone()));
        findings.collect::<Vec<_>>()
    };
    assert_eq!(of(before), []);
    assert_eq!(
        of(&before.replace("* 3", "* 5")),
        [(Risk::OtherCode, "x.c: low.constprop.0.isra.0".to_owned())]
    );
}

#[test]
fn a_changed_inline_helper_brings_all_who_have_it_inside() {
    let before = "static inline int help(int a) { return a + 1; }\n\
                  int f(int a) { return help(a) * 3; }\nint g(int a) { return help(a) * 5; }\nint h(int a) { return a; }\n";
    let chosen = selected("inlined", before, &before.replace("a + 1", "a + 2"));
    assert_eq!(chosen.replaced(), ["f", "g"]);
}

#[test]
fn a_function_is_not_replaced_by_two() {
    let before = "int f(int a) { return a + 1; }\n";
    let chosen = selected("twice", before, &before.replace("+ 1", "+ 2"));
    let mut replaced = chosen.selection.as_ref().unwrap().replaced.clone();
    assert_eq!(super::roots::check_once(&chosen.side, &replaced), Ok(()));
    replaced.extend(replaced.clone());
    let error = super::roots::check_once(&chosen.side, &replaced).unwrap_err();
    assert!(
        error.to_string().starts_with("f of the kernel is in x.c and in x.c"),
        "{error}"
    );
}

#[test]
fn a_function_of_several_names_is_replaced_once() {
    let before = "static long of_do(int a) { return a + 1; }\nlong of_a(int a) __attribute__((alias(\"of_do\")));\n\
                  long of_b(int a) __attribute__((alias(\"of_do\")));\n";
    let chosen = selected("aliases", before, &before.replace("+ 1", "+ 2"));
    assert_eq!(chosen.replaced(), ["of_do"]);
}

/// Two functions of one code, of which the compiler makes one.
const SAME: &str = "static noinline int of_tcp(int a) { return printk(\"bad %d\", a) + 1; }\n\
                    static noinline int of_udp(int a) { return printk(\"bad %d\", a) + 1; }\n\
                    int f(int a) { return of_tcp(a) * 3; }\nint g(int a) { return of_udp(a) * 5; }\n";
const SAME_CHANGED: &str = "static noinline int of_tcp(int a) { return printk(\"bad %d\", a) + 2; }\n\
                            static noinline int of_udp(int a) { return printk(\"bad %d\", a) + 2; }\n\
                            int f(int a) { return of_tcp(a) * 3; }\nint g(int a) { return of_udp(a) * 5; }\n";

#[test]
fn one_of_two_functions_that_the_kernel_has_as_one_is_not_replaced() {
    for (test, other) in [("same-tcp", "of_udp"), ("same-udp", "of_tcp")] {
        let changed = if other == "of_udp" { "of_tcp" } else { "of_udp" };
        let old = format!("int {changed}(int a) {{ return printk(\"bad %d\", a) + 1");
        assert!(SAME.contains(&old));
        let chosen = selected(test, SAME, &SAME.replace(&old, &old.replace("+ 1", "+ 2")));
        let Err(SelectError::Shared { name, other: found, .. }) = &chosen.selection else {
            panic!("{:?}", chosen.selection)
        };
        assert_eq!([name, found], [changed, other]);
    }
}

#[test]
fn two_functions_that_are_one_before_and_after_are_replaced_once() {
    let chosen = selected("same-both", SAME, SAME_CHANGED);
    assert_eq!(chosen.replaced(), ["of_udp"]);
}

/// A new function whose code is an old one's: a pointer to the old one stays the kernel's.
#[test]
fn a_function_that_a_new_one_was_made_one_with_is_the_running_one() {
    let before = "static noinline int of_tcp(int a) { return printk(\"bad %d\", a) + 1; }\n\
                  void *f(int a) { return of_tcp(a) ? of_tcp : 0; }\n";
    let after = "static noinline int of_tcp(int a) { return printk(\"bad %d\", a) + 1; }\n\
                 static noinline int of_udp(int a) { return printk(\"bad %d\", a) + 1; }\n\
                 void *f(int a) { return of_tcp(a) + of_udp(a) ? of_tcp : 0; }\n";
    let chosen = selected("same-new", before, after);
    assert_eq!(chosen.replaced(), ["f"]);
    let object = crate::testing::laid(&chosen);
    let names: Vec<&str> = object.symbols.iter().map(|symbol| symbol.name.as_str()).collect();
    assert!(names.contains(&".klp.sym.m.of_tcp,0"), "{names:?}");
    assert!(chosen.brought().is_empty(), "{:?}", chosen.brought());
}

#[test]
fn two_functions_that_became_one_are_both_replaced_by_it() {
    let before = SAME.replace(
        "of_udp(int a) { return printk(\"bad %d\", a) + 1",
        "of_udp(int a) { return printk(\"bad %d\", a) + 7",
    );
    let chosen = selected("became-same", &before, SAME_CHANGED);
    let replaced = &chosen.selection.as_ref().unwrap().replaced;
    let new_of = |name: &str| replaced[chosen.replaced().iter().position(|old| *old == name).unwrap()].new;
    assert_eq!(new_of("of_tcp"), new_of("of_udp"));
}

#[test]
fn a_new_function_is_carried_and_an_old_one_is_called() {
    let before = "static noinline int old(int a) { return printk(\"%d\", a); }\nint f(int a) { return old(a); }\n";
    let after = "static noinline int old(int a) { return printk(\"%d\", a); }\n\
                 static noinline int new(int a) { return printk(\"new %d\", a); }\nint f(int a) { return old(a) + new(a); }\n";
    let chosen = selected("new-function", before, after);
    assert_eq!(chosen.replaced(), ["f"]);
    assert_eq!(chosen.brought(), [("new", Why::New("f".to_owned()))]);
}

/// A function with a part that is hardly ever run.
const RARE: &str = "extern int printk(const char *, ...) __attribute__((cold));\n\
                    extern void panic(const char *, ...) __attribute__((cold, noreturn));\n\
                    int f(int a) { if (__builtin_expect(a > 9, 0)) { printk(\"bad %d\", a); panic(\"worse\"); } return a * 3; }\n";

#[test]
fn the_rare_part_goes_with_the_whole() {
    let chosen = selected("cold", RARE, &RARE.replace("a * 3", "a * 5"));
    assert_eq!(chosen.replaced(), ["f"]);
    assert_eq!(chosen.brought(), [("f.cold", Why::Part("f".to_owned()))]);
}

#[test]
fn a_change_in_the_rare_part_alone_replaces_the_whole() {
    let chosen = selected("cold-alone", RARE, &RARE.replace("\"worse\"", "\"worst\""));
    assert_eq!(chosen.replaced(), ["f"]);
    assert_eq!(chosen.brought(), [("f.cold", Why::Part("f".to_owned()))]);
}

/// What is jumped to from the rare part is what a name stands for, whichever of its names the compiler calls the part by.
#[test]
fn a_change_in_the_rare_part_of_a_function_of_several_names_leads_back_into_the_new_one() {
    let text = format!(
        "{}long z(int a) __attribute__((alias(\"f\")));\n",
        RARE.replace("int f(", "long f(")
    )
    .replace("panic(\"worse\");", "");
    let chosen = selected("cold-alias", &text, &text.replace("\"bad %d\"", "\"bad: %d\""));
    assert_eq!(chosen.replaced(), ["f"]);
    let object = crate::testing::laid(&chosen);
    let names: Vec<&str> = object.symbols.iter().map(|symbol| symbol.name.as_str()).collect();
    assert!(!names.iter().any(|name| name.starts_with(".klp.sym.m")), "{names:?}");
}

/// As files of a module have it that each have a static of that name.
#[test]
fn of_two_variables_of_one_name_in_a_module_its_code_says_which_one_is_meant() {
    let text = "static int one, two;\nint g(void) { return ++one; }\nint f(int a) { return ++two + a; }\n";
    let comparison = crate::testing::compared("namesakes", text, &text.replace("+ a", "- a"));
    let mut object = Object::parse(&crate::testing::compiled("namesakes", text, false)).unwrap();
    let place = |object: &Object, name: &str| -> Vec<_> {
        let named = object.symbols.iter().filter(|symbol| symbol.name == name);
        named.map(|symbol| symbol.place).collect()
    };
    let two = place(&object, "two");
    for symbol in object.symbols.iter_mut().filter(|symbol| symbol.name == "one") {
        symbol.name = "two".to_owned();
    }
    let namesakes = place(&object, "two");
    let shipped = Shipped::Module {
        name: "m".to_owned(),
        object,
    };
    let places = Places::find(&comparison.before, &shipped);
    let id = comparison.before.named("two").unwrap();
    assert_eq!(places.count(id), 2);
    let sympos = places.get(id).unwrap().sympos;
    assert_eq!(namesakes[usize::try_from(sympos).unwrap() - 1], two[0]);
}

/// As where another file of the module has a static of that name for its start.
#[test]
fn a_symbol_of_a_module_whose_namesake_is_gone_after_the_start_is_refused() {
    let text = "extern int shared;\nint f(int a) { return shared + a; }\n";
    let comparison = crate::testing::compared("start-namesake", text, &text.replace("+ a", "- a"));
    let module = "static __attribute__((used, section(\".init.data\"))) int gone = 1;\nint shared = 2;\n\
                  int f(int a) { return shared + a; }\n";
    let mut object = Object::parse(&crate::testing::compiled("start-namesake", module, false)).unwrap();
    for symbol in object.symbols.iter_mut().filter(|symbol| symbol.name == "gone") {
        symbol.name = "shared".to_owned();
    }
    let selection = crate::testing::selected_of(comparison, object).selection;
    assert!(
        matches!(&selection, Err(SelectError::Ambiguous { name, count: 2, .. }) if name == "shared"),
        "{selection:?}"
    );
}

#[test]
fn what_the_kernel_does_not_have_is_refused_with_who_needs_it() {
    let before = "extern int nowhere(int);\nint f(int a) { return nowhere(a); }\n";
    let chosen = selected("unknown", before, &before.replace("nowhere(a)", "nowhere(a + 1)"));
    let Err(error) = &chosen.selection else {
        panic!("{:?}", chosen.selection)
    };
    assert_eq!(
        error.to_string(),
        "x.c: f needs nowhere, which the kernel does not have"
    );
}

#[test]
fn changed_data_a_removed_global_and_a_changed_layout_are_findings() {
    let before =
        "int limit = 3;\nint gone = 1;\nstruct s { int a; };\nint f(struct s *s) { return s->a + limit + gone; }\n";
    let after = "int limit = 4;\nstruct s { int a; long b; };\nint f(struct s *s) { return s->a + limit; }\n";
    let chosen = selected("findings", before, after);
    let risks: Vec<Risk> = chosen.findings().iter().map(|finding| finding.risk).collect();
    assert_eq!(risks, [Risk::ChangedData, Risk::Layout, Risk::RemovedGlobal]);
    assert!(
        chosen.findings()[1].reason.contains("4 bytes became 16 bytes"),
        "{:?}",
        chosen.findings()
    );
}

#[test]
fn changed_code_of_boot_is_a_finding_and_is_not_carried() {
    let before = "__attribute__((section(\".init.text\"))) int setup(int a) { return a + 1; }\n";
    let chosen = selected("init", before, &before.replace("a + 1", "a + 2"));
    assert_eq!(chosen.replaced(), [""; 0]);
    assert_eq!(chosen.findings()[0].risk, Risk::Init);
}

#[test]
fn a_new_per_cpu_variable_is_one_that_the_loader_gives_each_cpu() {
    let before = "int f(int a) { return a; }\n";
    let after =
        "static __attribute__((section(\".data..percpu\"))) int mine = 1;\nint f(int a) { return a + mine++; }\n";
    let chosen = selected("per-cpu", before, after);
    assert_eq!(chosen.findings(), []);
    let object = crate::testing::laid(&chosen);
    assert_eq!(object.section_named(".data..percpu").unwrap().1.size, 4);
}

#[test]
fn a_new_per_cpu_variable_that_begins_with_an_address_is_refused_by_name() {
    let before = "int f(int a) { return a; }\n";
    let after = "static __attribute__((section(\".data..percpu\"))) void *mine = &mine;\n\
                 int f(int a) { return a + (mine == 0); }\n";
    let chosen = selected("per-cpu-address", before, after);
    assert!(
        matches!(&chosen.selection, Err(SelectError::PerCpuAddress { name, .. }) if name == "mine"),
        "{:?}",
        chosen.selection
    );
}

#[test]
fn a_new_static_key_is_a_finding() {
    let jump = "asm goto(\"1: .byte 0x0f,0x1f,0x44,0,0\\n.pushsection __jump_table,\\\"aw\\\"\\n.long 1b - ., %l[on] - .\\n\
                .quad %c0 - .\\n.popsection\" : : \"i\" (&key) : : on);";
    let before = "static struct { int n; long p; } key;\nint f(int a) { return a; }\n";
    let after = format!("static struct {{ int n; long p; }} key;\nint f(int a) {{ {jump} return a; on: return 1; }}\n");
    let chosen = selected("static-key", before, &after);
    assert_eq!(chosen.findings()[0].risk, Risk::StaticKey);
}

/// A function of a module that hangs on a key of that module, in the section of that name.
fn with_own_key(section: &str) -> String {
    format!(
        "static struct {{ int n; long p; }} key __attribute__((used, section(\"{section}\"))) = {{ 1, 2 }};\n\
         int f(int a) {{ asm goto(\"1: .byte 0x0f,0x1f,0x44,0,0\\n.pushsection __jump_table,\\\"aw\\\"\\n.long 1b - ., %l[on] - .\\n\
         .quad %c0 - .\\n.popsection\" : : \"i\" (&key) : : on); return a + 1; on: return a; }}\n"
    )
}

#[test]
fn a_branch_on_a_key_of_the_patched_module_is_refused_by_name() {
    let before = with_own_key(".data.keys");
    let chosen = selected("module-key", &before, &before.replace("a + 1", "a + 2"));
    assert!(
        matches!(&chosen.selection, Err(SelectError::ModuleKey { key, module, .. }) if key == "key" && module == "m"),
        "{:?}",
        chosen.selection
    );
}

#[test]
fn what_pr_debug_of_the_patched_module_hangs_on_stays_as_it_was_compiled() {
    let before = with_own_key("__dyndbg");
    let chosen = selected("module-debug", &before, &before.replace("a + 1", "a + 2"));
    assert_eq!(chosen.replaced(), ["f"]);
    assert!(crate::testing::laid(&chosen).section_named("__jump_table").is_none());
}

/// objtool sees one file of several, and takes a function for one whose entry nobody reaches indirectly.
#[test]
fn no_entry_is_sealed() {
    let before = "int f(int a) { return a + 1; }\nasm(\".pushsection .ibt_endbr_seal,\\\"a\\\"\\n.long f - .\\n.popsection\");\n";
    let chosen = selected("seal", before, &before.replace("+ 1", "+ 2"));
    assert_eq!(chosen.replaced(), ["f"]);
    assert!(crate::testing::laid(&chosen).section_named(".ibt_endbr_seal").is_none());
}

#[test]
fn a_pointer_to_a_changed_function_stays_the_old_one() {
    let before = "extern void *kept;\nint f(int a) { return a + 1; }\nvoid *g(void) { return f; }\n";
    let after = "extern void *kept;\nint f(int a) { return a + 2; }\nvoid *g(void) { printk(\"g\"); return f; }\n";
    let chosen = selected("pointer", before, after);
    let object = crate::testing::laid(&chosen);
    let names: Vec<&str> = object.symbols.iter().map(|symbol| symbol.name.as_str()).collect();
    assert!(names.contains(&".klp.sym.m.f,0"), "{names:?}");
}

/// As WARN() with a text does it since 6.19; another function's row is before it in the table.
#[test]
fn a_function_that_hands_its_own_warning_over_brings_that_row_and_no_other() {
    let warns = "asm volatile(\"lea 2f(%%rip), %%rdi\\n1: ud2\\n.pushsection __bug_table,\\\"aw\\\"\\n2: .long 1b - .\\n\
                 .long %c0 - .\\n.word 7\\n.word 1\\n.org 2b+12\\n.popsection\" : : \"i\" (__FILE__));";
    let before = format!("int g(int a) {{ {warns} return a; }}\nint f(int a) {{ {warns} return a + 1; }}\n");
    let chosen = selected("own-row", &before, &before.replace("a + 1", "a + 2"));
    assert_eq!(chosen.replaced(), ["f"]);
    let object = crate::testing::laid(&chosen);
    let (table, rows) = object.section_named("__bug_table").unwrap();
    assert_eq!(rows.size, 12);
    let (_, text) = object.section_named(".text").unwrap();
    let to_table = |relocation: &&crate::elf::Relocation| matches!(object.symbol(relocation).unwrap().place, crate::elf::Place::In(at) if at.section == table);
    let addends: Vec<i64> = text.relocations.iter().filter(to_table).map(|r| r.addend).collect();
    assert_eq!(addends, [-4]);
}

#[test]
fn a_section_that_no_loader_reads_is_refused_by_name() {
    let before =
        "int f(int a) { asm(\"1:\\n.pushsection runtime_ptr_x,\\\"a\\\"\\n.long 1b - .\\n.popsection\"); return a; }\n";
    let chosen = selected("runtime-const", before, &before.replace("return a;", "return a + 1;"));
    assert!(
        matches!(&chosen.selection, Err(SelectError::Section { section, .. }) if section == "runtime_ptr_x"),
        "{:?}",
        chosen.selection
    );
}

#[test]
fn a_new_structure_behind_a_pointer_is_a_finding_and_one_on_the_stack_is_none() {
    let before = "int f(void **private) { return printk(\"%p\", *private); }\n";
    let after = "struct state { int a; };\nint f(void **private) { struct state *state = *private; return printk(\"%d\", state->a); }\n";
    let chosen = selected("new-state", before, after);
    assert_eq!(chosen.findings()[0].risk, Risk::NewState);
    let local = "struct pair { int a, b; };\nint f(void **private) { struct pair pair = { 1, 2 }; return printk(\"%p %d\", *private, pair.b); }\n";
    assert_eq!(selected("stack-state", before, local).findings(), []);
}

/// A file of a module with a default, and the module: what the linker took is weak, or another file's.
fn of_default(test: &str, linked: &str) -> Result<Vec<String>, SelectError> {
    let text = "__attribute__((weak)) int f(int a) { return printk(\"%d\", a); }\n";
    let comparison = crate::testing::compared(test, text, &text.replace("return", "return 1 +"));
    let object = Object::parse(&crate::testing::compiled(test, linked, false)).unwrap();
    let chosen = crate::testing::selected_of(comparison, object);
    chosen.selection.as_ref().map_err(Clone::clone)?;
    Ok(chosen.replaced().into_iter().map(str::to_owned).collect())
}

#[test]
fn a_default_that_another_file_overrides_is_refused_by_name() {
    let strong = "int f(int a) { return printk(\"%d\", a); }\n";
    let selection = of_default("overridden", strong);
    assert!(
        matches!(&selection, Err(SelectError::Overridden { name, .. }) if name == "f"),
        "{selection:?}"
    );
    let weak = format!("__attribute__((weak)) {strong}");
    assert_eq!(of_default("default", &weak).unwrap(), ["f"]);
}

#[test]
fn a_new_default_is_not_taken_where_the_kernel_has_that_function() {
    let before = "int f(int a) { return a; }\n";
    let after = "__attribute__((weak)) int g(int a) { return a * 3; }\nint f(int a) { return g(a) + 1; }\n";
    let linked = format!("int g(int a) {{ return a * 5; }}\n{before}");
    let object = Object::parse(&crate::testing::compiled("new-default", &linked, false)).unwrap();
    let chosen = crate::testing::selected_of(crate::testing::compared("new-default", before, after), object);
    let object = crate::testing::laid(&chosen);
    assert!(
        object.symbols.iter().any(|symbol| symbol.name == ".klp.sym.m.g,0"),
        "{:?}",
        chosen.brought()
    );
}

/// Of two functions of one section objtool leaves out the first row of the second where the first one ends with the same.
#[test]
fn a_function_whose_first_row_is_that_of_the_function_in_front_gets_it_in_the_module() {
    let shared = "#define SHARED __attribute__((section(\".shared.text\")))\n\
                  asm(\".pushsection .shared.text,\\\"ax\\\"\\n9:\\n.popsection\\n.pushsection .orc_unwind_ip,\\\"a\\\"\\n.long 9b - .\\n.popsection\\n\
                  .pushsection .orc_unwind,\\\"a\\\"\\n.fill 6,1,7\\n.popsection\");\n";
    let before = format!("{shared}int SHARED g(int a) {{ return a * 7; }}\nint SHARED f(int a) {{ return a + 1; }}\n");
    let chosen = selected("inherited-row", &before, &before.replace("a + 1", "a + 2"));
    assert_eq!(chosen.replaced(), ["f"]);
    let object = laid(&chosen);
    let (_, rows) = object.section_named(".orc_unwind").unwrap();
    assert_eq!(rows.data, [7; 6]);
    let (_, places) = object.section_named(".orc_unwind_ip").unwrap();
    let [place] = &places.relocations[..] else {
        panic!("{places:?}")
    };
    assert_eq!((object.symbol(place).unwrap().name.as_str(), place.addend), ("f", 0));
}

/// A file whose function jumps to the one in front of it, which takes less where that is near.
const NEAR: &str = "__attribute__((noipa, no_reorder)) static int low(int a) { return printk(\"%d\", a) * 3; }\n__attribute__((no_reorder)) int f(int a) { return low(a + 1); }\n";

/// Another file of the module has the same two, further apart: its code is what a section for each function gives.
#[test]
fn of_two_functions_of_one_name_the_one_of_the_file_is_replaced() {
    let far = NEAR
        .replace("low(", "low_of_other(")
        .replace("int f(", "int f_of_other(")
        .replace(
            "{ return printk",
            "{ asm volatile(\".fill 300, 1, 0x90\"); return printk",
        );
    let mut object = Object::parse(&crate::testing::compiled("near-far", &format!("{far}{NEAR}"), false)).unwrap();
    let at = |object: &Object, name: &str| object.symbols.iter().find(|symbol| symbol.name == name).unwrap().place;
    let (near, other) = (at(&object, "f"), at(&object, "f_of_other"));
    for symbol in &mut object.symbols {
        symbol.name = symbol.name.replace("_of_other", "");
    }
    let namesakes: Vec<_> = object
        .symbols
        .iter()
        .filter(|symbol| symbol.name == "f")
        .map(|symbol| symbol.place)
        .collect();
    assert!(namesakes.contains(&near) && namesakes.contains(&other));
    let unit = crate::compare::Comparison::of(
        &crate::testing::compiled("near", NEAR, true),
        &crate::testing::compiled("near", NEAR, true),
    )
    .unwrap()
    .before;
    let shipped = Shipped::Module {
        name: "m".to_owned(),
        object,
    };
    let mut places = Places::find(&unit, &shipped);
    assert!(!places.are_complete(&unit));
    let as_shipped = crate::compare::Unit::plain(&crate::testing::compiled("near", NEAR, false)).unwrap();
    places.complete(&unit, &as_shipped, &shipped);
    let sympos = places.get(unit.named("f").unwrap()).unwrap().sympos;
    assert_eq!(namesakes[usize::try_from(sympos).unwrap() - 1], near);
}
