//! What a damaged module is refused for: a good one that has work for each part of the loader, of which a few bytes are altered where they hurt.

use super::testing::{ALT_6_1, BASES, KLP_6_1, TestElf, TestGuest, TestSection};
use super::{Linked, PatchModule};
use object::elf::{
    R_X86_64_32, R_X86_64_32S, R_X86_64_64, R_X86_64_GOTPCREL, R_X86_64_PC32, R_X86_64_PC64, R_X86_64_PLT32,
    RelocationType, SHF_ALLOC, SHF_EXECINSTR, SHF_WRITE,
};

/// Further than any section reaches.
const FAR: i64 = 1 << 24;
/// More than any file has.
const HUGE: u64 = 1 << 40;
/// Where the ELF header says where the section headers are, and how many (System V ABI).
const SECTIONS_AT: usize = 40;
const SECTION_COUNT_AT: usize = 60;
/// `sh_size` in a section header.
const SIZE_AT: usize = 32;
/// `st_shndx` of a COMMON symbol.
const COMMON: u16 = 0xfff2;
/// Reserved in `st_shndx`, and without a meaning.
const NO_SECTION: u16 = 0xfefe;

/// In the guest: its thunks, its table of paravirt operations, and what that leads to.
const RETURN_THUNK: u64 = 0xffff_ffff_8100_1000;
const RAX_THUNK: u64 = 0xffff_ffff_8100_1020;
const PV_OPS: u64 = 0xffff_ffff_8240_0000;

/// The code of the good module, with its places.
#[rustfmt::skip]
const TEXT: &[u8] = &[
    0xe8, 0, 0, 0, 0,                         // 0x00 call __fentry__
    0xeb, 0,                                  // 0x05 jmp, on a static key
    0x0f, 0x0b,                               // 0x07 ud2: WARN
    0xf3, 0x48, 0x0f, 0xb8, 0xc7,             // 0x09 popcnt %rdi,%rax: an alternative replaces it
    0xe8, 0, 0, 0, 0,                         // 0x0e call __x86_indirect_thunk_rax
    0xff, 0x14, 0x25, 0, 0, 0, 0,             // 0x13 call *pv_ops
    0x8b, 0x07,                               // 0x1a mov (%rdi),%eax: may fault
    0x48, 0xc7, 0xc0, 0, 0, 0, 0,             // 0x1c mov $rodata,%rax
    0x48, 0xc7, 0xc0, 0, 0, 0, 0,             // 0x23 mov $bss,%rax
    0x65, 0x48, 0xff, 0x04, 0x25, 0, 0, 0, 0, // 0x2a incq %gs:percpu
    0xe8, 0, 0, 0, 0,                         // 0x33 call livepatch symbol
    0xe8, 0, 0, 0, 0,                         // 0x38 call __fentry__: a second function's entry
    0xe9, 0, 0, 0, 0,                         // 0x3d jmp __x86_return_thunk
    0xcc, 0xcc,                               // 0x42
];

