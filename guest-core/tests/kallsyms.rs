//! The kernel's symbol table: every form that a supported kernel writes is read, and no lie in it costs more than an
//! error.

mod common;

use common::kallsyms::{RELEASES, Release, Symbol, Tables, write, write_with};
use guest_core::Gva;
use guest_core::kernel::kallsyms::{Kallsyms, KallsymsError, OffsetForm};

/// Where the read-only data of these tests lies.
const AT: Gva = Gva(0xffff_ffff_8240_0000);
/// Bytes before the tables, so that they don't lie at a multiple of 8 where they need not.
const LEAD: usize = 0x1004;

/// 1500 functions, three of one name, two at one address, one per-CPU variable, one name of two length bytes.
fn symbols() -> Vec<Symbol> {
    let mut symbols = vec![('A', "pcpu_hot".to_owned(), 0x1f000)];
    for number in 0..1500 {
        symbols.push(('t', format!("function_{number}"), 0xffff_ffff_8100_0000 + 0x40 * number));
    }
    symbols[700].1 = "twin".to_owned();
    symbols[701].1 = "twin".to_owned();
    symbols[900].1 = "twin".to_owned();
    symbols.push(('T', "first_at_end".to_owned(), 0xffff_ffff_8200_0000));
    symbols.push(('D', "second_at_end".to_owned(), 0xffff_ffff_8200_0000));
    symbols.push(('R', "X".repeat(300), 0xffff_ffff_8200_0010));
    symbols
}

/// Those that `release` can write: the unsigned forms have no per-CPU symbols, the old one no long names.
fn symbols_of(release: Release) -> Vec<Symbol> {
    let mut symbols = symbols();
    if matches!(release, Release::V6_11 | Release::V7_0) {
        symbols.remove(0);
    }
    if release == Release::V5_10 {
        symbols.pop();
    }
    symbols
}

/// Read-only data with the tables in the middle.
fn rodata(release: Release) -> (Vec<u8>, Tables) {
    let lead = if release == Release::V7_0 { LEAD } else { LEAD + 4 };
    let tables = write(release, &symbols_of(release), AT.wrapping_add(lead as u64));
    let mut data: Vec<u8> = (0..lead).map(|at| (at * 7 + at / 251) as u8).collect();
    data.extend_from_slice(&tables.bytes);
    data.extend((0..0x3000).map(|at| (at * 13) as u8));
    (data, tables)
}

/// Takes the form under which a symbol is where it was put.
fn accept(symbols: &Kallsyms) -> Result<(), String> {
    match symbols.unique("function_77") {
        Some(Gva(0xffff_ffff_8100_1340)) => Ok(()),
        other => Err(format!("function_77 at {other:?}")),
    }
}

fn find(data: &[u8]) -> Result<Kallsyms, KallsymsError> {
    Kallsyms::find(data, AT, &accept)
}

#[test]
fn the_tables_of_every_release_give_every_symbol_in_order() {
    for release in RELEASES {
        let found = find(&rodata(release).0).unwrap_or_else(|error| panic!("{release:?}: {error}"));
        let read: Vec<Symbol> = found
            .iter()
            .map(|symbol| (symbol.kind, symbol.name.to_owned(), symbol.address.0))
            .collect();
        assert!(read == symbols_of(release), "{release:?}");
    }
}

#[test]
fn the_form_of_the_offsets_is_told() {
    let form = |release| find(&rodata(release).0).unwrap().form();
    assert_eq!(form(Release::V5_10), OffsetForm::AbsolutePerCpu);
    assert_eq!(form(Release::V6_1), OffsetForm::AbsolutePerCpu);
    assert_eq!(form(Release::V6_4), OffsetForm::AbsolutePerCpu);
    assert_eq!(form(Release::V6_11), OffsetForm::BaseRelative);
    assert_eq!(form(Release::V7_0), OffsetForm::PlaceRelative);
}

