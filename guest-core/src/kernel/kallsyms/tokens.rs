//! The token table and its index: 256 strings from which all names are put together.

use super::{ALIGN_MAX, ALIGN_MIN, u16_at};

/// Longest token that scripts/kallsyms.c can make here; bounds the search.
const TOKEN_BYTES_MAX: u16 = 512;
/// Bytes of the index: 256 numbers of two bytes.
pub(super) const INDEX_BYTES: usize = 512;

/// Bytes between two places that the search for an index looks at first: half an index, so that each index has one of them.
const PROBE_STEP: usize = INDEX_BYTES / 2;
/// Bytes that it looks at there.
const PROBE_BYTES: usize = 16;
/// Longest token that is kept as a copy. Nearly all of them are shorter.
pub(super) const SHORT_TOKEN_BYTES: usize = 16;

/// The token table and its index: offsets of 256 NUL-terminated strings.
pub(super) struct Tokens {
    /// Offset of the table in the data.
    pub table: usize,
    /// Offset of the index.
    pub index: usize,
    /// The tokens.
    pub all: Vec<Token>,
}

/// A string from which names are put together.
pub(super) struct Token {
    /// Offset in the data.
    pub start: usize,
    /// Length in bytes.
    pub len: usize,
    /// Its bytes with zeros behind; `None` for a long one.
    pub short: Option<[u8; SHORT_TOKEN_BYTES]>,
}

impl Tokens {
    /// The first place at or behind `from` that is a token index with its table before it.
    pub fn find(data: &[u8], from: usize) -> Option<Self> {
        let mut index = from.next_multiple_of(2);
        while index + INDEX_BYTES <= data.len() {
            let probe = index.next_multiple_of(PROBE_STEP);
            if !may_be_index(data.get(probe..probe + PROBE_BYTES)?) {
                index = probe + 2;
                continue;
            }
            match increasing(data.get(index..index + INDEX_BYTES)?) {
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

    /// The table that ends, padded to its alignment at the most, where the index starts. Its last string tells where it
    /// starts, because the index says how far into the table that string is.
    fn before(data: &[u8], index: usize, last: u16) -> Option<Self> {
        // NUL and padding
        let padded = index.saturating_sub(ALIGN_MAX + 1);
        let end = padded + data.get(padded..index)?.iter().rposition(|byte| *byte != 0)? + 1;
        let farthest = end.saturating_sub(usize::from(TOKEN_BYTES_MAX) + 1);
        let start = farthest + data.get(farthest..end)?.iter().rposition(|byte| *byte == 0)? + 1;
        let table = start.checked_sub(usize::from(last))?;
        table.is_multiple_of(ALIGN_MIN).then(|| Self::at(data, table, index))?
    }

    fn at(data: &[u8], table: usize, index: usize) -> Option<Self> {
        let mut all = Vec::with_capacity(256);
        let mut expected = 0;
        for token in 0..256 {
            let offset = usize::from(u16_at(data, index + 2 * token)?);
            if offset != expected {
                return None;
            }
            let start = table + offset;
            let len = data.get(start..index)?.iter().position(|byte| *byte == 0)?;
            if len == 0 || !data.get(start..start + len)?.iter().all(u8::is_ascii_graphic) {
                return None;
            }
            expected = offset + len + 1;
            all.push(Token::at(data, start, len)?);
        }
        let padding = data.get(table + expected..index)?;
        let fits = padding.len() < ALIGN_MAX && padding.iter().all(|byte| *byte == 0);
        fits.then_some(Self { table, index, all })
    }
}

impl Token {
    fn at(data: &[u8], start: usize, len: usize) -> Option<Self> {
        let bytes = data.get(start..start + len)?;
        let mut short = [0; SHORT_TOKEN_BYTES];
        let is_short = short.get_mut(..len).map(|copy| copy.copy_from_slice(bytes)).is_some();
        let short = is_short.then_some(short);
        Some(Self { start, len, short })
    }
}

/// True for a part of an index: numbers that increase, each by no more than a token's length.
fn may_be_index(part: &[u8]) -> bool {
    let words = || part.as_chunks::<2>().0.iter().map(|word| u16::from_le_bytes(*word));
    words()
        .zip(words().skip(1))
        .all(|(one, next)| next > one && next - one <= TOKEN_BYTES_MAX)
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
