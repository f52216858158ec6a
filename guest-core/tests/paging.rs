//! Page tables that a guest may have written in any way.

mod common;

use common::ram::Ram;
use guest_core::paging::{AddressSpace, Translation};
use guest_core::{Gpa, Gva, MemoryError, PhysMemory};
use std::ops::Range;

/// The start of the addresses where kernels are mapped; its entry is 511 in the top table and 510 in the one below.
const IMAGE_RANGE_START: Gva = Gva(0xffff_ffff_8000_0000);
const TOP: u64 = 0x1000;
const UPPER: u64 = 0x2000;
const DIRECTORY: u64 = 0x3000;
const TABLE: u64 = 0x4000;
const FOUR: AddressSpace = AddressSpace {
    root: Gpa(TOP),
    levels: 4,
};

fn ram() -> Ram {
    let ram = Ram::new(vec![0; 0x8000]);
    ram.put_u64(TOP + 511 * 8, UPPER | 0x63);
    ram.put_u64(UPPER + 510 * 8, DIRECTORY | 0x63);
    ram.put_u64(DIRECTORY + 8, TABLE | 0x63);
    ram
}

fn pages(memory: &dyn PhysMemory, space: AddressSpace) -> Vec<(Gva, Translation)> {
    let mut pages = Vec::new();
    space
        .visit_gib(memory, IMAGE_RANGE_START, &mut |at, there| pages.push((at, there)))
        .unwrap();
    pages
}

#[test]
fn a_visit_tells_of_every_page_what_a_walk_tells() {
    let ram = ram();
    // Every word from a small generator: present or not, large or not, any rights, some outside of RAM.
    let mut state = 1_u64;
    for index in 0..1024 {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        let (table, bits) = (TABLE + (state >> 40 & 3) * 0x1000, state >> 20 & 0xfff);
        let at = if index < 512 {
            DIRECTORY + 8 * index
        } else {
            TABLE + 8 * (index - 512)
        };
        ram.put_u64(at, table | bits & 0xe3 | state & 1 << 63);
    }
    let visited = pages(&ram, FOUR);
    assert!(visited.len() > 1000);
    for (at, there) in &visited {
        assert_eq!(FOUR.translate(&ram, *at).as_ref(), Ok(there), "{at}");
    }
    let mapped = (0..512 * 512)
        .filter(|page| {
            FOUR.translate(&ram, IMAGE_RANGE_START.wrapping_add(4096 * page))
                .is_ok()
        })
        .count();
    let pages_of = |there: &Translation| (there.page_size / 4096) as usize;
    assert_eq!(visited.iter().map(|(_, there)| pages_of(there)).sum::<usize>(), mapped);
}

#[test]
fn a_gigabyte_mapped_by_one_entry_is_one_page() {
    let ram = ram();
    ram.put_u64(UPPER + 510 * 8, 0x4000_0000 | 0xe1);
    let there = Translation {
        gpa: Gpa(0x4000_0000),
        page_size: 1 << 30,
        writable: false,
        executable: true,
    };
    assert_eq!(pages(&ram, FOUR), [(IMAGE_RANGE_START, there)]);
}

#[test]
fn tables_that_are_absent_or_outside_of_ram_map_nothing() {
    for (at, entry) in [
        (TOP + 511 * 8, 0),
        (TOP + 511 * 8, 0xf_ffff_f063),
        (TOP + 511 * 8, UPPER | 0xe3),
        (UPPER + 510 * 8, 0),
        (UPPER + 510 * 8, 0xf_ffff_f063),
        (DIRECTORY + 8, 0xf_ffff_f063),
    ] {
        let ram = ram();
        ram.put_u64(TABLE, 0x5063);
        assert_eq!(pages(&ram, FOUR).len(), 1);
        ram.put_u64(at, entry);
        assert_eq!(pages(&ram, FOUR), [], "{at:#x} {entry:#x}");
    }
    assert_eq!(
        pages(
            &ram(),
            AddressSpace {
                root: Gpa(u64::MAX),
                levels: 5
            }
        ),
        []
    );
}

#[test]
fn a_whole_gigabyte_of_small_pages_takes_one_read_a_table() {
    let ram = ram();
    for index in 0..512 {
        ram.put_u64(DIRECTORY + 8 * index, TABLE | 0x63);
        ram.put_u64(TABLE + 8 * index, 0x5063);
    }
    ram.count_from_here();
    assert_eq!(pages(&ram, FOUR).len(), 512 * 512);
    assert_eq!(ram.counted().0, 2 + 1 + 512);
}

/// Memory whose host fails.
struct Gone;

impl PhysMemory for Gone {
    fn read(&self, at: Gpa, buf: &mut [u8]) -> Result<(), MemoryError> {
        let cause = "the process is gone".to_owned();
        Err(MemoryError::Host {
            at,
            len: buf.len(),
            cause,
        })
    }

    fn write(&self, at: Gpa, bytes: &[u8]) -> Result<(), MemoryError> {
        Err(MemoryError::NotRam { at, len: bytes.len() })
    }

    fn ram(&self) -> &[Range<Gpa>] {
        &[]
    }
}

#[test]
fn a_host_that_fails_is_not_taken_for_memory_that_is_not_mapped() {
    let error = FOUR.visit_gib(&Gone, IMAGE_RANGE_START, &mut |_, _| {}).unwrap_err();
    assert!(matches!(error, MemoryError::Host { .. }));
}

#[test]
fn the_directory_entry_of_an_address_is_given_whatever_it_says() {
    let ram = ram();
    assert_eq!(
        FOUR.directory_entry(&ram, Gva(IMAGE_RANGE_START.0 + 0x40_1234)),
        Ok((Gpa(DIRECTORY + 16), 0))
    );
    assert_eq!(
        FOUR.directory_entry(&ram, Gva(IMAGE_RANGE_START.0 + 0x20_0000)),
        Ok((Gpa(DIRECTORY + 8), TABLE | 0x63))
    );
    let absent = FOUR.directory_entry(&ram, Gva(0)).unwrap_err();
    assert!(matches!(absent, MemoryError::NotMapped { level: 4, entry: 0, .. }));
    ram.put_u64(UPPER + 510 * 8, 0xe1);
    let large = FOUR.directory_entry(&ram, IMAGE_RANGE_START).unwrap_err();
    assert!(matches!(
        large,
        MemoryError::NotMapped {
            level: 3,
            entry: 0xe1,
            ..
        }
    ));
}
