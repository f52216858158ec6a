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
//! | 7.0 | offsets are relative to their own place, there is no base, and tables start at multiples of 4 instead of 8 |
//!
//! Nothing of this is chosen by a version: the token index is found by its shape, everything else by its place
//! beside it, and all of it must agree: each marker with the names, the addresses' order, and the banner where the symbol says it is.

mod by_name;
mod names;
mod tokens;

use crate::addr::Gva;
use by_name::ByName;
use names::{Names, name_span};
use tokens::{INDEX_BYTES, SHORT_TOKEN_BYTES, Tokens};

/// Names between two markers.
const NAMES_PER_MARKER: usize = 256;
/// Fewer symbols than any kernel has; spares most wrong places a closer look.
const SYMBOLS_MIN: usize = 1000;
/// More symbols than any kernel has; bounds memory and time.
const SYMBOLS_MAX: usize = 1_000_000;
/// Longest name, with its type letter (`KSYM_NAME_LEN` is 512 since 6.1).
const NAME_BYTES_MAX: usize = 513;
/// More than all names of any kernel, in bytes; bounds memory.
const TEXT_BYTES_MAX: usize = 64 << 20;
/// Most token tables that are tried. A kernel has one. Each costs a search through all bytes before it.
const TOKEN_TABLES_MAX: usize = 4;
/// What tables may start at a multiple of: 4 bytes since 7.0, 8 before.
const ALIGN_MIN: usize = 4;
const ALIGN_MAX: usize = 8;

/// Why the symbol table could not be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KallsymsError {
    /// No token index in the kernel's data.
    #[error("no kallsyms token index in {bytes} bytes at {at}")]
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
    offsets: Offsets,
    /// Indexes in ascending order of address.
    by_address: Vec<u32>,
    by_name: ByName,
}

/// The table of offsets, from which addresses are computed.
#[derive(Debug)]
struct Offsets {
    words: Vec<u32>,
    /// Guest-virtual address of the table.
    place: Gva,
    base: u64,
    form: OffsetForm,
}

impl Kallsyms {
    /// Finds and reads the tables in `rodata`, the kernel's read-only data, whose first byte lies at `at`.
    /// `accept` says whether an address form fits the kernel: it is given the symbols under that form, to look names up.
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
        let mut budget = data_budget(rodata);
        for _ in 0..TOKEN_TABLES_MAX {
            let Some(tokens) = Tokens::find(rodata, from) else {
                break;
            };
            match read(rodata, at, &tokens, &mut budget, accept) {
                Ok(found) => return Ok(found),
                Err(error) => failure = error,
            }
            from = tokens.index + 2;
        }
        Err(failure)
    }

    /// Number of symbols.
    pub fn len(&self) -> usize {
        self.offsets.words.len()
    }

    /// True where there is no symbol; [`Kallsyms::find`] never gives such a table.
    pub fn is_empty(&self) -> bool {
        self.offsets.words.is_empty()
    }

    /// How the addresses were stored.
    pub fn form(&self) -> OffsetForm {
        self.offsets.form
    }

    /// Every symbol, in the order of the table (its sympos order).
    pub fn iter(&self) -> impl Iterator<Item = Symbol<'_>> {
        (0..self.len()).filter_map(|index| self.symbol(index))
    }

    /// Every symbol of that very name, in the order of the table: the n-th has sympos n.
    pub fn named<'a>(&'a self, name: &'a str) -> impl Iterator<Item = Symbol<'a>> {
        let same_hash = self.by_name.candidates(name);
        same_hash
            .filter_map(|index| self.symbol(index))
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
        let start = self.address(*self.by_address.get(above.checked_sub(1)?)?);
        // Of several names for one address the first in the table is the one that the kernel prints.
        let first = self.by_address.partition_point(|index| self.address(*index) < start);
        let end = self
            .by_address
            .get(above)
            .map_or(u64::MAX, |index| self.address(*index));
        Some((self.symbol(*self.by_address.get(first)? as usize)?, Gva(end)))
    }

    /// The addresses of all symbols at or above `at`, in ascending order.
    pub fn addresses_from(&self, at: Gva) -> impl Iterator<Item = Gva> {
        let first = self.by_address.partition_point(|index| self.address(*index) < at.0);
        let sorted = self.by_address.get(first..).unwrap_or_default();
        sorted.iter().map(|index| Gva(self.address(*index)))
    }

    fn address(&self, index: u32) -> u64 {
        self.offsets.address(index as usize).unwrap_or(u64::MAX)
    }

    fn symbol(&self, index: usize) -> Option<Symbol<'_>> {
        let start = *self.starts.get(index)? as usize;
        let end = *self.starts.get(index + 1)? as usize;
        Some(Symbol {
            name: self.names.get(start..end)?,
            kind: char::from(*self.kinds.get(index)?),
            address: Gva(self.offsets.address(index)?),
        })
    }

    /// Sorts the symbols by address. The kernel's table is nearly sorted.
    fn sort_by_address(&mut self) {
        let mut sorted: Vec<u32> = (0..u32::try_from(self.len()).unwrap_or(0)).collect();
        sorted.sort_by_key(|index| self.address(*index));
        self.by_address = sorted;
    }
}

