//! Section policy: copy, process, drop or refuse. One table decides for each section of a module. A section that the table does not name is
//! refused.
//!
//! Sources: the kernel's include/linux/module.h, kernel/module/main.c (`find_module_sections`),
//! arch/x86/kernel/module.c (`module_finalize`), scripts/module.lds.S; read in 5.10, 6.1, 6.12 and 7.2.

use super::layout::AreaKind;
use super::sections::Section;

/// What linking does with a section.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum SectionAction {
    /// Copy its bytes into the guest.
    CopyTo(AreaKind),
    /// Process it while linking: it is a table for the loader. The comment names the file that does it.
    Process,
    /// Drop it, for this reason: the guest does not need it. A copied section that refers to it is refused.
    Drop(&'static str),
    /// Refuse the module, for this reason, if the section concerns a copied section.
    Refuse(&'static str),
}

use AreaKind::{Data, PerCpu, RoData, Text};
use SectionAction::{CopyTo, Drop, Process, Refuse};

const INIT: &str = "code and data of module init and exit, which are not run: they only register the patch";
const GUEST_LIST: &str = "the guest would have to offer it to modules of its own";
const NAMES: &str = "a list for people and tools";
const TRACING: &str =
    "a list of tracepoints and trace events for the guest's tracers, which don't get to know those of a patch";
const PARAMETERS: &str =
    "parameters of the module, which the guest does not show: their variables have the values of the file";
const OWNED: &str = "tells the kernel's own loader about the module as a whole, which that loader never sees";

/// Numbers of types for BPF (include/linux/btf_ids.h). They refer to the module's own BTF, which the guest does not get.
const BTF_IDS: &str = ".BTF_ids";
/// The section that may refer to them. From 7.3 on, each class of trace events does (include/trace/trace_events.h), for a file in the guest's
/// tracefs that a patch's classes do not have. So the guest does not read the numbers.
const EVENT_CLASSES: &str = ".ref.data";

/// Why code or data in section `from` may not refer to `section`; `None` if it may.
pub(crate) fn bars(section: &str, from: &str) -> Option<&'static str> {
    (section == BTF_IDS && from != EVENT_CLASSES)
        .then_some("numbers of types for BPF, which mean something only with the module's own BTF, and the guest does not get that")
}

