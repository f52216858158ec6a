//! The registry in the guest: written, found again, and refused where the guest has written into it.

mod common;

use common::guest::{CAVE, Choice, END, ETEXT, FIXMAP_DIRECTORY, Guest, IMAGE, gpa};
use guest_core::change::Change;
use guest_core::kernel::KernelError;
use guest_core::registry::record::Orc;
use guest_core::registry::{FILLER, Pages, Record, Registry, RegistryError, Span, State, cave};
use guest_core::{Gva, Kernel, PhysMemory};

/// The first 2 MiB behind the address range of modules.
const ALIAS: u64 = 0xffff_ffff_ff00_0000;
/// The entry for it in its directory.
const ENTRY: u64 = FIXMAP_DIRECTORY + 8 * 504;

fn find(guest: &Guest, kernel: &Kernel) -> Result<Registry, RegistryError> {
    let live = kernel.live(&guest.ram);
    let caves = cave::find(&live)?;
    Registry::find(&live, &caves)
}

/// A guest with an empty registry.
fn with_registry() -> (Guest, Kernel) {
    let guest = Guest::new();
    let kernel = guest.kernel();
    let registry = find(&guest, &kernel).unwrap();
    registry
        .creation()
        .iter()
        .for_each(|change| change.make(&guest.ram).unwrap());
    (guest, kernel)
}

fn record(id: &str) -> Record {
    Record {
        id: id.to_owned(),
        digest: "00".to_owned(),
        order: 1,
        model: "none".to_owned(),
        applied_at: 0,
        functions: Vec::new(),
        text: Span::default(),
        rodata: Span::default(),
        data: Span::default(),
        orc: Orc::default(),
        pending: Vec::new(),
        replaces: Vec::new(),
        changes: vec![Change::word("a word", guest_core::Gpa(0x1000), 0, 1)],
        registration: None,
        escapes: Some(Vec::new()),
    }
}

/// Writes a record to the start of `pages`, and a slot for it.
fn put(guest: &Guest, slot: u64, state: u64, pages: Pages, bytes: &[u8]) {
    let start = gpa(CAVE) + pages.first * 4096;
    guest.ram.write(guest_core::Gpa(start), bytes).unwrap();
    put_slot(
        guest,
        slot,
        state,
        [
            pages.first,
            pages.count,
            0,
            bytes.len() as u64,
            u64::from(crc32fast::hash(bytes)),
        ],
    );
}

fn put_slot(guest: &Guest, slot: u64, state: u64, numbers: [u64; 5]) {
    let at = CAVE + 64 + 32 * slot;
    guest.put_u64(at, state);
    for (index, number) in (0..).zip(numbers) {
        guest.put(at + 8 + 4 * index, &(number as u32).to_le_bytes());
    }
}

fn damage(guest: &Guest, kernel: &Kernel) -> String {
    match find(guest, kernel) {
        Err(RegistryError::Damaged { what, .. }) => what,
        other => panic!("{other:?}"),
    }
}

#[test]
fn the_cave_is_found_with_its_whole_pages() {
    let guest = Guest::new();
    guest.put(CAVE + 0x10_0000 - 8, &[0x90; 8]);
    guest.put(CAVE, &[0x90]);
    let kernel = guest.kernel();
    let caves = cave::find(&kernel.live(&guest.ram)).unwrap();
    assert_eq!(
        caves,
        [cave::Cave {
            start: Gva(CAVE + 4096),
            len: 0x10_0000 - 8192
        }]
    );
}

#[test]
fn filler_that_a_symbol_lies_in_or_that_is_short_is_no_cave() {
    let guest = Guest::with_symbols(Choice::default(), |symbols| {
        symbols.push(('t', "in_the_cave".to_owned(), CAVE + 0x8_0000));
    });
    let kernel = guest.kernel();
    assert!(matches!(find(&guest, &kernel), Err(RegistryError::NoCave)));
    let guest = Guest::new();
    (0..8).for_each(|part| guest.put(CAVE + 0x2_0000 * part, &[0]));
    let kernel = guest.kernel();
    assert!(matches!(find(&guest, &kernel), Err(RegistryError::NoCave)));
}

