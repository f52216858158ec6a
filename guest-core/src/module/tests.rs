//! What a module file must be, from the file's first byte to the linked image.

use super::testing::{ALT_6_1, BASES, KLP_6_1, TestElf, TestGuest};
use super::*;
use crate::addr::Gva;
use object::elf::{
    R_X86_64_32, R_X86_64_64, R_X86_64_GOTPCREL, R_X86_64_PC32, R_X86_64_PLT32, SHF_ALLOC, SHF_EXECINSTR, SHF_WRITE,
};

const RET: &[u8] = &[0xc3];

fn parse_error(file: &[u8]) -> ModuleError {
    PatchModule::parse(file).unwrap_err()
}

/// The patch of a file that parses.
fn patch_of(file: &[u8]) -> Result<Patch, PatchError> {
    PatchModule::parse(file).unwrap().patch(&KLP_6_1)
}

/// The layout of a file whose patch is found, or the error.
fn layout_of(file: &[u8]) -> Result<Layout, ImageError> {
    let module = PatchModule::parse(file).unwrap();
    let patch = module.patch(&KLP_6_1).unwrap();
    module.image(&patch, &ALT_6_1).map(|image| image.layout().clone())
}

fn link(file: &[u8], guest: &TestGuest) -> Result<Linked, LinkError> {
    let module = PatchModule::parse(file).unwrap();
    let patch = module.patch(&KLP_6_1).unwrap();
    module.image(&patch, &ALT_6_1).unwrap().link(&BASES, &guest.context())
}

#[test]
fn a_file_that_is_no_elf_is_refused_by_its_first_bytes() {
    assert_eq!(
        parse_error(b"#!/bin/sh\n"),
        ModuleError::NotElf {
            found: b"#!/b".to_vec()
        }
    );
    assert_eq!(parse_error(b""), ModuleError::NotElf { found: vec![] });
}

#[test]
fn another_machine_class_or_kind_of_file_is_refused_each_with_its_own_error() {
    let mut elf = TestElf::livepatch(RET);
    elf.machine = 183;
    assert!(matches!(
        parse_error(&elf.build()),
        ModuleError::OtherArchitecture { .. }
    ));
    let mut elf = TestElf::livepatch(RET);
    elf.file_type = 3;
    assert_eq!(parse_error(&elf.build()), ModuleError::NotRelocatable { found: 3 });
    let mut file = TestElf::livepatch(RET).build();
    file[4] = 1;
    assert!(matches!(parse_error(&file), ModuleError::OtherArchitecture { .. }));
}

#[test]
fn a_module_without_a_livepatch_entry_is_no_livepatch_module() {
    let mut elf = TestElf::new();
    elf.section(".modinfo", SHF_ALLOC.0, b"name=ext4\0vermagic=6.1.0\0");
    assert_eq!(
        parse_error(&elf.build()),
        ModuleError::NotLivepatch { name: "ext4".into() }
    );
    let file = TestElf::new().build();
    assert_eq!(parse_error(&file), ModuleError::NoModinfo { key: "name" });
}

#[test]
fn a_file_cut_anywhere_is_refused_as_truncated() {
    let file = TestElf::livepatch(RET).build();
    for len in 4..file.len() {
        assert!(
            matches!(parse_error(&file[..len]), ModuleError::Truncated { .. }),
            "cut at {len}"
        );
    }
}

#[test]
fn no_flipped_bit_makes_parsing_or_linking_panic() {
    let mut elf = TestElf::livepatch(&[0xe8, 0, 0, 0, 0, 0xe9, 0, 0, 0, 0]);
    let thunk = elf.undefined("__x86_return_thunk");
    elf.relocation(1, 6, R_X86_64_PLT32, thunk, -4);
    let table = elf.section(".return_sites", SHF_ALLOC.0, &[0; 4]);
    elf.relocation(table, 0, R_X86_64_PC32, 1, 5);
    let mut file = elf.build();
    let guest = TestGuest::default();
    for bit in 0..file.len() * 8 {
        file[bit / 8] ^= 1 << (bit % 8);
        if let Ok(module) = PatchModule::parse(&file)
            && let Ok(patch) = module.patch(&KLP_6_1)
            && let Ok(image) = module.image(&patch, &ALT_6_1)
        {
            let _ = image.link(&BASES, &guest.context());
        }
        file[bit / 8] ^= 1 << (bit % 8);
    }
}