/// The name of a section (a pattern that ends in `*` is the beginning of a name) and the action. The first line that fits decides.
#[rustfmt::skip]
const TABLE: &[(&str, SectionAction)] = &[
    // Code.
    (".text",                   CopyTo(Text)),
    (".text.*",                 CopyTo(Text)),
    (".noinstr.text",           CopyTo(Text)),
    (".ref.text",               CopyTo(Text)),
    (".sched.text",             CopyTo(Text)),
    (".cpuidle.text",           CopyTo(Text)),
    (".spinlock.text",          CopyTo(Text)),
    (".kprobes.text",           CopyTo(Text)),
    (".fixup",                  CopyTo(Text)),     // where faulting instructions go on, up to 5.15
    (".altinstr_aux",           CopyTo(Text)),     // slow path of static_cpu_has()
    (".static_call.text",       CopyTo(Text)),     // trampolines of the module's own static calls

    // Read-only data. Data that init would write once stay as they are: init is not run.
    (".rodata",                 CopyTo(RoData)),
    (".rodata.*",               CopyTo(RoData)),
    (".data.rel.ro*",           CopyTo(RoData)),
    (".data..ro_after_init",    CopyTo(RoData)),

    // Data.
    (".data..percpu",           CopyTo(PerCpu)),
    (".data..percpu.*",         Refuse("a copy for each CPU, which the kernel's own loader gives to .data..percpu only")),
    (".data",                   CopyTo(Data)),
    (".ref.data",               CopyTo(Data)),     // classes of trace events: what may refer to init data
    (".data.*",                 CopyTo(Data)),     // also .data.once, .data..read_mostly, .data..cacheline_aligned
    // Descriptors of pr_debug(): the guest does not list them, so each stays on or off as it was compiled.
    ("__dyndbg*",               CopyTo(Data)),
    // Tracepoints of the module's own: the guest does not list them, so each stays off.
    ("__tracepoints",           CopyTo(Data)),
    ("__tracepoints_strings",   CopyTo(RoData)),
    (".bss",                    CopyTo(Data)),
    (".bss.*",                  CopyTo(Data)),

    // Tables for the loader.
    (".altinstructions",        Process),            // alternatives.rs
    ("__jump_table",            Process),            // jump_labels.rs
    (".altinstr_replacement",   CopyTo(AreaKind::Scratch)),
    (".retpoline_sites",        Process),            // branches.rs
    (".return_sites",           Process),            // branches.rs
    (".parainstructions",       Process),            // paravirt.rs
    ("__mcount_loc",            Process),            // fentry.rs
    (".orc_unwind_ip",          Process),            // orc.rs
    (".orc_unwind",             Process),            // orc.rs
    (".orc_header",             Process),            // a digest of the ORC format, for the caller to compare
    ("__ex_table",              Process),            // instruction_tables.rs
    ("__bug_table",             Process),            // instruction_tables.rs

    // Tables for the loader that need not be processed.
    (".smp_locks",              Drop("where lock prefixes may be dropped on one CPU: keeping them is right on any number")),
    (".static_call_sites",      Drop("calls that may skip their trampoline: through the trampoline they reach the same target")),
    (".ibt_endbr_seal",         Drop("entries never reached indirectly, whose ENDBR may go: keeping it is right, sealing hardens")),
    (".call_sites",             Drop("calls to be counted on a guest that tracks call depth, and such a guest is refused")),
    ("__patchable_function_entries", Drop("padding in front of functions; the x86 loader does not read the list")),

    // The module as a whole.
    (".init.*",                 Drop(INIT)),
    (".exit.*",                 Drop(INIT)),
    (".gnu.linkonce.this_module", Drop(OWNED)),
    (".modinfo",                Drop(OWNED)),
    ("__param",                 Drop(PARAMETERS)),
    ("__versions",              Drop(OWNED)),
    ("__version_ext_crcs",      Drop(OWNED)),
    ("__version_ext_names",     Drop(OWNED)),
    (".note*",                  Drop(NAMES)),
    // Only classes of trace events may refer to it (selection.rs).
    (BTF_IDS,                   CopyTo(RoData)),
    (".BTF*",                   Drop(NAMES)),
    (".printk_index",           Drop(NAMES)),
    ("__tracepoints_ptrs",      Drop(TRACING)),
    ("__tracepoint_check",      Drop(TRACING)),
    ("_ftrace_events",          Drop(TRACING)),
    ("_ftrace_eval_map",        Drop(TRACING)),
    ("__bpf_raw_tp_map",        Drop(TRACING)),
    ("__kcrctab*",              Refuse(GUEST_LIST)),
    ("__ksymtab*",              Refuse(GUEST_LIST)),
    ("__kflagstab*",            Refuse(GUEST_LIST)),
    (".ctors*",                 Refuse("functions to be run at load")),
    (".init_array*",            Refuse("functions to be run at load")),

    // What the guest would have to know before the code can run.
    ("__trace_printk_fmt",      Refuse("trace_printk() formats, which the guest would have to know")),
    ("___srcu_struct_ptrs",     Refuse("an SRCU domain of the module's own, which the guest would have to set up")),
    ("_kprobe_blacklist",       Drop("functions that the guest's root had better not probe; nothing else reads the list")),
    ("_error_injection_whitelist", Drop("functions that may be made to fail on purpose; the guest offers none of the patch's")),
    (".cfi_sites",              Refuse("control-flow checks (FineIBT) to be rewritten for the guest's CPU")),
    ("__kcfi_traps",            Refuse("control-flow check failures, which the guest would have to search")),
    (".kcfi_traps",             Refuse("control-flow check failures, which the guest would have to search")),
    (".codetag*",               Refuse("allocation counters, which the guest would have to know")),
    ("alloc_tags",              Refuse("allocation counters, which the guest would have to know")),
    (".kunit*",                 Refuse("tests to be run at load")),

    // Livepatch descriptors that are not a struct klp_patch; .init.klp_* are among .init.* (klp_build.rs).
    (".kpatch.funcs",           Process),            // kpatch.rs
    (".kpatch.strings",         Process),            // kpatch.rs
    (".kpatch.callbacks.*",     Process),            // kpatch.rs
    (".kpatch.force",           Drop("functions to be changed though in use, for kpatch's own kernel module; a livepatch module does not read it")),
    ("__klp_relocs.*",          Drop("what klp-build made the livepatch relocations of")),
];