#[test]
fn a_first_registry_is_planned_for_the_cave_and_the_first_free_window() {
    let guest = Guest::new();
    let kernel = guest.kernel();
    let registry = find(&guest, &kernel).unwrap();
    assert_eq!((registry.cave, registry.base.0), (Gva(CAVE), gpa(CAVE)));
    assert_eq!((registry.arena_pages, registry.exists), (256, false));
    assert_eq!(registry.alias, Gva(ALIAS));
    assert_eq!(registry.directory_entry.0, gpa(ENTRY));
    assert!(guest.ram.differences().is_empty());
}

#[test]
fn a_window_that_is_taken_is_left_alone() {
    let guest = Guest::new();
    guest.put_u64(ENTRY, 2);
    let kernel = guest.kernel();
    assert_eq!(find(&guest, &kernel).unwrap().alias, Gva(ALIAS + 0x20_0000));
    guest.put_u64(ENTRY + 8, 2);
    assert!(matches!(find(&guest, &kernel), Err(RegistryError::NoAliasRange)));
}

/// `virt_addr_valid` computes a page from an address of the first GiB, where it is the image's own (`KERNEL_IMAGE_SIZE`).
#[test]
fn the_alias_mapping_is_where_the_kernel_takes_no_address_for_one_of_its_image() {
    let guest = Guest::new();
    let kernel = guest.kernel();
    let alias = find(&guest, &kernel).unwrap().alias;
    assert!(alias >= guest_core::kernel::image::IMAGE_RANGE.end, "{alias}");
}

#[test]
fn a_wild_end_of_the_image_does_not_move_the_alias_mapping() {
    for end in [0xffff_ffff_c000_0000, 0xffff_ffff_ffff_f000, u64::MAX] {
        let choice = Choice {
            release: common::kallsyms::Release::V6_11,
            ..Choice::default()
        };
        let guest = Guest::with_symbols(choice, |symbols| {
            symbols.iter_mut().find(|symbol| symbol.1 == "_end").unwrap().2 = end;
        });
        let kernel = guest.kernel();
        guest.ram.count_from_here();
        assert_eq!(find(&guest, &kernel).unwrap().alias, Gva(ALIAS), "{end:#x}");
        assert!(guest.ram.counted().0 < 10_000);
    }
}

/// Up to 2026-11 it was the first 2 MiB that are free behind the image, with 2 MiB between them.
#[test]
fn a_registry_whose_alias_mapping_an_earlier_vmpatch_has_put_behind_the_image_is_used_as_it_is() {
    let guest = Guest::new();
    let kernel = guest.kernel();
    let mut registry = find(&guest, &kernel).unwrap();
    let alias = Gva(END + 0x20_0000);
    let (directory_entry, _) = kernel.space.directory_entry(&guest.ram, alias).unwrap();
    (registry.alias, registry.directory_entry) = (alias, directory_entry);
    let changes = registry.creation();
    changes.iter().for_each(|change| change.make(&guest.ram).unwrap());
    let found = find(&guest, &kernel).unwrap();
    assert_eq!((found.exists, found.alias), (true, alias));
}

#[test]
fn a_registry_that_was_laid_is_found_again_and_maps_its_pool() {
    let (guest, kernel) = with_registry();
    let registry = find(&guest, &kernel).unwrap();
    assert!(registry.exists && registry.entries.is_empty());
    assert_eq!(
        (registry.cave, registry.alias, registry.arena_pages),
        (Gva(CAVE), Gva(ALIAS), 256)
    );
    guest.ram.put_u64(registry.table_entry(2).0, registry.page(2).0 | 0x63);
    let there = kernel.space.translate(&guest.ram, registry.mapped(2)).unwrap();
    assert_eq!((there.gpa, there.writable), (registry.page(2), true));
}

#[test]
fn a_registry_taken_away_leaves_the_guest_as_it_was() {
    let (guest, kernel) = with_registry();
    let live = kernel.live(&guest.ram);
    let registry = find(&guest, &kernel).unwrap();
    registry
        .removal(&live, &[])
        .unwrap()
        .iter()
        .for_each(|change| change.make(&guest.ram).unwrap());
    assert!(guest.ram.differences().is_empty());
}

