//! Writes a kernel's symbol table as scripts/kallsyms.c does, in each of its forms.

use guest_core::Gva;
use std::collections::BTreeMap;
use std::ops::Range;

/// What changed the tables, by the release that did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Release {
    /// Offsets and base stand first; no sequences.
    V5_10,
    /// Sequences between markers and tokens, and names whose length takes two bytes.
    V6_1,
    /// Offsets, base and sequences stand behind the tokens.
    V6_4,
    /// Offsets are unsigned, from the base.
    V6_11,
    /// Offsets from their own place, no base, tables at multiples of 4.
    V7_0,
}

/// Every form.
pub const RELEASES: [Release; 5] = [
    Release::V5_10,
    Release::V6_1,
    Release::V6_4,
    Release::V6_11,
    Release::V7_0,
];

/// Kernel addresses lie above.
const LOWEST: u64 = 0xffff_ffff_0000_0000;

/// A symbol: type letter, name, address.
pub type Symbol = (char, String, u64);

/// The tables, and where each of them lies in `bytes`.
#[derive(Debug, Clone)]
pub struct Tables {
    pub bytes: Vec<u8>,
    pub count: Range<usize>,
    pub names: Range<usize>,
    pub markers: Range<usize>,
    pub tokens: Range<usize>,
    pub token_index: Range<usize>,
    pub offsets: Range<usize>,
    pub base: Range<usize>,
    pub sequences: Range<usize>,
}

/// The tables for `symbols`, in that order, whose first byte lies at `at`.
pub fn write(release: Release, symbols: &[Symbol], at: Gva) -> Tables {
    write_with(release, symbols, at, "")
}

/// The same with a last token that has so much more text: the table's padding depends on it.
pub fn write_with(release: Release, symbols: &[Symbol], at: Gva, longer: &str) -> Tables {
    let align = if release == Release::V7_0 { 4 } else { 8 };
    let mut out = Writer {
        bytes: Vec::new(),
        align,
    };
    // What lies elsewhere is not in reach of the table's 32 bits: it is cut to them.
    let base = symbols
        .iter()
        .map(|symbol| symbol.2)
        .filter(|address| *address >= LOWEST)
        .min()
        .unwrap_or(0);
    let first = matches!(release, Release::V5_10 | Release::V6_1);
    let (mut offsets, mut base_at, mut sequences) = (0..0, 0..0, 0..0);
    if first {
        offsets = out.table(&offset_table(release, symbols, base, at));
        base_at = out.table(&base.to_le_bytes());
    }
    let count = out.table(&(symbols.len() as u32).to_le_bytes());
    let mut tokens = tokens();
    tokens[255].push_str(longer);
    let (names, markers) = name_table(symbols, &tokens);
    let names = out.table(&names);
    let markers = out.table(&markers);
    if release == Release::V6_1 {
        sequences = out.table(&sequence_table(symbols));
    }
    let (texts, index) = token_table(&tokens);
    let tokens = out.table(&texts);
    let token_index = out.table(&index);
    if !first {
        let place = at.wrapping_add(out.bytes.len().next_multiple_of(align) as u64);
        offsets = out.table(&offset_table(release, symbols, base, place));
        if release != Release::V7_0 {
            base_at = out.table(&base.to_le_bytes());
        }
        sequences = out.table(&sequence_table(symbols));
    }
    Tables {
        bytes: out.bytes,
        count,
        names,
        markers,
        tokens,
        token_index,
        offsets,
        base: base_at,
        sequences,
    }
}

struct Writer {
    bytes: Vec<u8>,
    align: usize,
}

impl Writer {
    fn table(&mut self, table: &[u8]) -> Range<usize> {
        self.bytes.resize(self.bytes.len().next_multiple_of(self.align), 0);
        let start = self.bytes.len();
        self.bytes.extend_from_slice(table);
        start..self.bytes.len()
    }
}

/// 256 tokens: every printing character at its own number, pairs of small letters elsewhere.
fn tokens() -> Vec<String> {
    let mut pairs = (b'a'..=b'z').flat_map(|a| (b'a'..=b'z').map(move |b| String::from_utf8(vec![a, b]).unwrap()));
    let token = |byte: u8| {
        if byte.is_ascii_graphic() {
            char::from(byte).to_string()
        } else {
            pairs.next().unwrap()
        }
    };
    (0..=255).map(token).collect()
}

fn token_table(tokens: &[String]) -> (Vec<u8>, Vec<u8>) {
    let (mut texts, mut index) = (Vec::new(), Vec::new());
    for token in tokens {
        index.extend_from_slice(&(texts.len() as u16).to_le_bytes());
        texts.extend_from_slice(token.as_bytes());
        texts.push(0);
    }
    (texts, index)
}

fn name_table(symbols: &[Symbol], tokens: &[String]) -> (Vec<u8>, Vec<u8>) {
    let (mut names, mut markers) = (Vec::new(), Vec::new());
    let tokens = tokens
        .iter()
        .zip(0..=u8::MAX)
        .map(|(token, number)| (token.as_str(), number))
        .collect();
    for (position, (kind, name, _)) in symbols.iter().enumerate() {
        if position % 256 == 0 {
            markers.extend_from_slice(&(names.len() as u32).to_le_bytes());
        }
        let packed = pack(&format!("{kind}{name}"), &tokens);
        match packed.len() {
            len @ 0..0x80 => names.push(len as u8),
            len => names.extend_from_slice(&[(len & 0x7f) as u8 | 0x80, (len >> 7) as u8]),
        }
        names.extend_from_slice(&packed);
    }
    (names, markers)
}

/// Longest token first.
fn pack(text: &str, tokens: &BTreeMap<&str, u8>) -> Vec<u8> {
    let (mut packed, mut at) = (Vec::new(), 0);
    while at < text.len() {
        let token = |len| tokens.get(text.get(at..at + len)?).map(|number| (*number, len));
        let (number, len) = token(2).or_else(|| token(1)).expect("a printing character");
        packed.push(number);
        at += len;
    }
    packed
}

fn offset_table(release: Release, symbols: &[Symbol], base: u64, place: Gva) -> Vec<u8> {
    let offset = |(index, symbol): (usize, &Symbol)| match release {
        Release::V5_10 | Release::V6_1 | Release::V6_4 if symbol.2 < base => symbol.2 as u32,
        Release::V5_10 | Release::V6_1 | Release::V6_4 => (base.wrapping_sub(symbol.2).wrapping_sub(1)) as u32,
        Release::V6_11 => symbol.2.wrapping_sub(base) as u32,
        Release::V7_0 => symbol.2.wrapping_sub(place.0 + 4 * index as u64) as u32,
    };
    symbols
        .iter()
        .enumerate()
        .flat_map(|item| offset(item).to_le_bytes())
        .collect()
}

fn sequence_table(symbols: &[Symbol]) -> Vec<u8> {
    let mut order: Vec<u32> = (0..symbols.len() as u32).collect();
    order.sort_by_key(|index| &symbols[*index as usize].1);
    order
        .iter()
        .flat_map(|index| index.to_be_bytes()[1..].to_vec())
        .collect()
}