impl Offsets {
    fn address(&self, index: usize) -> Option<u64> {
        let raw = *self.words.get(index)?;
        let signed = i64::from(raw.cast_signed());
        Some(match self.form {
            OffsetForm::AbsolutePerCpu if signed >= 0 => u64::from(raw),
            OffsetForm::AbsolutePerCpu => self.base.wrapping_sub(1).wrapping_add_signed(-signed),
            OffsetForm::BaseRelative => self.base.wrapping_add(u64::from(raw)),
            OffsetForm::PlaceRelative => self.place.0.wrapping_add(4 * index as u64).wrapping_add_signed(signed),
        })
    }
}

/// True where a token index with its table may be in `data` from the byte `from` on.
pub(super) fn has_token_index(data: &[u8], from: usize) -> bool {
    Tokens::find(data, from).is_some()
}

/// How many names may be looked at while searching: the real tables are walked twice and have six bytes and more a
/// symbol, while a hostile guest could offer as many starts as its memory has words, each of them nearly right.
fn data_budget(data: &[u8]) -> usize {
    data.len()
}

fn read(
    data: &[u8],
    at: Gva,
    tokens: &Tokens,
    budget: &mut usize,
    accept: &dyn Fn(&Kallsyms) -> Result<(), String>,
) -> Result<Kallsyms, KallsymsError> {
    let index_at = at.wrapping_add(tokens.index as u64);
    let incomplete = |table| KallsymsError::Incomplete { at: index_at, table };
    let names = Names::before(data, tokens, budget).ok_or(incomplete("markers and names"))?;
    let mut kallsyms = decode_names(data, tokens, &names).ok_or(incomplete("printable names"))?;
    let mut failures = Vec::new();
    for (start, base) in offset_tables(data, tokens, &names) {
        let Some(words) = words(data, start, names.count) else {
            continue;
        };
        kallsyms.offsets.words = words;
        kallsyms.offsets.place = at.wrapping_add(start as u64);
        kallsyms.offsets.base = base;
        for form in [
            OffsetForm::AbsolutePerCpu,
            OffsetForm::BaseRelative,
            OffsetForm::PlaceRelative,
        ] {
            kallsyms.offsets.form = form;
            match accept(&kallsyms) {
                Ok(()) => {
                    kallsyms.sort_by_address();
                    return Ok(kallsyms);
                }
                Err(what) => failures.push(format!("as {form:?} with base {base:#x}: {what}")),
            }
        }
    }
    match failures.as_slice() {
        [] => Err(incomplete("table of offsets")),
        _ => Err(KallsymsError::Disagrees {
            at: index_at,
            what: failures.join("; "),
        }),
    }
}

/// Places where the offsets (first) and the base (second) may lie: behind the token index (6.4 on), or
/// before the number of symbols. Place-relative offsets have no base; what lies in its place is not used then.
fn offset_tables(data: &[u8], tokens: &Tokens, names: &Names) -> Vec<(usize, u64)> {
    let len = (4 * names.count).next_multiple_of(names.align);
    let behind = tokens.index + INDEX_BYTES;
    let before = names.count_at.checked_sub(8);
    [
        Some((behind, u64_at(data, behind + len).unwrap_or(0))),
        before.and_then(|base| Some((base.checked_sub(len)?, u64_at(data, base)?))),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// `count` words of the table at `start`.
fn words(data: &[u8], start: usize, count: usize) -> Option<Vec<u32>> {
    let bytes = data.get(start..start.checked_add(4 * count)?)?;
    Some(
        bytes
            .as_chunks::<4>()
            .0
            .iter()
            .map(|word| u32::from_le_bytes(*word))
            .collect(),
    )
}

fn decode_names(data: &[u8], tokens: &Tokens, names: &Names) -> Option<Kallsyms> {
    let mut text = Vec::with_capacity(names.count * 24);
    let mut starts = Vec::with_capacity(names.count + 1);
    let mut kinds = Vec::with_capacity(names.count);
    let mut at = names.start;
    // A name with its type letter, and room for a short token that is copied whole.
    let mut name = [0; NAME_BYTES_MAX + SHORT_TOKEN_BYTES];
    for _ in 0..names.count {
        let (start, end) = name_span(data, at)?;
        let mut len = 0;
        for token in data.get(start..end)? {
            let token = tokens.all.get(usize::from(*token))?;
            match &token.short {
                Some(short) => name.get_mut(len..len + SHORT_TOKEN_BYTES)?.copy_from_slice(short),
                None => name
                    .get_mut(len..len + token.len)?
                    .copy_from_slice(data.get(token.start..token.start + token.len)?),
            }
            len += token.len;
            if len > NAME_BYTES_MAX {
                return None;
            }
        }
        // The first letter is the symbol's type.
        let (kind, name) = name.get(..len)?.split_first()?;
        if name.is_empty() || text.len() + name.len() > TEXT_BYTES_MAX {
            return None;
        }
        kinds.push(*kind);
        starts.push(u32::try_from(text.len()).ok()?);
        text.extend_from_slice(name);
        at = end;
    }
    starts.push(u32::try_from(text.len()).ok()?);
    Some(Kallsyms {
        by_name: ByName::new(&text, &starts),
        names: String::from_utf8(text).ok()?,
        starts,
        kinds,
        offsets: Offsets {
            words: Vec::new(),
            place: Gva(0),
            base: 0,
            form: OffsetForm::BaseRelative,
        },
        by_address: Vec::new(),
    })
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
