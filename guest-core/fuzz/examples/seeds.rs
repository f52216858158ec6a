//! Writes the first inputs of every target into `corpus/`: sound ones, from the builders that the tests use, and a few
//! that are spoilt on purpose. Run in `guest-core/fuzz/`: `cargo run --example seeds`.

use guest_core::Gva;
use std::fs;
use std::path::Path;
use targets::common::guest::{DATA, FUNCTIONS, RODATA};
use targets::common::kallsyms::{RELEASES, Symbol, write};
use targets::common::module::{Function, livepatch};
use targets::common::types;

fn main() {
    for release in RELEASES {
        let tables = write(release, &symbols(), Gva(0xffff_ffff_8240_0008)).bytes;
        // which of the address forms is taken
        for form in 0..if release == RELEASES[1] { 3 } else { 1 } {
            let data = [&[form][..], &[0; 8], &tables].concat();
            keep("kallsyms", &format!("{release:?}-{form}"), &data);
        }
    }
    keep("btf", "whole", &types::blob(false));
    let returning = |old| Function::returning_one(old);
    let calling = Function {
        calls: Some((5, "schedule")),
        ..returning("victim")
    };
    for (name, functions) in [
        ("one", vec![returning("victim")]),
        ("two", vec![returning("victim"), returning("notrace_victim")]),
        ("calls", vec![calling]),
        ("tiny", vec![returning("tiny")]),
        ("unknown", vec![returning("nobody")]),
        ("none", vec![]),
    ] {
        keep("module", name, &livepatch("fix", &functions));
    }
    page_tables();
    spoils();
    registries();
}

/// As few as are taken for a kernel's, with short names.
fn symbols() -> Vec<Symbol> {
    (0..1001)
        .map(|number| ('t', format!("f{:x}", number % 500), 0xffff_ffff_8100_0000 + 16 * number))
        .collect()
}

fn keep(target: &str, name: &str, data: &[u8]) {
    let folder = Path::new("corpus").join(target);
    fs::create_dir_all(&folder).expect("a folder for the corpus");
    fs::write(folder.join(name), data).expect("an input written");
}

/// Tables at 0, 0x1000 and 0x2000 that map 16 MiB of the kernel's part of the address space, the interrupt table at 0x3000; and tables that
/// name themselves.
fn page_tables() {
    let window = 0xffff_ffff_8000_0000_u64;
    let mut ram = vec![0; 0x4000];
    let mut put = |at: usize, word: u64| ram[at..at + 8].copy_from_slice(&word.to_le_bytes());
    put(511 * 8, 0x1063);
    put(0x1000 + 510 * 8, 0x2063);
    for part in 0..8 {
        put(
            0x2000 + 8 * part,
            (part as u64) << 21 | if part < 4 { 0xe1 } else { 1 << 63 | 0xe3 },
        );
    }
    for gate in 0..32 {
        put(0x3000 + 16 * gate, 0x8000_8e00_0010_0100);
        put(0x3000 + 16 * gate + 8, 0xffff_ffff);
    }
    let input = |cr3: u64, cr4: u64, ram: &[u8]| {
        let words = [cr3, cr4, window + 0x3000, window + 0x12_3456];
        [words.iter().flat_map(|word| word.to_le_bytes()).collect(), ram.to_vec()].concat()
    };
    keep("page_tables", "four", &input(0, 0x20, &ram));
    keep(
        "page_tables",
        "isolated",
        &input(0x1000, 0x20, &[vec![0; 0x1000], ram.clone()].concat()),
    );
    let circle: Vec<u8> = (0..512).flat_map(|_| 0x63_u64.to_le_bytes()).collect();
    keep("page_tables", "circle", &input(0, 0x20, &circle));
    keep("page_tables", "circle-five", &input(0, 0x1020, &circle));
}

/// One write each: place, base, offset, word. See `spoil.rs`.
fn spoils() {
    let write = |place: u8, base: u8, offset: u16, word: u64| {
        [&[place, base][..], &offset.to_le_bytes(), &word.to_le_bytes()].concat()
    };
    for target in ["find", "live"] {
        keep(target, "nothing", &[]);
        for place in 0..34 {
            keep(target, &format!("zero-{place}"), &write(place, 0, 0, 0));
        }
    }
    keep("live", "modules-in-a-circle", &write(13, 4, 16, 0x10));
    keep("live", "own-livepatch", &write(13, 9, 0, 0x40));
    keep("live", "ftrace-in-a-circle", &write(17, 3, 32, 0x4_0000));
    keep("live", "tasks-in-a-circle", &write(26, 9, 64, 0x40));
    keep(
        "live",
        "stack-in-victim",
        &write(30, 1, 0xed0, FUNCTIONS + 64 * 3 + 20 - FUNCTIONS + 0x1000),
    );
    keep("live", "list-into-types", &write(19, 2, 64, 0x1000));
    assert!(RODATA < DATA);
}

/// Slots with a record that is sound, cut, of another state, or shared.
fn registries() {
    let record = br#"{"id":"fix","digest":"00","order":1,"model":"none","applied_at":0,"functions":[{"name":"victim","sympos":0,"old":1,"old_len":64,"new":2,"new_len":9,"redirect":"ftrace"}],"text":{"start":1,"len":4096},"rodata":{"start":1,"len":0},"data":{"start":1,"len":0},"orc":{"ips":1,"entries":2,"count":3},"changes":[{"what":"jump","gpa":4096,"old":"0f1f440000","new":"e900000000"},{"what":"flags","gpa":8192,"old":"00","new":"02","mask":"02"}]}"#;
    let slot = |state: u64, first: u32, count: u32, offset: u32, len: u32| {
        let numbers = [first, count, offset, len, u32::MAX, 0];
        let numbers: Vec<u8> = numbers.into_iter().flat_map(u32::to_le_bytes).collect();
        [&state.to_le_bytes()[..], &numbers].concat()
    };
    let len = record.len() as u32;
    let one = |state| [&[1][..], &slot(state, 2, 1, 0, len), record].concat();
    for state in 0..6 {
        keep("registry", &format!("state-{state}"), &one(state));
    }
    keep(
        "registry",
        "cut",
        &[&[1][..], &slot(3, 2, 1, 0, len - 40), record].concat(),
    );
    keep(
        "registry",
        "past-its-pages",
        &[&[1][..], &slot(3, 2, 1, 4000, len), record].concat(),
    );
    keep(
        "registry",
        "past-the-arena",
        &[&[1][..], &slot(3, 2, u32::MAX, 0, len), record].concat(),
    );
    let shared = [slot(3, 2, 2, 0, len), slot(3, 3, 1, 0, len)].concat();
    keep("registry", "shared", &[&[2][..], &shared, record].concat());
}