/// A module with work for each part of the loader.
fn good() -> TestElf {
    let (alloc, write, code) = (SHF_ALLOC.0, SHF_ALLOC.0 | SHF_WRITE.0, SHF_ALLOC.0 | SHF_EXECINSTR.0);
    let mut elf = TestElf::livepatch(TEXT);
    let call = |elf: &mut TestElf, at: u64, symbol: usize, kind: RelocationType, addend| {
        elf.relocation(1, at, kind, symbol, addend);
    };
    let fentry = elf.undefined("__fentry__");
    call(&mut elf, 0x01, fentry, R_X86_64_PLT32, -4);
    call(&mut elf, 0x39, fentry, R_X86_64_PLT32, -4);
    let thunk = elf.undefined("__x86_indirect_thunk_rax");
    call(&mut elf, 0x0f, thunk, R_X86_64_PLT32, -4);
    let operations = elf.undefined("pv_ops");
    call(&mut elf, 0x16, operations, R_X86_64_32S, 0);
    let returns = elf.undefined("__x86_return_thunk");
    call(&mut elf, 0x3e, returns, R_X86_64_PLT32, -4);
    let internal = elf.symbol(".klp.sym.vmlinux.internal,0", 0x12, 0xff20, 0, 0);
    call(&mut elf, 0x34, internal, R_X86_64_PLT32, -4);
    let rodata = elf.section(".rodata", alloc, &[0; 16]);
    elf.relocation(rodata, 0, R_X86_64_64, 1, 5);
    elf.relocation(rodata, 8, R_X86_64_64, 1, 7);
    let bss = elf.nobits(".bss", 16);
    let per_cpu = elf.section(".data..percpu", write, &[0; 8]);
    for (at, section) in [(0x1f, rodata), (0x26, bss), (0x2f, per_cpu)] {
        let symbol = elf.section_symbol(section);
        call(&mut elf, at, symbol, R_X86_64_32S, 0);
    }
    let fixups = elf.section("__ex_table", alloc, &[0; 24]);
    for (row, instruction) in [(0, 0x1a), (12, 0x09)] {
        elf.relocation(fixups, row, R_X86_64_PC32, 1, instruction);
        elf.relocation(fixups, row + 4, R_X86_64_PC32, 1, 0x1c);
    }
    let bugs = elf.section("__bug_table", write, &[0; 12]);
    elf.relocation(bugs, 0, R_X86_64_PC32, 1, 7);
    elf.relocation(bugs, 4, R_X86_64_PC32, 2, 0);
    let key = elf.section(".data.key", write, &[0; 16]);
    let key = elf.section_symbol(key);
    let branches = elf.section("__jump_table", write, &[0; 16]);
    elf.relocation(branches, 0, R_X86_64_PC32, 1, 5);
    elf.relocation(branches, 4, R_X86_64_PC32, 1, 7);
    elf.relocation(branches, 8, R_X86_64_PC64, key, 0);
    // Feature 0, 5 bytes in the place of 5.
    let alternatives = elf.section(".altinstructions", alloc, &[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 5, 5]);
    let replacement = elf.section(".altinstr_replacement", code, &[0x90; 5]);
    let replacement = elf.section_symbol(replacement);
    elf.relocation(alternatives, 0, R_X86_64_PC32, 1, 9);
    elf.relocation(alternatives, 4, R_X86_64_PC32, replacement, 0);
    for (table, site) in [(".return_sites", 0x3d), (".retpoline_sites", 0x0e)] {
        let table = elf.section(table, alloc, &[0; 4]);
        elf.relocation(table, 0, R_X86_64_PC32, 1, site);
    }
    let paravirt = elf.section(
        ".parainstructions",
        alloc,
        &[0, 0, 0, 0, 0, 0, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0],
    );
    elf.relocation(paravirt, 0, R_X86_64_64, 1, 0x13);
    let ips = elf.section(".orc_unwind_ip", alloc, &[0; 20]);
    for (row, code) in [(0, 0), (4, 0x05), (8, 0x07), (12, 0x09), (16, 0x42)] {
        elf.relocation(ips, row, R_X86_64_PC32, 1, code);
    }
    elf.section(".orc_unwind", alloc, &[0; 30]);
    let sites = elf.section("__mcount_loc", alloc, &[0; 16]);
    elf.relocation(sites, 0, R_X86_64_64, 1, 0);
    elf.relocation(sites, 8, R_X86_64_64, 1, 0x38);
    elf
}

