//! Finding the kernel in guests made by hand, sound ones and hostile ones.

mod common;

use common::guest::{
    BANNER, Choice, DATA, END, FUNCTIONS, Guest, HEAP_GPA, IMAGE, IMAGE_GPA, RELEASE, RODATA, gpa, heap, per_cpu_area,
};
use common::kallsyms::{RELEASES, Release};
use guest_core::kernel::KernelError;
use guest_core::kernel::image::{IMAGE_RANGE, ImageError};
use guest_core::kernel::kallsyms::KallsymsError;
use guest_core::{Gpa, Gva, Kernel, Registers};

/// No guest makes finding its kernel read more often than this.
const READS_MAX: u64 = 20_000;
/// Nor more bytes than this.
const BYTES_MAX: u64 = 256 << 20;
/// Nor more at once.
const READ_BYTES_MAX: usize = 64 << 20;

fn find(guest: &Guest) -> Result<Kernel, KernelError> {
    guest.ram.count_from_here();
    let found = Kernel::find(&guest.ram, &guest.vcpus);
    let (reads, bytes) = guest.ram.counted();
    assert!(reads <= READS_MAX, "{reads} reads");
    assert!(bytes <= BYTES_MAX, "{bytes} bytes");
    assert!(guest.ram.largest_read() <= READ_BYTES_MAX);
    found
}

fn image_error(guest: &Guest) -> ImageError {
    match find(guest) {
        Err(KernelError::Image(error)) => error,
        other => panic!("{:?}", other.map(|kernel| kernel.release)),
    }
}

/// What the error says that disagrees.
fn disagreement(guest: &Guest) -> &'static str {
    match find(guest) {
        Err(KernelError::Disagrees { what, .. }) => what,
        other => panic!("{:?}", other.map(|kernel| kernel.release)),
    }
}

/// The guest's own page directory of the top 2 GiB, where kernels are mapped.
const DIRECTORY: u64 = DATA + 0x3000;

/// A guest whose symbol `name` leads elsewhere.
fn with_symbol(name: &str, at: u64) -> Guest {
    let choice = Choice {
        release: Release::V6_11,
        ..Choice::default()
    };
    Guest::with_symbols(choice, |symbols| {
        symbols.iter_mut().find(|symbol| symbol.1 == name).unwrap().2 = at;
    })
}

#[test]
fn the_kernel_is_found_in_every_form_with_either_depth_isolated_or_not() {
    for release in RELEASES {
        for five_levels in [false, true] {
            for isolated in [false, true] {
                let choice = Choice {
                    release,
                    five_levels,
                    isolated,
                    ..Default::default()
                };
                let kernel = find(&Guest::with(choice)).unwrap();
                assert_eq!(kernel.release, RELEASE, "{choice:?}");
                assert_eq!(kernel.banner, BANNER.trim_end());
                assert_eq!(kernel.image.start(), Gva(IMAGE), "{choice:?}");
                assert_eq!(kernel.image.len(), 12 << 20, "{choice:?}");
                assert_eq!(kernel.symbol("schedule").unwrap(), Gva(FUNCTIONS));
                assert_eq!(kernel.per_cpu_offsets().len(), 2);
                let queue = kernel
                    .symbol("runqueues")
                    .unwrap()
                    .wrapping_add(kernel.per_cpu_offsets()[1]);
                assert_eq!(queue, Gva(per_cpu_area(1) + 0x1000), "{choice:?}");
            }
        }
    }
}

#[test]
fn one_vcpu_in_the_kernel_is_enough() {
    let mut guest = Guest::new();
    guest.vcpus.insert(
        0,
        Registers {
            cr0: 0x10,
            ..Registers::default()
        },
    );
    assert!(find(&guest).is_ok());
}