/// Staging and removal stop at each change, as where vmpatch is killed; the next one finishes the work.
#[test]
fn a_registry_half_laid_or_half_taken_away_is_taken_away_by_the_next() {
    let (sound, kernel) = (Guest::new(), Guest::new().kernel());
    let creation = find(&sound, &kernel).unwrap().creation();
    let (laid, _) = with_registry();
    let removal = find(&laid, &kernel)
        .unwrap()
        .removal(&kernel.live(&laid.ram), &[])
        .unwrap();
    for (start, changes) in [(&sound, creation), (&laid, removal)] {
        for made in 0..=changes.len() {
            let guest = start.clone();
            changes
                .iter()
                .take(made)
                .for_each(|change| change.make(&guest.ram).unwrap());
            let live = kernel.live(&guest.ram);
            let registry = find(&guest, &kernel).unwrap_or_else(|error| panic!("{made}: {error}"));
            let rest = guest_core::plan::cleanup(&live, &registry).unwrap();
            rest.iter().for_each(|change| change.make(&guest.ram).unwrap());
            let left = guest.ram.differences();
            assert!(left.is_empty(), "{made}: {} pages", left.len());
        }
    }
}

#[test]
fn a_record_survives_the_registry() {
    let (guest, kernel) = with_registry();
    put(
        &guest,
        5,
        State::Applied as u64,
        Pages { first: 2, count: 1 },
        &record("fix").to_bytes().unwrap(),
    );
    let registry = find(&guest, &kernel).unwrap();
    let [entry] = registry.entries.as_slice() else { panic!() };
    assert_eq!(
        (entry.slot, entry.state, entry.pages),
        (5, State::Applied, Pages { first: 2, count: 1 })
    );
    assert_eq!(entry.record, Some(record("fix")));
}

#[test]
fn another_version_or_a_damaged_header_is_told() {
    let (guest, kernel) = with_registry();
    guest.put(CAVE + 8, &[6]);
    assert!(matches!(
        find(&guest, &kernel),
        Err(RegistryError::Version { found: 6, .. })
    ));
    for at in [12, 16, 24, 32, 40, 48, 63] {
        let (guest, kernel) = with_registry();
        let byte = guest.bytes_at(CAVE + at, 1)[0];
        guest.put(CAVE + at, &[byte ^ 0x40]);
        assert!(damage(&guest, &kernel).contains("checksum"), "{at}");
    }
}

/// An older vmpatch would not know that the guest knows what is kept from here on.
#[test]
fn an_older_registry_is_read_and_brought_to_this_version() {
    let (guest, kernel) = with_registry();
    guest.put(CAVE + 8, &[1]);
    let older = find(&guest, &kernel).unwrap();
    older.upgrade().unwrap().make(&guest.ram).unwrap();
    let newer = find(&guest, &kernel).unwrap();
    assert_eq!((older.version, newer.version), (1, 5));
    assert_eq!(newer.upgrade(), None);
}

/// A header that the guest wrote, checksum and all.
fn forge(guest: &Guest, words: [u64; 4]) {
    for (index, word) in (0..).zip(words) {
        guest.put_u64(CAVE + 16 + 8 * index, word);
    }
    let crc = crc32fast::hash(&guest.bytes_at(CAVE + 16, 48));
    guest.put(CAVE + 12, &crc.to_le_bytes());
}

#[test]
fn a_forged_header_is_refused_whatever_it_says() {
    let (guest, kernel) = with_registry();
    let registry = find(&guest, &kernel).unwrap();
    let sound = [CAVE, ALIAS, registry.directory_entry.0, 256];
    forge(&guest, sound);
    assert!(find(&guest, &kernel).is_ok());
    for (index, wild) in [
        (0, CAVE + 4096),
        (0, 0),
        (1, 0),
        (1, ALIAS + 0x20_0000),
        (1, ALIAS + 4096),
        (1, u64::MAX),
        (2, 0),
        (2, u64::MAX),
        (3, 0),
        (3, 1),
        (3, 513),
        (3, u64::MAX),
    ] {
        let mut words = sound;
        words[index] = wild;
        forge(&guest, words);
        assert!(find(&guest, &kernel).is_err(), "{index} {wild:#x}");
    }
}