#[test]
fn tables_at_every_place_that_their_alignment_allows_are_found() {
    for release in RELEASES {
        let align = if release == Release::V7_0 { 4 } else { 8 };
        for lead in (0..24).step_by(align) {
            let tables = write(release, &symbols_of(release), AT.wrapping_add(lead as u64));
            let data = [vec![0xaa; lead], tables.bytes].concat();
            assert!(find(&data).is_ok(), "{release:?} behind {lead} bytes");
        }
    }
}

#[test]
fn tables_with_any_padding_behind_the_tokens_are_found() {
    for release in RELEASES {
        for longer in 0..9 {
            let tables = write_with(release, &symbols_of(release), AT, &"~".repeat(longer));
            assert!(find(&tables.bytes).is_ok(), "{release:?} with {longer} more letters");
        }
    }
}

#[test]
fn symbols_of_one_name_keep_the_order_of_the_table() {
    let found = find(&rodata(Release::V6_1).0).unwrap();
    let twins: Vec<u64> = found.named("twin").map(|symbol| symbol.address.0).collect();
    assert_eq!(
        twins,
        [0xffff_ffff_8100_aec0, 0xffff_ffff_8100_af00, 0xffff_ffff_8100_e0c0]
    );
    assert_eq!(found.unique("twin"), None);
    assert_eq!(found.unique("no_such_symbol"), None);
}

#[test]
fn an_address_belongs_to_the_first_symbol_of_the_last_start_before_it() {
    let found = find(&rodata(Release::V6_1).0).unwrap();
    let name = |at| {
        found
            .containing(Gva(at))
            .map(|(symbol, end)| (symbol.name.to_owned(), end.0))
    };
    assert_eq!(
        name(0xffff_ffff_8100_0047),
        Some(("function_1".to_owned(), 0xffff_ffff_8100_0080))
    );
    assert_eq!(
        name(0xffff_ffff_8200_0008),
        Some(("first_at_end".to_owned(), 0xffff_ffff_8200_0010))
    );
    assert_eq!(name(0x1f000), Some(("pcpu_hot".to_owned(), 0xffff_ffff_8100_0000)));
    assert_eq!(name(0x1efff), None);
}

#[test]
fn data_without_tables_is_refused() {
    for data in [
        vec![],
        vec![0; 100_000],
        vec![0xff; 100_001],
        (0..60_000_u32).flat_map(u32::to_le_bytes).collect(),
    ] {
        assert!(matches!(find(&data), Err(KallsymsError::NoTokenIndex { .. })));
    }
}

#[test]
fn tables_cut_off_anywhere_are_refused() {
    for release in RELEASES {
        let (data, tables) = rodata(release);
        let start = data.len() - 0x3000 - tables.bytes.len();
        let needed = start + tables.token_index.end.max(tables.offsets.end);
        let edges = [
            &tables.count,
            &tables.names,
            &tables.markers,
            &tables.tokens,
            &tables.token_index,
            &tables.offsets,
        ];
        let edges = edges
            .into_iter()
            .flat_map(|table| [start + table.start + 1, start + table.end - 1]);
        for end in edges.filter(|end| *end < needed) {
            assert!(find(&data[..end]).is_err(), "{release:?} cut at {end} of {needed}");
        }
    }
}

/// Every table spoiled, at its start, middle and end, with the values that hurt most.
#[test]
fn a_lie_in_any_table_is_refused_or_changes_addresses_only() {
    for release in RELEASES {
        let (data, tables) = rodata(release);
        let start = data.len() - 0x3000 - tables.bytes.len();
        let spoilt = [
            &tables.count,
            &tables.names,
            &tables.markers,
            &tables.tokens,
            &tables.token_index,
        ];
        for table in spoilt {
            for at in [table.start, table.start + table.len() / 2 / 4 * 4, table.end - 4] {
                for value in [0, 0x80, 0xffff, 0x7fff_ffff, u32::MAX] {
                    let mut data = data.clone();
                    data[start + at..start + at + 4].copy_from_slice(&u32::to_le_bytes(value));
                    if let Ok(found) = find(&data) {
                        assert_eq!(found.len(), symbols_of(release).len(), "{release:?} {at} {value:#x}");
                    }
                }
            }
        }
    }
}