#[test]
fn the_patch_is_read_from_the_descriptors() {
    let patch = patch_of(&TestElf::livepatch(RET).build()).unwrap();
    let function = PatchFunction {
        old_name: "old_f".into(),
        sympos: 0,
        new: SectionOffset {
            section: SectionId(1),
            offset: 0,
        },
        size: 1,
        symbol: Some("new_f".into()),
    };
    assert_eq!(
        patch.objects,
        [PatchObject {
            name: None,
            functions: vec![function]
        }]
    );
    assert_eq!((patch.replace, patch.format), (Some(false), PatchFormat::KlpPatch));
}

#[test]
fn a_symbol_position_and_a_module_name_are_read() {
    let mut elf = TestElf::livepatch(RET);
    elf.patch_bytes(3, 536 + 16, &[2]);
    elf.relocation(3, 200, R_X86_64_64, 2, 2);
    let patch = patch_of(&elf.build()).unwrap();
    assert_eq!(patch.objects[0].name.as_deref(), Some("d_f"));
    assert_eq!(patch.objects[0].functions[0].sympos, 2);
}

#[test]
fn an_object_of_a_name_that_no_module_can_have_is_refused() {
    let mut elf = TestElf::livepatch(RET);
    elf.set_bytes(2, b"old_f\0kvm-amd\0");
    elf.relocation(3, 200, R_X86_64_64, 2, 6);
    assert_eq!(
        patch_of(&elf.build()).unwrap_err().to_string(),
        "the patch is for module \"kvm-amd\", and no module can have that name: did you mean kvm_amd?"
    );
}

#[test]
fn a_callback_is_refused_with_its_place() {
    let mut elf = TestElf::livepatch(RET);
    elf.relocation(3, 200 + 16 + 8, R_X86_64_64, 1, 0);
    assert_eq!(
        patch_of(&elf.build()),
        Err(PatchError::Callback {
            object: "vmlinux".into(),
            callback: "post_patch".into(),
            at: ".data+0xe0".into()
        })
    );
}

#[test]
fn a_new_function_outside_of_code_is_refused() {
    let mut elf = TestElf::livepatch(RET);
    // A second function, in the place of the element that ends the array; its new code is a string.
    elf.relocation(3, 536 + 152, R_X86_64_64, 2, 0);
    elf.relocation(3, 536 + 152 + 8, R_X86_64_64, 2, 0);
    let error = patch_of(&elf.build()).unwrap_err();
    assert_eq!(
        error.to_string(),
        "klp_func.new_func at .data+0x2b8 is .rodata.str1.1+0x0, expected a function in executable code"
    );
}

#[test]
fn an_array_that_never_ends_is_refused_at_the_end_of_its_section() {
    let mut elf = TestElf::livepatch(RET);
    elf.relocation(3, 536 + 152, R_X86_64_64, 2, 0);
    elf.relocation(3, 536 + 152 + 8, R_X86_64_64, 1, 0);
    assert!(matches!(patch_of(&elf.build()), Err(PatchError::Member { found, .. }) if found == "outside its section"));
}

#[test]
fn two_patches_in_one_module_are_refused() {
    let mut elf = TestElf::livepatch(RET);
    let second = elf.section(".data.second", SHF_ALLOC.0 | SHF_WRITE.0, &[0; 200]);
    let symbol = elf.section_symbol(second);
    elf.relocation(second, 0, R_X86_64_64, 7, 0);
    elf.relocation(second, 8, R_X86_64_64, 3, 200);
    // The init code refers to it as well.
    elf.relocation(4, 0, R_X86_64_64, symbol, 0);
    assert!(matches!(patch_of(&elf.build()), Err(PatchError::SeveralPatches { .. })));
}

#[test]
fn a_module_that_registers_nothing_is_refused() {
    let mut elf = TestElf::new();
    elf.section(".modinfo", SHF_ALLOC.0, b"name=a\0vermagic=6.1\0livepatch=Y\0");
    assert_eq!(patch_of(&elf.build()), Err(PatchError::NotEnabled));
}

