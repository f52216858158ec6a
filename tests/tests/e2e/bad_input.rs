//! For every duty of a module's loader a module that violates it: one clear line, exit 3, and a guest that nobody has touched.

use std::fs;
use std::path::PathBuf;

use e2e::bed;
use e2e::ftrace::Ftrace;
use e2e::kit::{self, Modules};
use e2e::monitor::Monitor;
use e2e::ram::Ram;
use e2e::spoil::{Header, Rela, Spoiled};
use e2e::vmpatch::Vmpatch;
use images::build::hand_written::Applied;
use images::kernel::Kernel;

/// Further than any section reaches.
const FAR: u64 = 1 << 24;
/// More than any file has.
const HUGE: u64 = 1 << 40;
/// Offsets in the ELF header: where the section headers are, and how many (System V ABI).
const SECTIONS_AT: usize = 40;
const SECTIONS: usize = 60;
/// Relocation types that do not hold an address of the kernel, and that no module has.
const R_X86_64_32: u64 = 10;
const R_X86_64_GOTPCREL: u64 = 9;
const R_X86_64_64: u64 = 1;
/// `st_shndx` in an ELF symbol, of 24 bytes, and what it is for a COMMON one.
const SYMBOL_BYTES: usize = 24;
const SECTION_INDEX: usize = 6;
const COMMON: [u8; 2] = [0xf2, 0xff];