/// Parses, selects and links a file, as the first error says it.
fn link(file: &[u8]) -> Result<Linked, String> {
    let guest = TestGuest {
        exported: [
            ("__fentry__", 0xffff_ffff_8100_8000),
            ("__x86_return_thunk", RETURN_THUNK),
            ("__x86_indirect_thunk_rax", RAX_THUNK),
            ("pv_ops", PV_OPS),
        ]
        .into(),
        internal: [("internal", 0xffff_ffff_8100_3000)].into(),
        memory: [
            // The default thunk warns; an indirect branch is a plain one.
            (RETURN_THUNK, [&[0xe9][..], &[0xcc; 15]].concat()),
            (RAX_THUNK, [&[0xff, 0xe0][..], &[0xcc; 14]].concat()),
            (PV_OPS, 0xffff_ffff_8100_2000_u64.to_le_bytes().to_vec()),
        ]
        .into(),
        capabilities: vec![1; 24],
    };
    let module = PatchModule::parse(file).map_err(|error| error.to_string())?;
    let patch = module.patch(&KLP_6_1).map_err(|error| error.to_string())?;
    let image = module.image(&patch, &ALT_6_1).map_err(|error| error.to_string())?;
    let linked = image.link(&BASES, &guest.context());
    linked.map_err(|error| error.to_string())
}

/// The good module, of which `alter` has altered something.
fn altered(alter: impl Fn(&mut TestElf)) -> Vec<u8> {
    let mut elf = good();
    alter(&mut elf);
    elf.build()
}

/// The good module, of which a section is altered.
fn section(name: &str, alter: impl Fn(&mut TestSection)) -> Vec<u8> {
    altered(|elf| alter(elf.named(name)))
}

/// The good module, of which the file says that a section has another length.
fn resized(name: &str, size: impl Fn(u64) -> u64) -> Vec<u8> {
    section(name, |section| section.size = size(section.size))
}

/// The good module, of which a relocation goes elsewhere.
fn elsewhere(name: &str, index: usize, addend: impl Fn(i64) -> i64) -> Vec<u8> {
    section(name, |section| {
        let relocation = &mut section.relocations[index];
        relocation.3 = addend(relocation.3);
    })
}

/// The good module, of which a relocation has another type.
fn of_type(name: &str, index: usize, kind: RelocationType) -> Vec<u8> {
    section(name, |section| section.relocations[index].1 = kind.0)
}

/// The good module's file, of which bytes are replaced.
fn file_with(at: impl Fn(&[u8]) -> usize, bytes: &[u8]) -> Vec<u8> {
    let mut file = good().build();
    let at = at(&file);
    file[at..at + bytes.len()].copy_from_slice(bytes);
    file
}

/// The offset of the section headers.
fn sections_at(file: &[u8]) -> usize {
    usize::try_from(u64::from_le_bytes(
        file[SECTIONS_AT..SECTIONS_AT + 8].try_into().unwrap(),
    ))
    .unwrap()
}