#[test]
fn only_what_the_new_functions_need_is_placed() {
    let mut elf = TestElf::livepatch(&[0; 16]);
    let used = elf.nobits(".bss", 24);
    elf.set_align(used, 8);
    elf.section(".rodata.unused", SHF_ALLOC.0, &[1; 100]);
    let symbol = elf.section_symbol(used);
    elf.relocation(1, 4, R_X86_64_PC32, symbol, -4);
    let layout = layout_of(&elf.build()).unwrap();
    assert_eq!(layout.text, Area { size: 16, align: 1 });
    assert_eq!(layout.rodata, Area { size: 0, align: 1 });
    assert_eq!(layout.data, Area { size: 24, align: 8 });
}

#[test]
fn a_new_function_that_refers_to_init_code_is_refused() {
    let mut elf = TestElf::livepatch(&[0; 16]);
    elf.relocation(1, 4, R_X86_64_PC32, 4, 0);
    let error = layout_of(&elf.build()).unwrap_err();
    assert!(
        matches!(&error, ImageError::NotPlaced { needed_by, section, .. }
        if needed_by == ".text+0x4" && section == ".init.text"),
        "{error}"
    );
}

#[test]
fn an_unhandled_section_is_refused_only_where_it_concerns_needed_code() {
    let mut elf = TestElf::livepatch(&[0; 16]);
    let table = elf.section("__ksymtab_gpl", SHF_ALLOC.0 | SHF_WRITE.0, &[0; 24]);
    elf.relocation(table, 0, R_X86_64_PC32, 4, 2);
    assert!(layout_of(&elf.build()).is_ok());
    elf.relocation(table, 12, R_X86_64_PC32, 1, 7);
    let error = layout_of(&elf.build()).unwrap_err();
    assert!(
        matches!(&error, ImageError::UnsupportedSection { section, concerns, .. }
        if section == "__ksymtab_gpl" && concerns == ".text+0x7"),
        "{error}"
    );
}

#[test]
fn relocations_reach_exported_symbols_and_the_modules_own_data() {
    let mut elf = TestElf::livepatch(&[0; 16]);
    let printk = elf.undefined("_printk");
    elf.relocation(1, 1, R_X86_64_PLT32, printk, -4);
    elf.relocation(1, 8, R_X86_64_64, 2, 3);
    let guest = TestGuest {
        exported: [("_printk", 0xffff_ffff_8000_1000)].into(),
        ..Default::default()
    };
    let linked = link(&elf.build(), &guest).unwrap();
    // 0xffffffff80001000 - 4 - 0xffffffff81000001
    assert_eq!(linked.text[1..5], 0xff00_0ffb_u32.to_le_bytes());
    assert_eq!(linked.text[8..16], 0xffff_ffff_8200_0003_u64.to_le_bytes());
    assert_eq!(linked.rodata, b"old_f\0");
    assert_eq!(linked.functions[0].new, Gva(0xffff_ffff_8100_0000));
}

#[test]
fn livepatch_symbols_reach_what_is_not_exported() {
    let mut elf = TestElf::livepatch(&[0; 16]);
    let hidden = elf.symbol(".klp.sym.vmlinux.tcp_v4.isra.0,2", 0x10, 0xff20, 0, 0);
    elf.relocation(1, 0, R_X86_64_64, hidden, 0);
    let guest = TestGuest {
        internal: [("tcp_v4.isra.0", 0x1234)].into(),
        ..Default::default()
    };
    let linked = link(&elf.build(), &guest).unwrap();
    assert_eq!(linked.text[..8], 0x1234_u64.to_le_bytes());
    let module = elf.build();
    let module = PatchModule::parse(&module).unwrap();
    let patch = module.patch(&KLP_6_1).unwrap();
    let undefined = module.image(&patch, &ALT_6_1).unwrap().undefined().to_vec();
    assert_eq!(undefined[0].object, Some(("vmlinux".into(), 2)));
}

