//! The kernel's own symbol table, read from its read-only data.
//!
//! Written by scripts/kallsyms.c, read by kernel/kallsyms.c. What changed, and when:
//!
//! | release | layout |
//! |---|---|
//! | 4.6 | base-relative offsets; per-CPU symbols absolute (non-negative), the rest `relative_base - 1 - offset` |
//! | 4.20 | markers are 32 bits wide |
//! | 6.1 | a name's length may take two bytes (bit 7 of the first) |
//! | 6.2, 6.1.y | three bytes a symbol (`kallsyms_seqs_of_names`) between markers and token table |
//! | 6.4 | order: number, names, markers, token table, token index, offsets, relative base, sequences; before: offsets and base first |
//! | 6.11 | the absolute form is gone: every offset is unsigned from the base |
//! | 7.0 | offsets are relative to their own place |
//!
//! Nothing of this is chosen by a version: the token index is found by its shape, everything else by its place
//! beside it, and all of it must agree: each marker with the names, the addresses' order, and the banner where the symbol says it is.

use crate::addr::Gva;
use std::hash::{DefaultHasher, Hash, Hasher};

/// Names between two markers.
const NAMES_PER_MARKER: usize = 256;
/// Fewer symbols than any kernel has; spares most wrong places a closer look.
const SYMBOLS_MIN: usize = 1000;
/// More symbols than any kernel has; bounds memory and time.
const SYMBOLS_MAX: usize = 2_000_000;
/// Longest token that scripts/kallsyms.c can make here; bounds the search.
const TOKEN_BYTES_MAX: u16 = 512;
/// Longest name, with its type letter (`KSYM_NAME_LEN` is 512 since 6.1).
const NAME_BYTES_MAX: usize = 513;

/// Why the symbol table could not be read.
#[derive(Debug, thiserror::Error)]
pub enum KallsymsError {
    /// No token index in read-only data.
    #[error("no kallsyms token index in {bytes} bytes of read-only data at {at}")]
    NoTokenIndex {
        /// Start of the data.
        at: Gva,
        /// Its length.
        bytes: usize,
    },
    /// A token index without the tables that belong to it.
    #[error("kallsyms token index at {at}: no {table} that fits it")]
    Incomplete {
        /// Address of the token index.
        at: Gva,
        /// The table that was looked for.
        table: &'static str,
    },
    /// The tables disagree with the kernel image.
    #[error("kallsyms at {at}: {what}")]
    Disagrees {
        /// Address of the token index.
        at: Gva,
        /// What was found instead of what.
        what: String,
    },
}

/// One symbol.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Symbol<'a> {
    /// Its name.
    pub name: &'a str,
    /// Its type letter, as `nm` prints it.
    pub kind: char,
    /// Its address; for per-CPU symbols of kernels before 6.14 the offset in the per-CPU area.
    pub address: Gva,
}

/// How offsets became addresses; [`Kallsyms::form`] tells it to `inspect`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OffsetForm {
    /// Per-CPU symbols absolute, the rest counted down from the base (4.6 to 6.10).
    AbsolutePerCpu,
    /// All counted up from the base (6.11 on).
    BaseRelative,
    /// All relative to the place of the offset itself (7.0 on).
    PlaceRelative,
}

/// The kernel's symbols.
#[derive(Debug)]
pub struct Kallsyms {
    names: String,
    /// Where each name starts in `names`, and one past the last.
    starts: Vec<u32>,
    kinds: Vec<u8>,
    addresses: Vec<u64>,
    /// Indexes in ascending order of address.
    by_address: Vec<u32>,
    /// Hash of the name, and the index; ascending.
    by_name: Vec<(u64, u32)>,
    form: OffsetForm,
}

impl Kallsyms {
    /// Finds and reads the tables in `rodata`, the kernel's read-only data, whose first byte lies at `at`.
    /// `accept` says whether an address form fits the kernel: it is given the symbols under that form.
    ///
    /// Errors: [`KallsymsError`] for what was looked for last and not found. Time is linear in `rodata`.
    pub fn find(
        rodata: &[u8],
        at: Gva,
        accept: &dyn Fn(&Kallsyms) -> Result<(), String>,
    ) -> Result<Self, KallsymsError> {
        let mut failure = KallsymsError::NoTokenIndex {
            at,
            bytes: rodata.len(),
        };
        let mut from = 0;
        while let Some(tokens) = Tokens::find(rodata, from) {
            match read(rodata, at, &tokens, accept) {
                Ok(found) => return Ok(found),
                Err(error) => failure = error,
            }
            from = tokens.index + 2;
        }
        Err(failure)
    }