/// The action for `section`, a loaded one.
pub(crate) fn action(section: &Section<'_>) -> SectionAction {
    let fits = |pattern: &str| match pattern.strip_suffix('*') {
        Some(prefix) => section.name.starts_with(prefix),
        None => section.name == pattern,
    };
    let Some((_, action)) = TABLE.iter().find(|(pattern, _)| fits(pattern)) else {
        return Refuse("nothing is known about it");
    };
    match *action {
        // The flags must agree with what the name promises.
        CopyTo(Text) if section.is_writable() || !section.is_executable() => {
            Refuse("code must be executable and not writable")
        }
        CopyTo(RoData | Data | PerCpu) if section.is_executable() => Refuse("data must not be executable"),
        action => action,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use object::elf::{SHF_ALLOC, SHF_EXECINSTR, SHF_WRITE, SHT_PROGBITS};

    fn section(name: &str, flags: u64) -> Section<'_> {
        Section {
            name,
            kind: SHT_PROGBITS.0,
            flags,
            size: 8,
            align: 1,
            data: &[0; 8],
            relocations: Vec::new(),
        }
    }

    #[test]
    fn a_section_that_the_table_does_not_name_is_refused() {
        assert!(matches!(action(&section("__new_in_7_9", SHF_ALLOC.0)), Refuse(_)));
        assert!(matches!(action(&section(".text_tables", SHF_ALLOC.0)), Refuse(_)));
    }

    #[test]
    fn per_cpu_data_is_not_taken_for_data() {
        assert_eq!(
            action(&section(".data..percpu", SHF_ALLOC.0 | SHF_WRITE.0)),
            CopyTo(PerCpu)
        );
        assert!(matches!(
            action(&section(".data..percpu..read_mostly", SHF_ALLOC.0 | SHF_WRITE.0)),
            Refuse(_)
        ));
        assert_eq!(
            action(&section(".data..read_mostly", SHF_ALLOC.0 | SHF_WRITE.0)),
            CopyTo(Data)
        );
    }

    #[test]
    fn ro_after_init_data_is_read_only() {
        assert_eq!(
            action(&section(".data..ro_after_init", SHF_ALLOC.0 | SHF_WRITE.0)),
            CopyTo(RoData)
        );
    }

    #[test]
    fn only_classes_of_trace_events_may_use_numbers_of_types() {
        assert!(bars(".BTF_ids", ".text").is_some() && bars(".BTF_ids", ".data").is_some());
        assert_eq!((bars(".BTF_ids", ".ref.data"), bars(".rodata", ".text")), (None, None));
    }

    #[test]
    fn code_that_could_write_itself_is_refused() {
        assert_eq!(action(&section(".text.f", SHF_ALLOC.0 | SHF_EXECINSTR.0)), CopyTo(Text));
        assert!(matches!(
            action(&section(".text", SHF_ALLOC.0 | SHF_EXECINSTR.0 | SHF_WRITE.0)),
            Refuse(_)
        ));
        assert!(matches!(action(&section(".text", SHF_ALLOC.0)), Refuse(_)));
        assert!(matches!(
            action(&section(".data", SHF_ALLOC.0 | SHF_WRITE.0 | SHF_EXECINSTR.0)),
            Refuse(_)
        ));
    }

    /// How many sections a list in `golden` names; each must be handled as it says there.
    fn known(golden: &str) -> usize {
        let mut known = 0;
        for line in golden.lines().filter(|line| !line.starts_with('#')) {
            let [name, flags, _, expected] = line.split(' ').collect::<Vec<_>>()[..] else {
                panic!("{line}")
            };
            let flag = |letter, bit| if flags.contains(letter) { bit } else { 0 };
            let flags = SHF_ALLOC.0 | flag('W', SHF_WRITE.0) | flag('X', SHF_EXECINSTR.0);
            let found = match action(&section(name, flags)) {
                CopyTo(Text) => "text",
                CopyTo(RoData) => "rodata",
                CopyTo(Data) => "data",
                CopyTo(AreaKind::Scratch) => "scratch",
                Process => "work",
                Drop(_) => "drop",
                other => panic!("{name}: {other:?}"),
            };
            assert_eq!(found, expected, "{name}");
            known += 1;
        }
        known
    }

    #[test]
    fn every_section_that_kpatch_build_leaves_is_known() {
        assert_eq!(known(include_str!("golden/kpatch_build.txt")), 38);
    }

    #[test]
    fn every_section_that_klp_build_leaves_is_known() {
        assert_eq!(known(include_str!("golden/klp_build.txt")), 31);
    }

    #[test]
    fn the_documents_name_every_section() {
        let docs = include_str!("../../../docs/modules.md");
        for (pattern, _) in TABLE {
            assert!(docs.contains(&format!("`{pattern}`")), "{pattern}");
        }
    }

    #[test]
    fn every_pattern_is_in_the_table_once() {
        for (index, (pattern, _)) in TABLE.iter().enumerate() {
            assert!(
                TABLE.iter().skip(index + 1).all(|(other, _)| other != pattern),
                "{pattern} comes twice"
            );
        }
    }
}
