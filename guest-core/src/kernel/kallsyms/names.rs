//! Markers and names, which stand before the token table.

use super::tokens::Tokens;
use super::{ALIGN_MAX, ALIGN_MIN, NAMES_PER_MARKER, SYMBOLS_MAX, SYMBOLS_MIN, u32_at};

/// Where the names lie, once every marker agrees with them.
pub(super) struct Names {
    /// Offset of the number of symbols.
    pub count_at: usize,
    /// Number of symbols.
    pub count: usize,
    /// Offset of the first name.
    pub start: usize,
    /// What the assembler aligned every table to, in bytes.
    pub align: usize,
}

impl Names {
    /// Looks backwards for a number of symbols from which everything up to the token table follows. Each name
    /// looked at is taken off `budget`; `None` where there is no such number, or nothing left.
    pub fn before(data: &[u8], tokens: &Tokens, budget: &mut usize) -> Option<Self> {
        let places = (0..tokens.table).rev().filter(|at| at % ALIGN_MIN == 0);
        places.into_iter().find_map(|count_at| {
            let count = u32_at(data, count_at)? as usize;
            if !(SYMBOLS_MIN..=SYMBOLS_MAX).contains(&count) {
                return None;
            }
            [ALIGN_MAX, ALIGN_MIN]
                .into_iter()
                .filter(|align| {
                    [count_at, tokens.table, tokens.index]
                        .iter()
                        .all(|at| at.is_multiple_of(*align))
                })
                .find_map(|align| Self::at(data, count_at, count, align, tokens, budget))
        })
    }

    fn at(
        data: &[u8],
        count_at: usize,
        count: usize,
        align: usize,
        tokens: &Tokens,
        budget: &mut usize,
    ) -> Option<Self> {
        // The number is an unsigned int, and the next table starts at the next multiple.
        let start = count_at + align;
        let markers_len = (4 * count.div_ceil(NAMES_PER_MARKER)).next_multiple_of(align);
        let sequences_len = (3 * count).next_multiple_of(align);
        [markers_len, markers_len + sequences_len].into_iter().find_map(|back| {
            let markers = tokens.table.checked_sub(back).filter(|markers| *markers > start)?;
            let tables = Tables {
                data,
                start,
                count,
                markers,
                align,
            };
            tables.agree(budget).then_some(Self {
                count_at,
                count,
                start,
                align,
            })
        })
    }
}

/// A supposed place of names and markers.
struct Tables<'a> {
    data: &'a [u8],
    start: usize,
    count: usize,
    markers: usize,
    align: usize,
}

impl Tables<'_> {
    /// True where the names pass every marker and end just before the markers. The last group goes first: it alone
    /// tells nearly every wrong place.
    fn agree(&self, budget: &mut usize) -> bool {
        let last = (self.count - 1) / NAMES_PER_MARKER;
        if self.marker(0) != Some(self.start) || self.marker(last).is_none_or(|at| at >= self.markers) {
            return false;
        }
        let ends = |at: usize| at <= self.markers && self.markers - at < self.align;
        self.end_of_group(last, budget).is_some_and(ends)
            && (0..last).all(|group| {
                let end = self.end_of_group(group, budget);
                end.is_some() && end == self.marker(group + 1)
            })
    }

    /// Where a marker says that its group of names starts.
    fn marker(&self, group: usize) -> Option<usize> {
        Some(self.start + u32_at(self.data, self.markers + 4 * group)? as usize)
    }

    fn end_of_group(&self, group: usize, budget: &mut usize) -> Option<usize> {
        let names = (self.count - group * NAMES_PER_MARKER).min(NAMES_PER_MARKER);
        *budget = budget.checked_sub(names)?;
        let first = self.marker(group).filter(|at| *at < self.markers)?;
        (0..names).try_fold(first, |at, _| {
            let (_, end) = name_span(self.data, at)?;
            (end <= self.markers).then_some(end)
        })
    }
}

/// The token bytes of the name at `at`: their start and end.
pub(super) fn name_span(data: &[u8], at: usize) -> Option<(usize, usize)> {
    let first = usize::from(*data.get(at)?);
    let (len, start) = if first & 0x80 == 0 {
        (first, at + 1)
    } else {
        ((first & 0x7f) | usize::from(*data.get(at + 1)?) << 7, at + 2)
    };
    (len > 0).then_some((start, start + len))
}