    /// Number of symbols.
    pub fn len(&self) -> usize {
        self.addresses.len()
    }

    /// True where there is no symbol; [`Kallsyms::find`] never gives such a table.
    pub fn is_empty(&self) -> bool {
        self.addresses.is_empty()
    }

    /// How the addresses were stored.
    pub fn form(&self) -> OffsetForm {
        self.form
    }

    /// Every symbol, in the order of the table (its sympos order).
    pub fn iter(&self) -> impl Iterator<Item = Symbol<'_>> {
        (0..self.len()).filter_map(|index| self.symbol(index))
    }

    /// Every symbol of that very name, in the order of the table: the n-th has sympos n.
    pub fn named<'a>(&'a self, name: &'a str) -> impl Iterator<Item = Symbol<'a>> {
        let hash = hash(name);
        let first = self.by_name.partition_point(|(other, _)| *other < hash);
        let run = self
            .by_name
            .get(first..)
            .unwrap_or(&[])
            .iter()
            .take_while(move |(other, _)| *other == hash);
        run.filter_map(|(_, index)| self.symbol(*index as usize))
            .filter(move |symbol| symbol.name == name)
    }

    /// The address of the only symbol of that name; `None` where there is none or more than one.
    pub fn unique(&self, name: &str) -> Option<Gva> {
        let mut all = self.named(name);
        let first = all.next()?;
        all.next().is_none().then_some(first.address)
    }

    /// The last symbol at or below `at`, and the next higher address that any symbol has.
    pub fn containing(&self, at: Gva) -> Option<(Symbol<'_>, Gva)> {
        let above = self.by_address.partition_point(|index| self.address(*index) <= at.0);
        let mut first = above.checked_sub(1)?;
        let start = self.address(*self.by_address.get(first)?);
        // Of several names for one address the first in the table is the one that the kernel prints.
        while first > 0
            && self
                .by_address
                .get(first - 1)
                .is_some_and(|index| self.address(*index) == start)
        {
            first -= 1;
        }
        let end = self
            .by_address
            .get(above)
            .map_or(u64::MAX, |index| self.address(*index));
        Some((self.symbol(*self.by_address.get(first)? as usize)?, Gva(end)))
    }

    fn address(&self, index: u32) -> u64 {
        self.addresses.get(index as usize).copied().unwrap_or(u64::MAX)
    }

    fn symbol(&self, index: usize) -> Option<Symbol<'_>> {
        let start = *self.starts.get(index)? as usize;
        let end = *self.starts.get(index + 1)? as usize;
        Some(Symbol {
            name: self.names.get(start..end)?,
            kind: char::from(*self.kinds.get(index)?),
            address: Gva(*self.addresses.get(index)?),
        })
    }
}

fn hash(name: &str) -> u64 {
    let mut hasher = DefaultHasher::new();
    name.hash(&mut hasher);
    hasher.finish()
}

/// The token table and its index: offsets of 256 NUL-terminated strings.
struct Tokens {
    /// Offset of the table in the data.
    table: usize,
    /// Offset of the index.
    index: usize,
    /// Each token: its span in the data.
    spans: Vec<(usize, usize)>,
}

impl Tokens {
    /// The first place at or behind `from` that is a token index with its table before it.
    fn find(data: &[u8], from: usize) -> Option<Self> {
        let mut index = from.next_multiple_of(2);
        while index + 512 <= data.len() {
            match increasing(data.get(index..index + 512)?) {
                Ok(last) => {
                    if let Some(tokens) = Self::before(data, index, last) {
                        return Some(tokens);
                    }
                    index += 2;
                }
                Err(skip) => index += skip,
            }
        }
        None
    }

    /// The table that ends, padded to 8 bytes at the most, where the index starts.
    fn before(data: &[u8], index: usize, last: u16) -> Option<Self> {
        let nearest = index.checked_sub(usize::from(last) + 2)?;
        let farthest = nearest.saturating_sub(usize::from(TOKEN_BYTES_MAX) + 8);
        (farthest..=nearest)
            .rev()
            .filter(|table| table % 8 == 0)
            .find_map(|table| Self::at(data, table, index))
    }