/// Checks that each file is refused by a message with its words.
fn check(cases: &[(&str, Vec<u8>, &str)]) {
    link(&good().build()).expect("the module is good before it is damaged");
    let accepted_or_otherwise = cases.iter().filter_map(|(what, file, words)| match link(file) {
        Err(refusal) if refusal.contains(words) => None,
        Err(refusal) => Some(format!("{what}: {words:?} is not in {refusal:?}")),
        Ok(_) => Some(format!("{what}: accepted")),
    });
    let wrong: Vec<_> = accepted_or_otherwise.collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn damaged_tables_of_instructions_are_refused() {
    let [fixups, bugs] = ["__ex_table", "__bug_table"];
    check(&[
        (
            "a fixup of code past the end",
            elsewhere(fixups, 0, |_| FAR),
            "__ex_table+0x0",
        ),
        (
            "a fixup that goes on past the end",
            elsewhere(fixups, 1, |_| FAR),
            "__ex_table+0x4",
        ),
        ("half a fixup", resized(fixups, |size| size - 4), fixups),
        (
            "a fixup with an address",
            of_type(fixups, 0, R_X86_64_64),
            "__ex_table+0x0",
        ),
        ("a WARN past the end", elsewhere(bugs, 0, |_| FAR), "__bug_table+0x0"),
        ("half a WARN", resized(bugs, |size| size - 2), bugs),
    ]);
}

#[test]
fn damaged_branches_on_static_keys_are_refused() {
    let table = "__jump_table";
    check(&[
        ("half a row", resized(table, |size| size - 8), table),
        (
            "a branch past the end",
            elsewhere(table, 0, |_| FAR),
            "__jump_table+0x0",
        ),
        (
            "a branch to past the end",
            elsewhere(table, 1, |_| FAR),
            "__jump_table+0x4",
        ),
        (
            "a branch in the middle of an instruction",
            elsewhere(table, 0, |at| at + 1),
            "a jump or a NOP of 2 or 5 bytes",
        ),
        (
            "a key that is no distance",
            of_type(table, 2, R_X86_64_64),
            "__jump_table+0x8",
        ),
        (
            "two rows for one branch",
            section(table, |table| {
                let rows = table.relocations.clone();
                table
                    .relocations
                    .extend(rows.iter().map(|row| (row.0 + 16, row.1, row.2, row.3)));
                table.data.resize(32, 0);
                table.size = 32;
            }),
            table,
        ),
    ]);
}

#[test]
fn damaged_alternatives_are_refused() {
    let table = ".altinstructions";
    let data = |at: usize, bytes: &'static [u8]| {
        section(table, |table| table.data[at..at + bytes.len()].copy_from_slice(bytes))
    };
    let last = i64::try_from(TEXT.len()).unwrap() - 1;
    check(&[
        ("half an alternative", resized(table, |size| size - 1), table),
        (
            "one for code past the end",
            elsewhere(table, 0, |_| FAR),
            ".altinstructions+0x0",
        ),
        (
            "a replacement past the end",
            elsewhere(table, 1, |_| FAR),
            ".altinstructions+0x4",
        ),
        ("a replacement longer than what it replaces", data(11, &[0xff]), table),
        (
            "code to be replaced, longer than its section",
            elsewhere(table, 0, |_| last),
            "not inside a placed section",
        ),
        ("a feature that no CPU has", data(8, &[0xff, 0x3f]), "CPU feature"),
    ]);
}

#[test]
fn damaged_tables_of_branches_and_calls_are_refused() {
    let [returns, indirect] = [".return_sites", ".retpoline_sites"];
    let [paravirt, sites] = [".parainstructions", "__mcount_loc"];
    check(&[
        ("half a return site", resized(returns, |size| size - 2), returns),
        ("a return that is none", elsewhere(returns, 0, |at| at + 1), returns),
        (
            "an indirect branch that is none",
            elsewhere(indirect, 0, |at| at + 1),
            indirect,
        ),
        (
            "an indirect branch past the end",
            elsewhere(indirect, 0, |_| FAR),
            ".retpoline_sites+0x0",
        ),
        (
            "a paravirt call past the end",
            elsewhere(paravirt, 0, |_| FAR),
            ".parainstructions+0x0",
        ),
        ("half a paravirt call", resized(paravirt, |size| size - 8), paravirt),
        ("half an ftrace site", resized(sites, |size| size - 4), sites),
        (
            "an ftrace site past the end",
            elsewhere(sites, 0, |_| FAR),
            "__mcount_loc+0x0",
        ),
        (
            "an ftrace site that is no call",
            elsewhere(sites, 0, |at| at + 1),
            sites,
        ),
        (
            "one ftrace site twice",
            elsewhere(sites, 1, |_| 0),
            "sites that overlap",
        ),
    ]);
}

#[test]
fn damaged_rules_for_unwinding_are_refused() {
    let [ips, rules] = [".orc_unwind_ip", ".orc_unwind"];
    check(&[
        ("fewer places than rules", resized(ips, |size| size - 4), rules),
        ("half a rule", resized(rules, |size| size - 1), rules),
        (
            "a rule for code past the end",
            elsewhere(ips, 0, |_| FAR),
            ".orc_unwind_ip+0x0",
        ),
    ]);
}

