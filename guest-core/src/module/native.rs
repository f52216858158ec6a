//! Compares what is linked here with what a guest's kernel made of the same modules when it loaded them itself. Kernel
//! memory is not ours to keep, so the snapshot comes from outside: `VMPATCH_NATIVE` names a directory with
//! - `kallsyms`: the guest's /proc/kallsyms, modules included, read as root;
//! - `mem/`: QEMU's `memsave` of kernel text, rodata and data and of the modules' text, each file named by its address in hex;
//! - `x86_capability`: that member's offset in `struct cpuinfo_x86`, in hex;
//! - `NAME.ko` that the guest loaded, and `NAME.ko.sections`: names and addresses from /sys/module/NAME/sections.
//!
//! Run with `cargo test -p guest-core native -- --ignored --nocapture`.

use super::testing::{ALT_6_1, ALT_6_12, KLP_6_1, TestGuest};
use super::{AreaKind, Bases, Image, Linked, PatchModule, SymbolPlace};
use crate::addr::Gva;
use crate::memory::VirtMemory;
use object::elf::R_X86_64_64;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// Words of `x86_capability`, bugs included, in 6.1 and 6.12.
const CAPABILITY_WORDS: u64 = 24;

fn directory() -> PathBuf {
    std::env::var_os("VMPATCH_NATIVE")
        .expect("VMPATCH_NATIVE names a snapshot")
        .into()
}

fn number(hex: &str) -> u64 {
    u64::from_str_radix(hex.trim_start_matches("0x"), 16).unwrap()
}

fn guest(directory: &Path) -> TestGuest {
    let mut guest = TestGuest::default();
    let symbols = fs::read_to_string(directory.join("kallsyms")).unwrap().leak();
    // A line with a fourth word is a module's.
    for line in symbols
        .lines()
        .map(|line| line.split_whitespace().collect::<Vec<_>>())
        .filter(|line| line.len() == 3)
    {
        guest.exported.insert(line[2], number(line[0]));
    }
    for file in fs::read_dir(directory.join("mem")).unwrap().map(|file| file.unwrap()) {
        guest.memory.insert(
            number(file.file_name().to_str().unwrap()),
            fs::read(file.path()).unwrap(),
        );
    }
    let offset = number(fs::read_to_string(directory.join("x86_capability")).unwrap().trim());
    let start = Gva(guest.exported["boot_cpu_data"] + offset);
    guest.capabilities = (0..CAPABILITY_WORDS)
        .map(|word| guest.read_u32(start.wrapping_add(word * 4)).unwrap())
        .collect();
    guest
}

/// The modules of the snapshot that were loaded, with the addresses of their sections.
fn modules(directory: &Path) -> Vec<(String, Vec<u8>, BTreeMap<String, u64>)> {
    let mut paths: Vec<_> = fs::read_dir(directory)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "ko"));
    paths.sort();
    let mut modules = Vec::new();
    for path in paths {
        let sections = fs::read_to_string(path.with_extension("ko.sections")).unwrap();
        let sections: BTreeMap<_, _> = sections
            .lines()
            .map(|line| line.split_once(' ').unwrap())
            .map(|(name, at)| (name.to_owned(), number(at)))
            .collect();
        if !sections.is_empty() {
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            modules.push((name, fs::read(path).unwrap(), sections));
        }
    }
    modules
}

/// Offsets in a section's text that may differ: distances to the module's other sections, which lie elsewhere here, and
/// what the loader may leave alone: static calls through their trampoline, and ENDBRs that could be sealed.
fn may_differ(image: &Image<'_, '_>, section: super::SectionId) -> BTreeSet<u64> {
    let module = image.module;
    let own = |relocation| match module.symbol(relocation).unwrap().place {
        SymbolPlace::Defined(target) => target.section != section,
        // The snapshot keeps one symbol of a name.
        SymbolPlace::Livepatch { sympos, .. } => sympos > 0,
        _ => false,
    };
    let relocations = module.section(section).unwrap().relocations.iter().filter(|r| own(*r));
    let mut offsets: BTreeSet<u64> = relocations
        .flat_map(|r| r.offset..r.offset + if r.kind == R_X86_64_64.0 { 8 } else { 4 })
        .collect();
    // Tables whose entries begin with a relative pointer to code: their stride, and the bytes of code that one is about.
    for (name, stride, len) in [(".static_call_sites", 8, 5), (".ibt_endbr_seal", 4, 4)] {
        for (_, table) in module.sections_named(name) {
            for offset in (0..table.size).step_by(stride) {
                let at = module.site(table, offset, super::sites::Pointer::Relative).unwrap();
                if at.section == section {
                    offsets.extend(at.offset..at.offset + len);
                }
            }
        }
    }
    offsets
}