/// `file` with `edit` made to the header of its first section of type SHT_RELA.
fn with_relocation_header(mut file: Vec<u8>, edit: impl Fn(&mut [u8])) -> Vec<u8> {
    let headers = usize::try_from(u64::from_le_bytes(file[40..48].try_into().unwrap())).unwrap();
    let header = file[headers..].chunks_exact_mut(64).find(|header| header[4] == 4);
    edit(header.unwrap());
    file
}

#[test]
fn a_livepatch_symbol_that_a_linker_made_absolute_is_refused() {
    let mut elf = TestElf::livepatch(&[0; 16]);
    let lost = elf.symbol(".klp.sym.vmlinux.tcp_v4,0", 0x10, object::elf::SHN_ABS.0, 0, 0);
    elf.relocation(1, 0, R_X86_64_64, lost, 0);
    assert_eq!(
        PatchModule::parse(&elf.build()).unwrap_err().to_string(),
        "livepatch symbol .klp.sym.vmlinux.tcp_v4,0 has section index 0xfff1, expected SHN_LIVEPATCH (0xff20): \
         was the module linked once more after it was made?"
    );
}

#[test]
fn relocations_that_would_be_passed_over_are_refused() {
    let mut elf = TestElf::livepatch(&[0; 16]);
    elf.section(".klp.rela.vmlinux..text", object::elf::SHF_ALLOC.0, &[0; 24]);
    let error = PatchModule::parse(&elf.build()).unwrap_err().to_string();
    assert_eq!(
        error,
        "section .klp.rela.vmlinux..text holds relocations and has type 0x1, expected SHT_RELA (4)"
    );
    // SHT_RELR, and SHT_CREL as LLVM writes it.
    for kind in [19_u32, 0x4000_0014] {
        let mut elf = TestElf::livepatch(&[0; 16]);
        let other = elf.undefined("other");
        elf.relocation(1, 0, R_X86_64_64, other, 0);
        let file = with_relocation_header(elf.build(), |h| h[4..8].copy_from_slice(&kind.to_le_bytes()));
        let error = PatchModule::parse(&file).unwrap_err();
        assert!(matches!(error, ModuleError::RelocationType { found, .. } if found == kind));
    }
}

#[test]
fn a_livepatch_relocation_of_another_symbol_is_refused() {
    let livepatch = |symbol: &str, index| {
        let mut elf = TestElf::livepatch(&[0; 16]);
        let symbol = elf.symbol(symbol, 0x10, index, 0, 0);
        elf.relocation(1, 8, R_X86_64_64, symbol, 0);
        let file = with_relocation_header(elf.build(), |h| h[10] |= 0x10); // SHF_RELA_LIVEPATCH
        PatchModule::parse(&file).map(|_| ()).map_err(|error| error.to_string())
    };
    assert_eq!(livepatch(".klp.sym.vmlinux.tcp_v4,0", 0xff20), Ok(()));
    assert_eq!(
        livepatch("tcp_v4", 0),
        Err(
            r#"the livepatch relocation of offset 0x8 in .rela.text refers to "tcp_v4", which is no livepatch symbol"#
                .into()
        )
    );
}

#[test]
fn a_weak_symbol_that_nobody_has_is_null_and_another_is_an_error() {
    let mut elf = TestElf::livepatch(&[0; 16]);
    let weak = elf.symbol("maybe", 0x20, 0, 0, 0);
    elf.relocation(1, 0, R_X86_64_64, weak, 0);
    assert_eq!(link(&elf.build(), &TestGuest::default()).unwrap().text[..8], [0; 8]);
    let strong = elf.undefined("surely");
    elf.relocation(1, 8, R_X86_64_64, strong, 0);
    let error = link(&elf.build(), &TestGuest::default()).unwrap_err();
    assert_eq!(error.to_string(), "cannot resolve surely, needed by .text+0x8");
    let cause = std::error::Error::source(&error).map(ToString::to_string);
    assert_eq!(cause.as_deref(), Some("not found in vmlinux"));
}

#[test]
fn a_relocation_that_cannot_reach_its_symbol_is_an_error() {
    let mut elf = TestElf::livepatch(&[0; 16]);
    let far = elf.undefined("far");
    elf.relocation(1, 1, R_X86_64_PLT32, far, -4);
    let guest = TestGuest {
        exported: [("far", 0xffff_8880_0000_0000)].into(),
        ..Default::default()
    };
    let error = link(&elf.build(), &guest).unwrap_err();
    assert!(
        matches!(&error, LinkError::Overflow { at, symbol, .. } if at == ".text+0x1" && symbol == "far"),
        "{error}"
    );
}