#[test]
fn a_pool_that_reaches_out_of_the_text_is_refused() {
    let (guest, kernel) = with_registry();
    let at = ETEXT - 0x1000;
    guest.put(at, &guest.bytes_at(CAVE, 4096));
    guest.put(CAVE, &[0xcc; 4096]);
    guest.put_u64(at + 16, at);
    let crc = crc32fast::hash(&guest.bytes_at(at + 16, 48));
    guest.put(at + 12, &crc.to_le_bytes());
    assert!(damage(&guest, &kernel).contains("has 256 pages"));
}

#[test]
fn two_registries_are_refused() {
    let (guest, kernel) = with_registry();
    guest.put(IMAGE + 0x30_0000, &guest.bytes_at(CAVE, 64));
    assert!(damage(&guest, &kernel).contains("another one"));
}

#[test]
fn slots_that_lie_about_state_pages_or_record_are_refused() {
    let len = record("fix").to_bytes().unwrap().len() as u64;
    for (state, numbers, says) in [
        (12, [2, 1, 0, len, 0], "unknown state"),
        (5, [2, 1, 0, len, 0], "checksum"),
        (6, [2, 1, 0, len, 0], "checksum"),
        (7, [2, 1, 0, len, 0], "checksum"),
        (8, [2, 1, 0, len, 0], "checksum"),
        (9, [2, 1, 0, len, 0], "checksum"),
        (10, [2, 1, 0, len, 0], "checksum"),
        (11, [2, 1, 0, len, 0], "checksum"),
        (u64::MAX, [2, 1, 0, len, 0], "unknown state"),
        (3, [0, 1, 0, len, 0], "outside of the arena"),
        (3, [1, 1, 0, len, 0], "outside of the arena"),
        (3, [255, 2, 0, len, 0], "outside of the arena"),
        (3, [0xffff_ffff, 0xffff_ffff, 0, len, 0], "outside of the arena"),
        (3, [2, 1, 4090, len, 0], "a record of"),
        (3, [2, 1, 0xffff_ffff, 0xffff_ffff, 0], "a record of"),
        (3, [2, 1, 0, len, 1], "checksum"),
        (2, [2, 1, 0, 0, 0], "EOF"),
    ] {
        let (guest, kernel) = with_registry();
        put(
            &guest,
            0,
            3,
            Pages { first: 2, count: 1 },
            &record("fix").to_bytes().unwrap(),
        );
        put_slot(&guest, 0, state, numbers);
        let what = damage(&guest, &kernel);
        assert!(what.contains(says), "{numbers:?}: {what}");
    }
}

#[test]
fn a_patch_that_was_being_laid_or_wiped_needs_no_record() {
    for state in [State::Staging, State::Reverted] {
        let (guest, kernel) = with_registry();
        put_slot(&guest, 0, state as u64, [2, 3, 0, 100, 7]);
        let registry = find(&guest, &kernel).unwrap();
        assert_eq!(registry.entries[0].record, None);
    }
}

/// 126 slots that share pages would make 126 copies of a record of a megabyte.
#[test]
fn patches_that_share_pages_are_refused() {
    let (guest, kernel) = with_registry();
    let bytes = record("fix").to_bytes().unwrap();
    put(&guest, 0, 3, Pages { first: 2, count: 2 }, &bytes);
    put(&guest, 1, 3, Pages { first: 3, count: 1 }, &bytes);
    assert!(damage(&guest, &kernel).contains("slot 1 has pages 3..4, slot 0 has 2..4"));
    put(&guest, 1, 3, Pages { first: 4, count: 1 }, &bytes);
    assert_eq!(find(&guest, &kernel).unwrap().entries.len(), 2);
}

