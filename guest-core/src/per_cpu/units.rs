//! The map of an area of per-CPU memory, with one bit for each unit that the allocator hands out: set if the unit is in use. And the hints
//! with which the allocator need not scan a part of the map (`struct pcpu_block_md`, mm/percpu-internal.h).

use std::ops::Range;

/// Bytes of a word of the map.
const WORD_BYTES: u64 = 8;
const WORD_BITS: u64 = 64;

/// The map: a bit for each unit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Units {
    words: Vec<u64>,
    count: u64,
}

impl Units {
    /// Size of a map of `count` units, in bytes.
    pub fn bytes_for(count: u64) -> u64 {
        count.div_ceil(WORD_BITS).saturating_mul(WORD_BYTES)
    }

    /// Decodes the bytes of a map. Units beyond the bytes count as used.
    pub fn from_bytes(bytes: &[u8], count: u64) -> Self {
        let words = bytes.as_chunks::<8>().0.iter().map(|word| u64::from_le_bytes(*word));
        Self {
            words: words.collect(),
            count,
        }
    }

    /// Encodes the map as the guest has it.
    pub fn to_bytes(&self) -> Vec<u8> {
        self.words.iter().flat_map(|word| word.to_le_bytes()).collect()
    }

    /// True where the unit is in use.
    pub fn is_set(&self, unit: u64) -> bool {
        let word = usize::try_from(unit / WORD_BITS)
            .ok()
            .and_then(|index| self.words.get(index));
        word.is_none_or(|word| word >> (unit % WORD_BITS) & 1 == 1)
    }

    /// Sets or clears units.
    pub fn fill(&mut self, units: Range<u64>, used: bool) {
        for unit in units {
            let index = usize::try_from(unit / WORD_BITS).ok();
            let Some(word) = index.and_then(|index| self.words.get_mut(index)) else {
                continue;
            };
            let bit = 1 << (unit % WORD_BITS);
            *word = if used { *word | bit } else { *word & !bit };
        }
    }

    /// The runs of free units within `part`, in ascending order.
    pub fn free_in(&self, part: Range<u64>) -> Vec<Range<u64>> {
        let mut runs: Vec<Range<u64>> = Vec::new();
        for unit in part.start..part.end.min(self.count) {
            match runs.last_mut() {
                _ if self.is_set(unit) => {}
                Some(last) if last.end == unit => last.end = unit.saturating_add(1),
                _ => runs.push(unit..unit.saturating_add(1)),
            }
        }
        runs
    }

    /// The last free run of `len` units that starts at a multiple of `align`. The guest's own modules get the first ones.
    pub fn last_fit(&self, len: u64, align: u64) -> Option<u64> {
        let runs = self.free_in(0..self.count);
        runs.into_iter().rev().find_map(|run| {
            let last = run.end.checked_sub(len)?;
            let start = last.checked_sub(last.checked_rem(align)?)?;
            (start >= run.start).then_some(start)
        })
    }
}

/// The allocator's hints for a part of the map, as units from the start of the part. These are the values that the kernel finds when it
/// scans the whole part (`pcpu_block_refresh_hint`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Hints {
    /// Length of the longest free run.
    pub contig_hint: u64,
    /// Start of that run.
    pub contig_hint_start: u64,
    /// Length of the free run at the start of the part.
    pub left_free: u64,
    /// Length of the free run at the end of the part.
    pub right_free: u64,
    /// The first free unit; the number of units if none is free.
    pub first_free: u64,
}

impl Hints {
    /// Finds the hints for a part of the map.
    pub fn of(units: &Units, part: Range<u64>) -> Self {
        let bits = part.end.saturating_sub(part.start);
        let mut hints = Self {
            first_free: bits,
            ..Self::default()
        };
        for run in units.free_in(part.clone()) {
            let (len, start) = (run.end.saturating_sub(run.start), run.start.saturating_sub(part.start));
            hints.first_free = hints.first_free.min(start);
            if start == 0 {
                hints.left_free = len;
            }
            if run.end == part.end {
                hints.right_free = len;
            }
            if len > hints.contig_hint {
                (hints.contig_hint, hints.contig_hint_start) = (len, start);
            }
        }
        hints
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn units(used: &[Range<u64>], count: u64) -> Units {
        let mut units = Units::from_bytes(&vec![0; Units::bytes_for(count) as usize], count);
        used.iter().for_each(|used| units.fill(used.clone(), true));
        units
    }

    #[test]
    fn a_map_is_decoded_from_its_bytes() {
        let map = units(&[3..5, 64..66], 128);
        assert_eq!(map.to_bytes()[..9], [0b0001_1000, 0, 0, 0, 0, 0, 0, 0, 3]);
        assert_eq!(Units::from_bytes(&map.to_bytes(), 128), map);
        assert_eq!(map.free_in(0..128), [0..3, 5..64, 66..128]);
        assert!(map.is_set(128), "what is not in the map is not free");
    }

    #[test]
    fn the_last_run_that_fits_is_chosen() {
        let map = units(&[0..8, 60..64, 120..128], 128);
        assert_eq!(map.last_fit(56, 1), Some(64));
        assert_eq!(map.last_fit(40, 16), Some(80));
        assert_eq!(map.last_fit(52, 4), Some(68));
        assert_eq!(map.last_fit(57, 1), None);
        assert_eq!(map.last_fit(1, 0), None);
        assert_eq!(units(&[0..100, 100..128], 128).last_fit(1, 1), None);
    }

    #[test]
    fn hints_have_the_longest_run_and_those_at_both_ends() {
        let map = units(&[4..10, 20..24, 110..128], 128);
        let hints = Hints {
            contig_hint: 86,
            contig_hint_start: 24,
            left_free: 4,
            right_free: 0,
            first_free: 0,
        };
        assert_eq!(Hints::of(&map, 0..128), hints);
        let second = Hints {
            contig_hint: 46,
            contig_hint_start: 0,
            left_free: 46,
            right_free: 0,
            first_free: 0,
        };
        assert_eq!(Hints::of(&map, 64..128), second);
        let full = Hints {
            first_free: 18,
            ..Hints::default()
        };
        assert_eq!(Hints::of(&map, 110..128), full);
    }
}
