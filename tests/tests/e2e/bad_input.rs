//! Damaged modules, one for each part of the loader: one clear line, exit 3, and a guest that is untouched. guest-core's unit tests have the other
//! damages of each part (`guest-core/src/module/damaged.rs`).

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
/// `R_X86_64_32`: a relocation that does not hold an address of the kernel.
const R_X86_64_32: u64 = 10;

/// What is wrong, the module, and words of the line in which vmpatch says so.
fn damaged(modules: &Modules) -> Vec<(&'static str, Spoiled, &'static str)> {
    let good = |module| Spoiled::of(&modules.applied(module));
    let (faults, warns) = (good(Applied::Faults), good(Applied::Warns));
    let (keys, sections) = (good(Applied::StaticKey), good(Applied::Sections));
    let (kpatch, klp_build) = (good(Applied::Kpatch), good(Applied::KlpBuild));
    let this_module = ".gnu.linkonce.this_module";
    vec![
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
        (
            "half a fixup",
            faults.clone().header("__ex_table", Header::Size, |size| size - 4),
            "__ex_table",
        ),
        (
            "a WARN past the end",
            warns.clone().rela("__bug_table", 0, Rela::Addend, |_| FAR),
            "__bug_table+0x0",
        ),
        (
            "two rows for one branch",
            keys.clone().rela_like("__jump_table", 3, 0),
            "__jump_table",
        ),
        (
            "a feature that no CPU has",
            sections.clone().data(".altinstructions", 8, &[0xff, 0x3f]),
            "CPU feature",
        ),
        (
            "a return that is none",
            sections.clone().rela(".return_sites", 0, Rela::Addend, |at| at + 1),
            ".return_sites",
        ),
        (
            "half a paravirt call",
            sections
                .clone()
                .header(".parainstructions", Header::Size, |size| size - 8),
            ".parainstructions",
        ),
        (
            "half a rule",
            sections.clone().header(".orc_unwind", Header::Size, |size| size - 1),
            ".orc_unwind",
        ),
        (
            "one site twice",
            sections.clone().rela_like("__mcount_loc", 1, 0),
            "sites that overlap",
        ),
        (
            "an address that does not fit",
            sections.clone().rela(".rodata", 0, Rela::Kind, |_| R_X86_64_32),
            "overflows 32 bits",
        ),
        (
            "a relocation of no symbol",
            sections.clone().rela(".text", 0, Rela::Symbol, |_| 0xff_ffff),
            "symbol",
        ),
        (
            "code that could write itself",
            sections.clone().header(".text", Header::Flags, |flags| flags | 1),
            "not writable",
        ),
        (
            "a section that nobody knows",
            faults.clone().text(".shstrtab", "__ex_table", "__ey_table"),
            "__ey_table",
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
            "names without end",
            sections
                .clone()
                .each(".strtab", |byte| if byte == 0 { b'A' } else { byte }),
            "name",
        ),
        (
            "a callback of kpatch-build's",
            kpatch.clone().data(".kpatch.callbacks.pre_patch", 0, &[1]),
            "pre_patch",
        ),
        (
            "functions without number",
            klp_build.clone().data(".init.klp_objects", 56, &[0xff; 4]),
            "more than 10000 functions",
        ),
    ]
}

/// The offset of the section headers, the first of which says how many there are where the ELF header does not.
fn sections_at(module: &Spoiled) -> usize {
    let bytes = module.bytes().get(SECTIONS_AT..SECTIONS_AT + 8).unwrap();
    usize::try_from(u64::from_le_bytes(bytes.try_into().unwrap())).unwrap()
}

#[test]
fn a_damaged_module_is_refused_in_one_line_and_the_guest_is_untouched() {
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