/// What is wrong, the module, and words of the line in which vmpatch says so.
fn damaged(modules: &Modules) -> Vec<(&'static str, Spoiled, &'static str)> {
    let good = |module| Spoiled::of(&modules.applied(module));
    let (faults, warns) = (good(Applied::Faults), good(Applied::Warns));
    let (keys, sections) = (good(Applied::StaticKey), good(Applied::Sections));
    let (kpatch, klp_build) = (good(Applied::Kpatch), good(Applied::KlpBuild));
    let symbols = good(Applied::Symbols);
    let first_symbol_of_text = |module: &Spoiled, index: usize| {
        let text = module.section(".rela.text").1.start + index * 24 + 12;
        let bytes = module.bytes().get(text..text + 4).unwrap();
        let symbol = u32::from_le_bytes(bytes.try_into().unwrap()) as usize;
        module.section(".symtab").1.start + symbol * SYMBOL_BYTES + SECTION_INDEX
    };
    let [text, rodata] = [".text", ".rodata"].map(|name| sections.section(name).1.len() as u64);
    let common = first_symbol_of_text(&sections, 0);
    let this_module = ".gnu.linkonce.this_module";
    vec![
        // The module's own structure.
        (
            "a struct module of another size",
            faults.clone().header(this_module, Header::Size, |size| size - 64),
            "compiled with a struct module of",
        ),
        (
            "a pointer to init in another place",
            faults.clone().rela(this_module, 0, Rela::Offset, |at| at + 8),
            "compiled with another struct module",
        ),
        // What the guest searches for an instruction.
        (
            "a fixup of code past the end",
            faults.clone().rela("__ex_table", 0, Rela::Addend, |_| FAR),
            "__ex_table+0x0",
        ),
        (
            "a fixup that goes on past the end",
            faults.clone().rela("__ex_table", 1, Rela::Addend, |_| FAR),
            "__ex_table+0x4",
        ),
        (
            "half a fixup",
            faults.clone().header("__ex_table", Header::Size, |size| size - 4),
            "__ex_table",
        ),
        (
            "a fixup with an address",
            faults.clone().rela("__ex_table", 0, Rela::Kind, |_| R_X86_64_64),
            "__ex_table+0x0",
        ),
        (
            "a WARN past the end",
            warns.clone().rela("__bug_table", 0, Rela::Addend, |_| FAR),
            "__bug_table+0x0",
        ),
        (
            "half a WARN",
            warns.clone().header("__bug_table", Header::Size, |size| size - 2),
            "__bug_table",
        ),
        // Branches on static keys.
        (
            "half a row",
            keys.clone().header("__jump_table", Header::Size, |size| size - 8),
            "__jump_table",
        ),
        (
            "a branch past the end",
            keys.clone().rela("__jump_table", 0, Rela::Addend, |_| FAR),
            "__jump_table+0x0",
        ),
        (
            "a branch to past the end",
            keys.clone().rela("__jump_table", 1, Rela::Addend, |_| FAR),
            "__jump_table+0x4",
        ),
        (
            "a branch in the middle of an instruction",
            keys.clone().rela("__jump_table", 0, Rela::Addend, |at| at + 1),
            "a jump or a NOP of 2 or 5 bytes",
        ),
        (
            "a key that is no distance",
            keys.clone().rela("__jump_table", 2, Rela::Kind, |_| R_X86_64_64),
            "__jump_table+0x8",
        ),
        (
            "two rows for one branch",
            keys.clone().rela_like("__jump_table", 3, 0),
            "__jump_table",
        ),
        // Alternatives.
        (
            "half an alternative",
            sections
                .clone()
                .header(".altinstructions", Header::Size, |size| size - 1),
            ".altinstructions",
        ),
        (
            "an alternative for code past the end",
            sections.clone().rela(".altinstructions", 0, Rela::Addend, |_| FAR),
            ".altinstructions+0x0",
        ),
        (
            "a replacement past the end",
            sections.clone().rela(".altinstructions", 1, Rela::Addend, |_| FAR),
            ".altinstructions+0x4",
        ),
        (
            "a replacement longer than what it replaces",
            sections.clone().data(".altinstructions", 11, &[0xff]),
            ".altinstructions",
        ),
        (
            "code to be replaced, longer than its section",
            sections.clone().rela(".altinstructions", 0, Rela::Addend, |_| text - 1),
            "not inside a placed section",
        ),
        (
            "a feature that no CPU has",
            sections.clone().data(".altinstructions", 8, &[0xff, 0x3f]),
            "CPU feature",
        ),
        // Branches.
        (
            "half a site",
            sections.clone().header(".return_sites", Header::Size, |size| size - 2),
            ".return_sites",
        ),
        (
            "a return that is none",
            sections.clone().rela(".return_sites", 0, Rela::Addend, |at| at + 1),
            ".return_sites",
        ),
        (
            "an indirect branch that is none",
            sections.clone().rela(".retpoline_sites", 0, Rela::Addend, |at| at + 1),
            ".retpoline_sites",
        ),
        (
            "an indirect branch past the end",
            sections.clone().rela(".retpoline_sites", 0, Rela::Addend, |_| FAR),
            ".retpoline_sites+0x0",
        ),
        (
            "a paravirt call past the end",
            sections.clone().rela(".parainstructions", 0, Rela::Addend, |_| FAR),
            ".parainstructions+0x0",
        ),
        (
            "half a paravirt call",
            sections
                .clone()
                .header(".parainstructions", Header::Size, |size| size - 8),
            ".parainstructions",
        ),
        // How to unwind.
        (
            "fewer places than rules",
            sections.clone().header(".orc_unwind_ip", Header::Size, |size| size - 4),
            ".orc_unwind",
        ),
        (
            "half a rule",
            sections.clone().header(".orc_unwind", Header::Size, |size| size - 1),
            ".orc_unwind",
        ),
        (
            "a rule for code past the end",
            sections.clone().rela(".orc_unwind_ip", 0, Rela::Addend, |_| FAR),
            ".orc_unwind_ip+0x0",
        ),
        // Where functions are traced.
        (
            "half a site",
            sections.clone().header("__mcount_loc", Header::Size, |size| size - 4),
            "__mcount_loc",
        ),
        (
            "a site past the end",
            sections.clone().rela("__mcount_loc", 0, Rela::Addend, |_| FAR),
            "__mcount_loc+0x0",
        ),
        (
            "a site that is no call",
            sections.clone().rela("__mcount_loc", 0, Rela::Addend, |at| at + 1),
            "__mcount_loc",
        ),
        (
            "one site twice",
            sections.clone().rela_like("__mcount_loc", 1, 0),
            "sites that overlap",
        ),
        // Relocations.
        (
            "an address that does not fit",
            sections.clone().rela(".rodata", 0, Rela::Kind, |_| R_X86_64_32),
            "overflows 32 bits",
        ),
        (
            "a relocation past its section's end",
            sections.clone().rela(".text", 0, Rela::Offset, |_| FAR),
            "not inside a placed section",
        ),
        (
            "a relocation across its section's end",
            sections.clone().rela(".rodata", 0, Rela::Offset, |_| rodata - 4),
            "not inside a placed section",
        ),
        (
            "a relocation that needs a table",
            sections.clone().rela(".text", 0, Rela::Kind, |_| R_X86_64_GOTPCREL),
            "relocation type 9",
        ),
        (
            "a relocation of no symbol",
            sections.clone().rela(".text", 0, Rela::Symbol, |_| 0xff_ffff),
            "symbol",
        ),
        (
            "two relocations in one place",
            sections
                .clone()
                .rela(".rodata", 1, Rela::Offset, |_| 0)
                .rela(".rodata", 0, Rela::Offset, |_| 0),
            "expected zeroes",
        ),
        (
            "a livepatch symbol without an object",
            symbols
                .clone()
                .text(".strtab", ".klp.sym.vmlinux.", ".klp.sym.vmlinux_"),
            ".klp.sym.",
        ),
        // Sections and symbols.
        (
            "variables that no memory holds",
            sections.clone().header(".bss", Header::Size, |_| HUGE),
            "does not fit",
        ),
        (
            "an alignment that no address has",
            sections.clone().header(".text", Header::Align, |_| 3),
            "aligned to 3 bytes",
        ),
        (
            "per-CPU variables aligned to more than a page",
            sections.clone().header(".data..percpu", Header::Align, |_| 8192),
            "aligned to 8192 bytes",
        ),
        (
            "code that could write itself",
            sections.clone().header(".text", Header::Flags, |flags| flags | 1),
            "not writable",
        ),
        (
            "data that could run",
            sections.clone().header(".data", Header::Flags, |flags| flags | 4),
            "must not be executable",
        ),
        (
            "a section that nobody knows",
            faults.clone().text(".shstrtab", "__ex_table", "__ey_table"),
            "__ey_table",
        ),
        (
            "a COMMON symbol",
            sections.clone().put(common, &COMMON),
            "no module may use",
        ),
        (
            "a symbol of a section that is not there",
            sections.clone().put(common, &[0xfe, 0xfe]),
            "section",
        ),
        (
            "more sections than there is room for",
            sections.clone().put(SECTIONS, &[0xff, 0xfe]),
            "truncated",
        ),
        (
            "sections without number",
            sections
                .clone()
                .put(SECTIONS, &[0, 0])
                .word(sections_at(&sections) + 32, |_| HUGE),
            "section",
        ),
        (
            "section headers past the end",
            sections.clone().word(SECTIONS_AT, |_| HUGE),
            "truncated",
        ),
        (
            "a table of symbols past the end",
            sections.clone().header(".symtab", Header::Size, |_| HUGE),
            "truncated",
        ),
        (
            "names without end",
            sections
                .clone()
                .each(".strtab", |byte| if byte == 0 { b'A' } else { byte }),
            "name",
        ),
        (
            "a module that says nothing of itself",
            sections.clone().each(".modinfo", |_| b'A'),
            "modinfo",
        ),
        // What is to be patched.
        (
            "half a function",
            kpatch.clone().header(".kpatch.funcs", Header::Size, |size| size - 8),
            "a whole number of 56 bytes",
        ),
        (
            "a name past the end",
            kpatch.clone().rela(".kpatch.funcs", 1, Rela::Addend, |_| FAR),
            "kpatch_patch_func.name",
        ),
        (
            "a callback of kpatch-build's",
            kpatch.clone().data(".kpatch.callbacks.pre_patch", 0, &[1]),
            "pre_patch",
        ),
        (
            "half an object",
            klp_build
                .clone()
                .header(".init.klp_objects", Header::Size, |size| size - 8),
            "a whole number of 64 bytes",
        ),
        (
            "functions without number",
            klp_build.clone().data(".init.klp_objects", 56, &[0xff; 4]),
            "more than 10000 functions",
        ),
        (
            "a callback of klp-build's",
            klp_build.clone().rela(".init.klp_objects", 0, Rela::Offset, |_| 16),
            "pre_patch",
        ),
    ]
}