/// A guest whose vCPU 1 has tables of its own, which map an image 2 MiB below the first in guest-physical memory, with the same
/// interrupt table: as after a crash, where one vCPU boots another kernel and the other one is halted in that which crashed.
fn with_two_kernels() -> Guest {
    let mut guest = Guest::new();
    let [top, upper, middle] = [0x1c_0000, 0x1c_1000, 0x1c_2000].map(heap);
    guest.put_u64(top + 511 * 8, gpa(upper) | 0x63);
    guest.put_u64(upper + 510 * 8, gpa(middle) | 0x63);
    for part in 0..6 {
        let slot = (IMAGE - 0xffff_ffff_8000_0000) / 0x20_0000 + part;
        guest.put_u64(middle + 8 * slot, (IMAGE_GPA - 0x20_0000 + 0x20_0000 * part) | 0xe3);
    }
    guest.vcpus[1].cr3 = gpa(top);
    guest.vcpus[1].idt_base = guest.vcpus[1].idt_base.map(|idt| idt + 0x20_0000);
    guest
}

#[test]
fn vcpus_that_run_different_kernels_are_a_refusal_by_name_whichever_is_first() {
    let mut guest = with_two_kernels();
    let (one, other) = (Gpa(IMAGE_GPA), Gpa(IMAGE_GPA - 0x20_0000));
    let found = |guest: &Guest| match image_error(guest) {
        ImageError::Different {
            vcpu: 0,
            at,
            other_vcpu: 1,
            other_at,
        } => (at, other_at),
        error => panic!("{error}"),
    };
    assert_eq!(found(&guest), (one, other));
    guest.vcpus.swap(0, 1);
    assert_eq!(found(&guest), (other, one));
}

#[test]
fn vcpus_of_a_nested_guest_of_firmware_or_not_started_do_not_hide_the_kernel_of_another_one() {
    for registers in [
        Registers::default(),
        // a nested guest: its tables are not there, its interrupt table may be anything
        Registers {
            efer: 0xd01,
            cr3: 0x1000,
            idt_base: Some(u64::MAX),
            ..Registers::default()
        },
        Registers {
            efer: 0xd01,
            cr3: gpa(heap(0x1d_0000)),
            ..Registers::default()
        },
    ] {
        for other in 0..2 {
            let mut guest = Guest::new();
            guest.vcpus[other] = registers;
            assert_eq!(guest.kernel().release, RELEASE);
        }
    }
}

#[test]
fn a_guest_without_a_vcpu_in_long_mode_is_told_as_not_booted() {
    let mut guest = Guest::new();
    guest.vcpus = vec![
        Registers {
            cr0: 0x6000_0010,
            ..Registers::default()
        };
        2
    ];
    assert!(matches!(
        image_error(&guest),
        ImageError::NotLongMode {
            cr0: 0x6000_0010,
            efer: 0
        }
    ));
    guest.vcpus.clear();
    assert!(matches!(image_error(&guest), ImageError::NotLongMode { .. }));
}

#[test]
fn an_interrupt_table_that_is_not_there_is_an_error() {
    for idt in [
        0,
        0x1000,
        u64::MAX,
        u64::MAX - 7,
        DATA - 0x4000_0000,
        END - 8,
        0x7fff_ffff_ffff,
    ] {
        let mut guest = Guest::new();
        guest.vcpus.iter_mut().for_each(|vcpu| vcpu.idt_base = Some(idt));
        assert!(
            matches!(
                image_error(&guest),
                ImageError::Unreadable { .. } | ImageError::NotLinux { .. }
            ),
            "{idt:#x}"
        );
    }
}

#[test]
fn handlers_outside_of_the_window_are_not_linux() {
    let guest = Guest::new();
    for gate in 0..32 {
        guest.put_u64(DATA + 0x8000 + 16 * gate, 0x1000_8e00_0010_2000);
        guest.put_u64(DATA + 0x8000 + 16 * gate + 8, 0xffff_f800);
    }
    let ImageError::NotLinux { handler, .. } = image_error(&guest) else {
        panic!()
    };
    assert_eq!(handler, Gva(0xffff_f800_1000_2000));
}