#[test]
fn damaged_relocations_are_refused() {
    let relocation = |name: &str, index: usize, alter: fn(&mut (u64, u32, usize, i64))| {
        section(name, |section| alter(&mut section.relocations[index]))
    };
    check(&[
        (
            "an address that does not fit",
            of_type(".rodata", 0, R_X86_64_32),
            "overflows 32 bits",
        ),
        (
            "one past its section's end",
            relocation(".text", 0, |relocation| relocation.0 = 1 << 24),
            "not inside a placed section",
        ),
        (
            "one across its section's end",
            relocation(".rodata", 0, |relocation| relocation.0 = 12),
            "not inside a placed section",
        ),
        (
            "one that needs a table",
            of_type(".text", 0, R_X86_64_GOTPCREL),
            "relocation type 9",
        ),
        (
            "one of no symbol",
            relocation(".text", 0, |relocation| relocation.2 = 0xff_ffff),
            "symbol",
        ),
        (
            "two in one place",
            relocation(".rodata", 1, |relocation| relocation.0 = 0),
            "expected zeroes",
        ),
        (
            "a livepatch symbol without an object",
            altered(|elf| elf.rename(".klp.sym.vmlinux.internal,0", ".klp.sym.internal,0")),
            ".klp.sym.",
        ),
    ]);
}

#[test]
fn damaged_sections_and_symbols_are_refused() {
    let symbol_in = |index: u16| altered(|elf| elf.symbol_in("__fentry__", index));
    check(&[
        (
            "variables that no memory holds",
            resized(".bss", |_| HUGE),
            "does not fit",
        ),
        (
            "an alignment that no address has",
            section(".text", |section| section.align = 3),
            "aligned to 3 bytes",
        ),
        (
            "per-CPU variables aligned to more than a page",
            section(".data..percpu", |section| section.align = 8192),
            "aligned to 8192 bytes",
        ),
        (
            "code that could write itself",
            section(".text", |section| section.flags |= SHF_WRITE.0),
            "not writable",
        ),
        (
            "data that could run",
            section(".data", |section| section.flags |= SHF_EXECINSTR.0),
            "must not be executable",
        ),
        (
            "a section that nobody knows",
            section("__ex_table", |section| section.name = "__ey_table"),
            "__ey_table",
        ),
        ("a COMMON symbol", symbol_in(COMMON), "no module may use"),
        (
            "a symbol of a section that is not there",
            symbol_in(NO_SECTION),
            "section",
        ),
    ]);
}

#[test]
fn damaged_headers_of_the_file_are_refused() {
    let mut unnumbered = file_with(|file| sections_at(file) + SIZE_AT, &HUGE.to_le_bytes());
    unnumbered[SECTION_COUNT_AT..SECTION_COUNT_AT + 2].fill(0);
    let symtab = |file: &[u8]| {
        let count = usize::from(u16::from_le_bytes([file[SECTION_COUNT_AT], file[SECTION_COUNT_AT + 1]]));
        let headers = (0..count).map(|index| sections_at(file) + index * 64);
        let mut tables = headers.filter(|at| file[at + 4..at + 8] == 2_u32.to_le_bytes());
        tables.next().unwrap() + SIZE_AT
    };
    check(&[
        (
            "more sections than there is room for",
            file_with(|_| SECTION_COUNT_AT, &[0xff, 0xfe]),
            "truncated",
        ),
        ("sections without number", unnumbered, "section"),
        (
            "section headers past the end",
            file_with(|_| SECTIONS_AT, &HUGE.to_le_bytes()),
            "truncated",
        ),
        (
            "a table of symbols past the end",
            file_with(symtab, &HUGE.to_le_bytes()),
            "truncated",
        ),
        (
            "names without end",
            altered(|elf| elf.rename("__fentry__", &"A".repeat(2000))),
            "name",
        ),
        (
            "a module that says nothing of itself",
            section(".modinfo", |section| section.data.fill(b'A')),
            "modinfo",
        ),
    ]);
}