/// The offset of the section headers, the first of which says how many there are where the ELF header does not.
fn sections_at(module: &Spoiled) -> usize {
    let bytes = module.bytes().get(SECTIONS_AT..SECTIONS_AT + 8).unwrap();
    usize::try_from(u64::from_le_bytes(bytes.try_into().unwrap())).unwrap()
}

#[test]
fn a_module_that_violates_a_duty_is_refused_in_one_line_and_the_guest_is_untouched() {
    let kernel = Kernel::CLOUD_6_1;
    let modules = Modules::of(&kernel);
    let guest = bed::lend(kit::guest(kernel));
    let vmpatch = Vmpatch::on(&guest);
    let folder: PathBuf = std::env::temp_dir().join(format!("vmpatch-bad-input-{}", std::process::id()));
    fs::create_dir_all(&folder).unwrap();
    let mut monitor = Monitor::second(&guest);
    monitor.stop();
    let before = Ram::save(&guest, &mut monitor).unwrap();
    let mut wrong = Vec::new();
    for (index, (what, module, words)) in damaged(&modules).into_iter().enumerate() {
        let path = folder.join(format!("{index}.ko"));
        fs::write(&path, module.bytes()).unwrap();
        let answer = vmpatch.run(&["apply", path.to_str().unwrap()]);
        if answer.code == Some(0) {
            vmpatch.revert_all();
        }
        if answer.code != Some(3) || !answer.stdout.is_empty() || !answer.complaint().contains(words) {
            wrong.push(format!("{what}: {words:?} is not in {answer}"));
        }
    }
    let after = Ram::save(&guest, &mut monitor).unwrap();
    assert_eq!(monitor.run_state(), "paused");
    monitor.cont();
    fs::remove_dir_all(&folder).unwrap();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert_eq!(before.pages_unlike(&after, 20), [""; 0]);
    Ftrace::of(&guest).assert_alive();
}