#[test]
fn records_that_are_no_records_are_refused() {
    let deep = "[".repeat(4000);
    let sound = String::from_utf8(record("fix").to_bytes().unwrap()).unwrap();
    for text in [
        "",
        "null",
        "{}",
        deep.as_str(),
        &sound.replace("\"order\":1", "\"order\":-1"),
        &sound.replace("\"order\":1", "\"order\":1e400"),
        &sound.replace("\"fix\"", "\"\\ud800\""),
        &sound.replace("0000000000000000", "000"),
        &sound.replace("0000000000000000", "zz"),
        &sound.replace("0000000000000000", "+f+f+f+f+f+f+f+f"),
        &sound.replace("0000000000000000", "00"),
        &sound.replace("\"fix\"", "\"\\u001b[2J\""),
        &sound.replace("a word", "a \u{202e}word"),
        &sound.replace("\"gpa\":4096", "\"gpa\":18446744073709551616"),
    ] {
        assert!(text != sound);
        assert!(Record::from_bytes(text.as_bytes()).is_err(), "{text:.60}");
        let (guest, kernel) = with_registry();
        put(&guest, 0, 3, Pages { first: 2, count: 1 }, text.as_bytes());
        damage(&guest, &kernel);
    }
}

#[test]
fn pages_are_allocated_from_the_first_gap_that_is_big_enough() {
    let (guest, kernel) = with_registry();
    let bytes = record("fix").to_bytes().unwrap();
    put(&guest, 0, 3, Pages { first: 4, count: 6 }, &bytes);
    put(&guest, 2, 3, Pages { first: 20, count: 1 }, &bytes);
    let registry = find(&guest, &kernel).unwrap();
    assert_eq!(registry.allocate(2).unwrap(), (1, Pages { first: 2, count: 2 }));
    assert_eq!(registry.allocate(3).unwrap(), (1, Pages { first: 10, count: 3 }));
    assert_eq!(registry.allocate(11).unwrap(), (1, Pages { first: 21, count: 11 }));
    assert!(matches!(
        registry.allocate(300),
        Err(RegistryError::Full {
            wanted: 300,
            free: 235,
            ..
        })
    ));
    assert!(matches!(registry.allocate(u64::MAX), Err(RegistryError::Full { .. })));
}

#[test]
fn a_registry_with_all_slots_taken_says_so() {
    let (guest, kernel) = with_registry();
    for slot in 0..126 {
        put_slot(&guest, slot, State::Staging as u64, [2 + slot, 1, 0, 0, 0]);
    }
    assert!(matches!(
        find(&guest, &kernel).unwrap().allocate(1),
        Err(RegistryError::NoSlot { .. })
    ));
}

/// Code that is kept until the guest reboots takes room: whoever finds none must learn why.
#[test]
fn a_registry_without_room_names_the_reverted_patches_whose_code_is_kept() {
    let (guest, kernel) = with_registry();
    for (slot, id) in [(0, "first"), (1, "second")] {
        let bytes = record(id).to_bytes().unwrap();
        let first = 2 + 100 * slot;
        put(&guest, slot, State::Kept as u64, Pages { first, count: 100 }, &bytes);
    }
    let registry = find(&guest, &kernel).unwrap();
    assert_eq!((registry.records().count(), registry.all_records().count()), (0, 2));
    let said = registry.allocate(99).unwrap_err().to_string();
    let kept = "until the guest reboots, the code of 2 reverted patches is kept: first, second";
    assert!(
        said.starts_with("no space: 99 pages wanted") && said.ends_with(kept),
        "{said}"
    );
}

#[test]
fn text_that_cannot_be_read_is_an_error() {
    let (guest, kernel) = with_registry();
    let guest = Guest {
        ram: common::ram::Ram::new(guest.bytes_at(common::guest::DIRECT, 4 << 20)),
        ..guest
    };
    assert!(matches!(
        find(&guest, &kernel),
        Err(RegistryError::Kernel(KernelError::Unreadable { .. }))
    ));
}

#[test]
fn filler_is_what_the_linker_writes() {
    assert!(cave::is_filler(&[FILLER; 3]) && !cave::is_filler(&[FILLER, 0]));
}