    fn at(data: &[u8], table: usize, index: usize) -> Option<Self> {
        let mut spans = Vec::with_capacity(256);
        let mut expected = 0;
        for token in 0..256 {
            let offset = usize::from(u16_at(data, index + 2 * token)?);
            let start = table + offset;
            let len = data.get(start..index)?.iter().position(|byte| *byte == 0)?;
            if offset != expected || len == 0 || !data.get(start..start + len)?.iter().all(u8::is_ascii_graphic) {
                return None;
            }
            expected = offset + len + 1;
            spans.push((start, start + len));
        }
        let padding = data.get(table + expected..index)?;
        (padding.len() < 8 && padding.iter().all(|byte| *byte == 0)).then_some(Self { table, index, spans })
    }
}

/// The last of 256 little-endian u16 that start at 0 and increase; else how many bytes to go on.
fn increasing(bytes: &[u8]) -> Result<u16, usize> {
    let mut previous = None;
    for (position, pair) in bytes.chunks_exact(2).enumerate() {
        let value = u16::from_le_bytes([pair[0], pair[1]]);
        let fits = match previous {
            None => value == 0,
            Some(previous) => value > previous && value - previous <= TOKEN_BYTES_MAX,
        };
        if !fits {
            return Err(if position < 2 { 2 } else { 2 * (position - 1) });
        }
        previous = Some(value);
    }
    previous.ok_or(2)
}

/// Markers and names, which stand before the token table.
struct Names {
    /// Offset of the number of symbols.
    count_at: usize,
    count: usize,
    /// Offset of the first name.
    start: usize,
}

impl Names {
    /// Looks backwards for a number of symbols from which everything up to the token table follows.
    fn before(data: &[u8], tokens: &Tokens) -> Option<Self> {
        (0..tokens.table).rev().filter(|at| at % 8 == 0).find_map(|count_at| {
            let count = u32_at(data, count_at)? as usize;
            if !(SYMBOLS_MIN..=SYMBOLS_MAX).contains(&count) {
                return None;
            }
            // The number is an unsigned int, and every table starts at a multiple of 8.
            let start = count_at + 8;
            let markers_len = (4 * count.div_ceil(NAMES_PER_MARKER)).next_multiple_of(8);
            let sequences_len = (3 * count).next_multiple_of(8);
            [markers_len, markers_len + sequences_len].into_iter().find_map(|back| {
                let markers = tokens.table.checked_sub(back).filter(|markers| *markers > start)?;
                let last = u32_at(data, markers + 4 * ((count - 1) / NAMES_PER_MARKER))? as usize;
                let plausible = u32_at(data, markers)? == 0 && start.checked_add(last)? < markers;
                (plausible && names_agree(data, start, count, markers)).then_some(Self { count_at, count, start })
            })
        })
    }
}

/// True where `count` names from `start` on pass every marker and end just before the markers.
fn names_agree(data: &[u8], start: usize, count: usize, markers: usize) -> bool {
    let mut at = start;
    for name in 0..count {
        if name % NAMES_PER_MARKER == 0 {
            let marker = u32_at(data, markers + 4 * (name / NAMES_PER_MARKER));
            if marker.map(|marker| start + marker as usize) != Some(at) {
                return false;
            }
        }
        match name_span(data, at) {
            Some((_, end)) if end <= markers => at = end,
            _ => return false,
        }
    }
    markers - at < 8
}

/// The token bytes of the name at `at`: their start and end.
fn name_span(data: &[u8], at: usize) -> Option<(usize, usize)> {
    let first = usize::from(*data.get(at)?);
    let (len, start) = if first & 0x80 == 0 {
        (first, at + 1)
    } else {
        ((first & 0x7f) | usize::from(*data.get(at + 1)?) << 7, at + 2)
    };
    (len > 0).then_some((start, start + len))
}

fn read(
    data: &[u8],
    at: Gva,
    tokens: &Tokens,
    accept: &dyn Fn(&Kallsyms) -> Result<(), String>,
) -> Result<Kallsyms, KallsymsError> {
    let index_at = at.wrapping_add(tokens.index as u64);
    let incomplete = |table| KallsymsError::Incomplete { at: index_at, table };
    let names = Names::before(data, tokens).ok_or(incomplete("markers and names"))?;
    let mut kallsyms = decode_names(data, tokens, &names).ok_or(incomplete("printable names"))?;
    let mut failure = incomplete("table of offsets");
    for (offsets, base) in offset_tables(data, tokens, &names) {
        for form in [
            OffsetForm::AbsolutePerCpu,
            OffsetForm::BaseRelative,
            OffsetForm::PlaceRelative,
        ] {
            let Some(addresses) = addresses(data, at, offsets, base, names.count, form) else {
                continue;
            };
            kallsyms.set_addresses(addresses, form);
            match accept(&kallsyms) {
                Ok(()) => return Ok(kallsyms),
                Err(what) => failure = KallsymsError::Disagrees { at: index_at, what },
            }
        }
    }
    Err(failure)
}