#[test]
fn wild_offsets_and_a_wild_base_are_refused_by_what_they_should_lead_to() {
    for release in RELEASES {
        let (data, tables) = rodata(release);
        let start = data.len() - 0x3000 - tables.bytes.len();
        for value in [0, 0x5a, 0x80, 0xff] {
            let mut data = data.clone();
            data[start + tables.offsets.start..start + tables.offsets.end].fill(value);
            assert!(
                matches!(find(&data), Err(KallsymsError::Disagrees { .. })),
                "{release:?} {value:#x}"
            );
        }
        if tables.base.is_empty() {
            continue;
        }
        let mut data = data.clone();
        data[start + tables.base.start..start + tables.base.end].fill(0xff);
        assert!(find(&data).is_err(), "{release:?}");
    }
}

#[test]
fn a_name_whose_two_byte_length_reaches_past_the_end_is_refused() {
    let (mut data, tables) = rodata(Release::V6_4);
    let start = data.len() - 0x3000 - tables.bytes.len();
    data[start + tables.names.start] = 0xff;
    data[start + tables.names.start + 1] = 0xff;
    assert!(matches!(
        find(&data),
        Err(KallsymsError::Incomplete {
            table: "markers and names",
            ..
        })
    ));
}

/// Tokens of 500 letters, each name made of 40: decoding stops at the first name that is too long.
#[test]
fn names_that_swell_when_decoded_are_refused() {
    let (mut texts, mut index) = (Vec::new(), Vec::new());
    for _ in 0..256 {
        index.extend_from_slice(&u16::try_from(texts.len()).unwrap().to_le_bytes());
        texts.extend_from_slice(&[b'x'; 250]);
        texts.push(0);
    }
    let mut data = 2000_u32.to_le_bytes().to_vec();
    data.resize(8, 0);
    let mut markers = Vec::new();
    for name in 0..2000 {
        if name % 256 == 0 {
            markers.extend_from_slice(&(data.len() as u32 - 8).to_le_bytes());
        }
        data.push(40);
        data.extend_from_slice(&[1; 40]);
    }
    for table in [markers, texts, index] {
        data.resize(data.len().next_multiple_of(8), 0);
        data.extend_from_slice(&table);
    }
    data.resize(data.len() + 40_000, 0);
    assert!(matches!(
        find(&data),
        Err(KallsymsError::Incomplete {
            table: "printable names",
            ..
        })
    ));
}

/// A megabyte in which every fourth byte is the start of a plausible table: walking each would take hours.
#[test]
fn a_guest_that_offers_a_start_at_every_word_is_refused_in_linear_time() {
    let mut data = [1, 1, 1, 0].repeat(1 << 18);
    data.extend_from_slice(&[0; 16]);
    data.extend((0..258_u32).flat_map(|marker| (512 * marker).to_le_bytes()));
    let (mut texts, mut index) = (Vec::new(), Vec::new());
    for token in 0..256_u16 {
        index.extend_from_slice(&(2 * token).to_le_bytes());
        texts.extend_from_slice(b"x\0");
    }
    data.extend_from_slice(&texts);
    data.extend_from_slice(&index);
    assert!(matches!(
        find(&data),
        Err(KallsymsError::Incomplete {
            table: "markers and names",
            ..
        })
    ));
}

/// Looking up the symbol of an address must not walk all symbols that share it: an unwinder asks for every frame.
#[test]
fn twenty_thousand_symbols_at_one_address_are_looked_up_without_walking_them() {
    let symbols: Vec<Symbol> = (0..20_000)
        .map(|number| ('t', format!("f{number}"), 0xffff_ffff_8100_0000))
        .collect();
    let tables = write(Release::V6_11, &symbols, AT);
    let found = Kallsyms::find(&tables.bytes, AT, &|_| Ok(())).unwrap();
    for at in 0..20_000 {
        let (symbol, _) = found.containing(Gva(0xffff_ffff_8100_0000 + at)).unwrap();
        assert_eq!(symbol.name, "f0");
    }
}