/// True where both have a jump to one place that is at most 4 bytes ahead of `offset`: the kernel makes it short if it can.
fn same_jump(ours: &[u8], theirs: &[u8], offset: usize) -> bool {
    (offset.saturating_sub(4)..=offset).any(|at| match (&ours[at..], &theirs[at..]) {
        ([0xe9, a, b, c, d, ..], [0xeb, short, ..]) => {
            i32::from_le_bytes([*a, *b, *c, *d]) + 5 == i32::from(short.cast_signed()) + 2
        }
        _ => false,
    })
}

fn link(image: &Image<'_, '_>, guest: &TestGuest, text: u64) -> Linked {
    let near = |distance| Gva((text & !0xfff).wrapping_add(distance));
    let bases = Bases {
        text: Gva(text),
        rodata: near(0x10_0000),
        data: near(0x20_0000),
        per_cpu: near(0x30_0000),
        module: near(0x40_0000),
    };
    image
        .link(&bases, &guest.context())
        .unwrap_or_else(|error| panic!("{error}"))
}

#[test]
#[ignore = "needs VMPATCH_NATIVE"]
fn text_is_byte_for_byte_what_the_guests_own_loader_makes_of_it() {
    let directory = directory();
    let guest = guest(&directory);
    for (name, file, sections) in modules(&directory) {
        let module = PatchModule::parse(&file).unwrap();
        let alt = if module.info().release().unwrap().starts_with("6.1.") {
            ALT_6_1
        } else {
            ALT_6_12
        };
        let patch = module.patch(&KLP_6_1).unwrap();
        let image = match module.image(&patch, &alt) {
            Ok(image) => image,
            Err(error) => {
                println!("{name}: {error}");
                continue;
            }
        };
        for placed in image
            .layout()
            .sections
            .iter()
            .filter(|placed| placed.area == AreaKind::Text)
        {
            let native = sections[&placed.name];
            let text = native - placed.offset;
            if text % image.layout().text.align != 0 {
                println!(
                    "{name} {}: not at an address that the whole text could have here",
                    placed.name
                );
                continue;
            }
            let linked = link(&image, &guest, text);
            let range = placed.offset as usize..(placed.offset + placed.size) as usize;
            let mut expected = vec![0; range.len()];
            guest.read(Gva(native), &mut expected).unwrap();
            let masked = may_differ(&image, placed.section);
            let differing: Vec<_> = (0_u64..)
                .zip(linked.text[range].iter().zip(&expected))
                .filter(|(offset, (ours, theirs))| ours != theirs && !masked.contains(offset))
                .filter(|(offset, _)| !same_jump(&linked.text[placed.offset as usize..], &expected, *offset as usize))
                .map(|(offset, (ours, theirs))| format!("+{offset:#x}: {ours:02x}, native {theirs:02x}"))
                .collect();
            println!(
                "{name} {}: {} bytes, {} masked, {} differ",
                placed.name,
                placed.size,
                masked.len(),
                differing.len()
            );
            assert!(differing.is_empty(), "{name} {}: {differing:#?}", placed.name);
        }
    }
}

#[test]
#[ignore = "needs VMPATCH_NATIVE"]
fn real_modules_cut_or_damaged_never_panic() {
    let directory = directory();
    let guest = guest(&directory);
    let link = |file: &[u8], sections: &BTreeMap<String, u64>| {
        let module = PatchModule::parse(file).ok()?;
        let patch = module.patch(&KLP_6_1).ok()?;
        let text = Gva(sections.get(".text").copied().unwrap_or(0xffff_ffff_c000_0000) & !0xfff);
        let bases = Bases {
            text,
            rodata: text.wrapping_add(0x10_0000),
            data: text.wrapping_add(0x20_0000),
            per_cpu: text.wrapping_add(0x30_0000),
            module: text.wrapping_add(0x40_0000),
        };
        module.image(&patch, &ALT_6_1).ok()?.link(&bases, &guest.context()).ok()
    };
    for (name, file, sections) in modules(&directory) {
        for len in (0..file.len()).step_by(16) {
            assert!(link(&file[..len], &sections).is_none(), "{name} cut at {len}");
        }
        let mut damaged = file.clone();
        // One bit of every 23rd byte: every field is met at some of its places.
        for at in (0..file.len()).step_by(23) {
            let bit = 1 << (at % 8);
            damaged[at] ^= bit;
            let _ = link(&damaged, &sections);
            damaged[at] ^= bit;
        }
    }
}