/// Places where the offsets (first) and the base (second) may lie: behind the token index (6.4 on), or
/// before the number of symbols.
fn offset_tables(data: &[u8], tokens: &Tokens, names: &Names) -> Vec<(usize, u64)> {
    let len = (4 * names.count).next_multiple_of(8);
    let behind = tokens.index + 512;
    let before = names.count_at.checked_sub(8);
    [
        u64_at(data, behind + len).map(|base| (behind, base)),
        before.and_then(|base| Some((base.checked_sub(len)?, u64_at(data, base)?))),
    ]
    .into_iter()
    .flatten()
    .collect()
}

fn addresses(data: &[u8], at: Gva, offsets: usize, base: u64, count: usize, form: OffsetForm) -> Option<Vec<u64>> {
    let bytes = data.get(offsets..offsets.checked_add(4 * count)?)?;
    let place = at.0.wrapping_add(offsets as u64);
    let address = |(index, word): (usize, &[u8])| {
        let raw = u32::from_le_bytes([word[0], word[1], word[2], word[3]]);
        let signed = i64::from(raw.cast_signed());
        match form {
            OffsetForm::AbsolutePerCpu if signed >= 0 => u64::from(raw),
            OffsetForm::AbsolutePerCpu => base.wrapping_sub(1).wrapping_add_signed(-signed),
            OffsetForm::BaseRelative => base.wrapping_add(u64::from(raw)),
            OffsetForm::PlaceRelative => place.wrapping_add(4 * index as u64).wrapping_add_signed(signed),
        }
    };
    Some(bytes.chunks_exact(4).enumerate().map(address).collect())
}

fn decode_names(data: &[u8], tokens: &Tokens, names: &Names) -> Option<Kallsyms> {
    let mut text = Vec::with_capacity(names.count * 24);
    let mut starts = Vec::with_capacity(names.count + 1);
    let mut kinds = Vec::with_capacity(names.count);
    let mut at = names.start;
    for _ in 0..names.count {
        let (start, end) = name_span(data, at)?;
        let first = text.len();
        for token in data.get(start..end)? {
            let (from, to) = *tokens.spans.get(usize::from(*token))?;
            text.extend_from_slice(data.get(from..to)?);
        }
        if !(2..=NAME_BYTES_MAX).contains(&(text.len() - first)) {
            return None;
        }
        // The first letter is the symbol's type.
        kinds.push(text.remove(first));
        starts.push(u32::try_from(first).ok()?);
        at = end;
    }
    starts.push(u32::try_from(text.len()).ok()?);
    let mut kallsyms = Kallsyms {
        names: String::from_utf8(text).ok()?,
        starts,
        kinds,
        addresses: Vec::new(),
        by_address: Vec::new(),
        by_name: Vec::new(),
        form: OffsetForm::BaseRelative,
    };
    kallsyms.by_name = (0..u32::try_from(names.count).ok()?)
        .filter_map(|index| {
            let span =
                *kallsyms.starts.get(index as usize)? as usize..*kallsyms.starts.get(index as usize + 1)? as usize;
            Some((hash(kallsyms.names.get(span)?), index))
        })
        .collect();
    kallsyms.by_name.sort_unstable();
    Some(kallsyms)
}

impl Kallsyms {
    fn set_addresses(&mut self, addresses: Vec<u64>, form: OffsetForm) {
        self.by_address = (0..u32::try_from(addresses.len()).unwrap_or(0)).collect();
        self.by_address
            .sort_by_key(|index| addresses.get(*index as usize).copied().unwrap_or(u64::MAX));
        self.addresses = addresses;
        self.form = form;
    }
}

fn u16_at(data: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(data.get(at..at.checked_add(2)?)?.try_into().ok()?))
}

fn u32_at(data: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(data.get(at..at.checked_add(4)?)?.try_into().ok()?))
}

fn u64_at(data: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(data.get(at..at.checked_add(8)?)?.try_into().ok()?))
}