#[test]
fn page_tables_outside_of_ram_are_an_error() {
    for root in [0x7fff_ffff_f000, 0x0100_0000, u64::MAX] {
        let mut guest = Guest::new();
        guest.vcpus.iter_mut().for_each(|vcpu| vcpu.cr3 = root);
        assert!(
            matches!(image_error(&guest), ImageError::Unreadable { .. }),
            "{root:#x}"
        );
    }
}

#[test]
fn a_top_table_that_names_itself_everywhere_is_refused() {
    for five_levels in [false, true] {
        let guest = Guest::with(Choice {
            five_levels,
            ..Choice::default()
        });
        for index in 0..512 {
            guest.put_u64(DATA + 8 * index, gpa(DATA) | 0x63);
        }
        assert!(find(&guest).is_err());
    }
}

#[test]
fn a_page_table_shared_by_the_whole_window_does_not_make_a_larger_image() {
    let guest = Guest::new();
    let table = DATA + 0x10_0000;
    for index in 0..512 {
        guest.put_u64(table + 8 * index, (gpa(IMAGE) + 4096 * index) | 0x61);
        if guest.u64_at(DIRECTORY + 8 * index) == 0 {
            guest.put_u64(DIRECTORY + 8 * index, gpa(table) | 0x63);
        }
    }
    assert_eq!(find(&guest).unwrap().image.len(), 12 << 20);
}

/// Every page of the top 2 GiB is mapped where the image's distance says, so that all of it is one image.
fn map_everything(guest: &Guest, bits: impl Fn(u64) -> u64) {
    let first = gpa(IMAGE).wrapping_sub(IMAGE - IMAGE_RANGE.start.0) & 0x000f_ffff_ffff_f000;
    for index in 0..512 {
        if guest.u64_at(DIRECTORY + 8 * index) == 0 {
            guest.put_u64(
                DIRECTORY + 8 * index,
                (first + index * 0x20_0000) & 0x000f_ffff_ffff_f000 | 0x80 | bits(index),
            );
        }
    }
}

#[test]
fn an_image_of_a_gigabyte_of_read_only_data_is_refused_before_it_is_read() {
    let guest = Guest::new();
    map_everything(&guest, |_| 1 << 63 | 0x61);
    guest.put(guest.tables_at + guest.tables.token_index.start as u64, &[0; 512]);
    assert_eq!(disagreement(&guest), "read-only data of the kernel image");
    assert!(guest.ram.largest_read() <= 4 << 20);
}

/// Every page of the image may be written and run.
fn unprotect(guest: &Guest) {
    for index in 0x90..0x98 {
        let entry = guest.u64_at(DIRECTORY + 8 * index);
        if entry != 0 {
            guest.put_u64(DIRECTORY + 8 * index, entry & !(1 << 63) | 2);
        }
    }
}

#[test]
fn a_kernel_without_page_protection_is_found() {
    for release in RELEASES {
        let guest = Guest::with(Choice {
            release,
            ..Choice::default()
        });
        unprotect(&guest);
        let kernel = find(&guest).unwrap();
        let permissions: Vec<_> = kernel
            .image
            .segments
            .iter()
            .map(|part| (part.writable, part.executable))
            .collect();
        assert_eq!(permissions, [(true, true)], "{release:?}");
        assert_eq!(kernel.symbol("schedule").unwrap(), Gva(FUNCTIONS));
    }
}

#[test]
fn a_kernel_that_is_still_starting_is_told_with_or_without_page_protection() {
    for protected in [true, false] {
        let guest = Guest::new();
        if !protected {
            unprotect(&guest);
        }
        // SYSTEM_HALT: one that goes down is all there.
        for (state, is_found) in [(0, false), (1, false), (2, false), (3, true), (4, true)] {
            guest.put(guest.symbol("system_state"), &[state, 0, 0, 0]);
            match find(&guest) {
                Ok(_) => assert!(is_found, "{state}"),
                Err(KernelError::Starting {
                    state: told,
                    running: 3,
                }) => {
                    assert_eq!((told, is_found), (u64::from(state), false));
                }
                Err(error) => panic!("{error}"),
            }
        }
    }
}