#[test]
fn an_unknown_relocation_type_or_one_over_bytes_in_use_is_an_error() {
    let guest = TestGuest {
        exported: [("x", 0)].into(),
        ..Default::default()
    };
    let mut elf = TestElf::livepatch(&[0; 16]);
    let x = elf.undefined("x");
    elf.relocation(1, 0, R_X86_64_GOTPCREL, x, 0);
    assert!(matches!(
        link(&elf.build(), &guest),
        Err(LinkError::RelocationKind { kind: 9, .. })
    ));
    let mut elf = TestElf::livepatch(&[1; 16]);
    let x = elf.undefined("x");
    elf.relocation(1, 0, R_X86_64_32, x, 0);
    assert!(matches!(link(&elf.build(), &guest), Err(LinkError::NotZero { .. })));
    let mut elf = TestElf::livepatch(&[0; 16]);
    let x = elf.undefined("x");
    elf.relocation(1, 13, R_X86_64_32, x, 0);
    assert!(matches!(link(&elf.build(), &guest), Err(LinkError::Outside { .. })));
}

#[test]
fn gaps_between_functions_trap() {
    let mut elf = TestElf::livepatch(&[0x90; 5]);
    let cold = elf.section(".text.unlikely", SHF_ALLOC.0 | SHF_EXECINSTR.0, &[0x91; 3]);
    elf.set_align(cold, 16);
    let symbol = elf.section_symbol(cold);
    elf.patch_bytes(1, 0, &[0xe9, 0, 0, 0, 0]);
    elf.relocation(1, 1, R_X86_64_PLT32, symbol, -4);
    let linked = link(&elf.build(), &TestGuest::default()).unwrap();
    assert_eq!(linked.text[5..16], [0xcc; 11]);
    assert_eq!(linked.text[16..], [0x91; 3]);
}

#[test]
fn areas_at_addresses_that_do_not_fit_are_refused() {
    let file = TestElf::livepatch(RET).build();
    let module = PatchModule::parse(&file).unwrap();
    let patch = module.patch(&KLP_6_1).unwrap();
    let image = module.image(&patch, &ALT_6_1).unwrap();
    let bases = Bases {
        text: Gva(u64::MAX),
        ..BASES
    };
    assert!(matches!(
        image.link(&bases, &TestGuest::default().context()),
        Err(LinkError::Base { .. })
    ));
}

#[test]
fn the_build_id_is_read_from_its_note() {
    let mut elf = TestElf::livepatch(RET);
    let note = b"\x04\0\0\0\x03\0\0\0\x03\0\0\0GNU\0\xab\xcd\xef\0";
    let section = elf.section(".note.gnu.build-id", SHF_ALLOC.0, note);
    let file = elf.build();
    assert_eq!(
        PatchModule::parse(&file).unwrap().build_id(),
        Some(&[0xab, 0xcd, 0xef][..])
    );
    elf.patch_bytes(section, 4, &[9]);
    let file = elf.build();
    assert_eq!(PatchModule::parse(&file).unwrap().build_id(), None);
}

#[test]
fn what_klp_build_leaves_of_a_livepatch_symbol_is_let_pass() {
    let mut elf = TestElf::livepatch(&[0xe8, 0, 0, 0, 0]);
    let tombstone = elf.symbol(".klp.tombstone.c_start", 0x20, 0xff20, 0, 0);
    let symbol = elf.symbol(".klp.sym.vmlinux.c_start,2", 0x10, 0xff20, 0, 0);
    elf.relocation(1, 1, object::elf::R_X86_64_NONE, tombstone, 0);
    elf.relocation(1, 1, R_X86_64_PLT32, symbol, -4);
    let guest = TestGuest {
        internal: [("c_start", 0xffff_ffff_8100_0100)].into(),
        ..Default::default()
    };
    assert_eq!(link(&elf.build(), &guest).unwrap().text, [0xe8, 0xfb, 0, 0, 0]);
}