#[test]
fn a_cpu_without_nx_is_told() {
    let mut guest = Guest::new();
    guest.vcpus.iter_mut().for_each(|vcpu| vcpu.efer = 0x501);
    assert!(matches!(
        image_error(&guest),
        ImageError::NoExecuteDisable { efer: 0x501 }
    ));
}

#[test]
fn an_image_of_a_gigabyte_of_writable_code_is_refused_before_it_is_read() {
    let guest = Guest::new();
    unprotect(&guest);
    map_everything(&guest, |_| 0x63);
    assert_eq!(
        disagreement(&guest),
        "writable or executable memory of the kernel image"
    );
    assert!(guest.ram.largest_read() <= 4 << 20);
}

#[test]
fn an_image_of_many_small_segments_is_walked_once() {
    let guest = Guest::new();
    map_everything(&guest, |index| if index % 2 == 0 { 0x61 } else { 0x63 });
    assert!(find(&guest).is_ok());
}

#[test]
fn an_image_that_is_too_small_is_told_with_its_size() {
    let guest = Guest::new();
    for index in 0x92..0x96 {
        guest.put_u64(DIRECTORY + 8 * index, 0);
    }
    let table = gpa(DATA + 0x10_0000);
    guest.put_u64(DIRECTORY + 8 * 0x93, table | 0x63);
    for index in 0..16 {
        guest.ram.put_u64(table + 8 * index, (gpa(DATA) + 4096 * index) | 0x63);
    }
    assert!(matches!(
        image_error(&guest),
        ImageError::TooSmall { bytes: 0x41_0000, .. }
    ));
}

#[test]
fn a_kernel_without_a_symbol_table_is_refused() {
    let guest = Guest::new();
    guest.put(guest.tables_at + guest.tables.token_index.start as u64, &[0; 512]);
    assert!(matches!(
        find(&guest),
        Err(KernelError::Kallsyms(KallsymsError::NoTokenIndex { .. }))
    ));
}

#[test]
fn a_banner_that_is_none_or_elsewhere_is_refused() {
    let guest = Guest::new();
    guest.put(RODATA, b"Linux verzion 6.1");
    assert!(matches!(
        find(&guest),
        Err(KernelError::Kallsyms(KallsymsError::Disagrees { .. }))
    ));
    for at in [RODATA + 1, END + 0x1000, u64::MAX] {
        let error = find(&with_symbol("linux_banner", at)).unwrap_err();
        assert!(
            matches!(error, KernelError::Kallsyms(KallsymsError::Disagrees { .. })),
            "{at:#x}"
        );
    }
}

#[test]
fn text_symbols_outside_of_the_text_are_refused() {
    for (name, at) in [
        ("_stext", DATA),
        ("_stext", END + 4096),
        ("_etext", DATA + 8),
        ("_etext", u64::MAX),
    ] {
        let error = find(&with_symbol(name, at)).unwrap_err();
        assert!(
            matches!(error, KernelError::Kallsyms(KallsymsError::Disagrees { .. })),
            "{name} {at:#x}"
        );
    }
}

#[test]
fn a_symbol_that_every_kernel_has_is_named_where_it_lacks_or_is_there_twice() {
    for name in [
        "init_top_pgt",
        "__start_BTF",
        "__stop_BTF",
        "page_offset_base",
        "nr_cpu_ids",
        "__per_cpu_offset",
    ] {
        let without = Guest::with_symbols(Choice::default(), |symbols| symbols.retain(|symbol| symbol.1 != name));
        let twice = Guest::with_symbols(Choice::default(), |symbols| symbols.push(('d', name.to_owned(), DATA)));
        for guest in [without, twice] {
            assert!(matches!(find(&guest), Err(KernelError::NoSymbol(missing)) if missing == name));
        }
    }
}

#[test]
fn page_tables_of_the_kernels_own_outside_of_the_image_are_refused() {
    for at in [END, END + 0x20_0000, u64::MAX] {
        assert_eq!(disagreement(&with_symbol("init_top_pgt", at)), "init_top_pgt");
    }
}

#[test]
fn types_of_any_length_that_is_not_theirs_are_refused() {
    let start = Guest::new().symbol("__start_BTF");
    for stop in [start - 1, start + (33 << 20), u64::MAX] {
        assert_eq!(disagreement(&with_symbol("__stop_BTF", stop)), "__stop_BTF");
    }
    for stop in [start, start + 10, start + 100] {
        assert!(matches!(
            find(&with_symbol("__stop_BTF", stop)),
            Err(KernelError::Btf(_))
        ));
    }
    assert!(matches!(
        find(&with_symbol("__stop_BTF", END + (1 << 20))),
        Err(KernelError::Unreadable { what: "BTF", .. })
    ));
}

#[test]
fn vmcoreinfo_that_says_something_else_is_refused() {
    let guest = Guest::new();
    let text = guest.u64_at(guest.symbol("vmcoreinfo_data"));
    guest.put(text, b"OSRELEASE=6.2");
    assert_eq!(disagreement(&guest), "VMCOREINFO OSRELEASE against the banner");
    let guest = Guest::new();
    guest.put(
        text,
        format!("SYMBOL(_stext)=ffffffff81000000\nOSRELEASE={RELEASE}\n").as_bytes(),
    );
    assert_eq!(disagreement(&guest), "VMCOREINFO SYMBOL(_stext) against kallsyms");
}

#[test]
fn vmcoreinfo_at_a_wild_place_or_of_a_wild_length_is_an_error_or_cut() {
    for at in [0, 8, u64::MAX, END - 4, 0xffff_8880_0100_0000] {
        let guest = Guest::new();
        guest.put_u64(guest.symbol("vmcoreinfo_data"), at);
        assert!(
            matches!(find(&guest), Err(KernelError::Unreadable { what: "VMCOREINFO", .. })),
            "{at:#x}"
        );
    }
    let guest = Guest::new();
    guest.put_u64(guest.symbol("vmcoreinfo_size"), u64::MAX);
    assert!(find(&guest).is_ok());
}

#[test]
fn more_cpus_than_a_kernel_can_have_are_not_believed() {
    let guest = Guest::new();
    guest.put_u64(guest.symbol("nr_cpu_ids"), u64::MAX);
    assert_eq!(find(&guest).unwrap().per_cpu_offsets().len(), 8192);
    let guest = with_symbol("__per_cpu_offset", END - 12);
    assert!(matches!(
        find(&guest),
        Err(KernelError::Unreadable {
            what: "__per_cpu_offset",
            ..
        })
    ));
}

#[test]
fn a_banner_without_an_end_is_cut() {
    let guest = Guest::new();
    guest.put(RODATA + BANNER.len() as u64 - 1, &[b'x'; 0x800]);
    guest.put(guest.u64_at(guest.symbol("vmcoreinfo_data")), b"NOTHING=");
    assert_eq!(find(&guest).unwrap().banner.len(), 512);
}

#[test]
fn a_banner_with_escapes_is_shown_without_them() {
    let guest = Guest::new();
    guest.put(RODATA + BANNER.len() as u64 - 4, b"\x1b[2J\n#2\0");
    assert_eq!(find(&guest).unwrap().banner, BANNER.trim_end().replace("SMP", "?[2J"));
}

#[test]
fn a_wild_direct_map_leads_nowhere() {
    for base in [0, u64::MAX, 1 << 63, IMAGE] {
        let guest = Guest::new();
        guest.put_u64(guest.symbol("page_offset_base"), base);
        let kernel = find(&guest).unwrap();
        let live = kernel.live(&guest.ram);
        let outside = Gva(base.wrapping_add(HEAP_GPA + (2 << 20)));
        assert!(live.physical(outside).is_err(), "{base:#x}");
    }
}
