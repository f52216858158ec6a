//! Finds symbols by name: a hash table of lists.

use std::hash::{BuildHasher, RandomState};

/// Marks the end of a list.
const END: u32 = u32::MAX;

/// The indexes of all symbols, in lists of those whose names have the same hash.
#[derive(Debug)]
pub(super) struct ByName {
    keys: [u64; 2],
    /// The first symbol of each list. The number of lists is a power of two.
    first: Vec<u32>,
    /// For each symbol the next one of its list.
    next: Vec<u32>,
}

impl ByName {
    /// For names that lie in `text`, from each of `starts` to the next.
    pub fn new(text: &[u8], starts: &[u32]) -> Self {
        // A guest that knew the keys could choose names that are all in one list.
        let random = RandomState::new();
        let count = starts.len().saturating_sub(1);
        let mut table = Self {
            keys: [random.hash_one(0), random.hash_one(1) | 1],
            first: vec![END; count.next_power_of_two()],
            next: vec![END; count],
        };
        // The last symbol comes first, so that each list is ascending.
        for (index, span) in starts.windows(2).enumerate().rev() {
            let &[start, end] = span else { continue };
            let name = text.get(start as usize..end as usize).unwrap_or_default();
            let list = table.list(name);
            let slots = table.first.get_mut(list).zip(table.next.get_mut(index));
            if let (Some((first, next)), Ok(index)) = (slots, u32::try_from(index)) {
                *next = std::mem::replace(first, index);
            }
        }
        table
    }

    /// The symbols that may have that name, in ascending order.
    pub fn candidates(&self, name: &str) -> impl Iterator<Item = usize> {
        let first = self.first.get(self.list(name.as_bytes())).copied();
        let mut at = first.unwrap_or(END);
        std::iter::from_fn(move || {
            let index = at as usize;
            at = *self.next.get(index)?;
            Some(index)
        })
    }

    /// The list that a name is in.
    fn list(&self, name: &[u8]) -> usize {
        let (words, rest) = name.as_chunks::<8>();
        let mut last = [0; 8];
        last.iter_mut().zip(rest).for_each(|(to, from)| *to = *from);
        let [start, factor] = self.keys;
        let mut hash = start ^ name.len() as u64;
        for word in words.iter().chain([&last]) {
            hash = folded_product(hash ^ u64::from_le_bytes(*word), factor);
        }
        usize::try_from(hash & (self.first.len() as u64 - 1)).unwrap_or(0)
    }
}

/// Both halves of a product, combined.
fn folded_product(one: u64, other: u64) -> u64 {
    let product = u128::from(one) * u128::from(other);
    let half = |bits: u128| u64::try_from(bits & u128::from(u64::MAX)).unwrap_or(0);
    half(product) ^ half(product >> 64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_name_is_found_with_its_index_and_equal_names_in_ascending_order() {
        let mut text = Vec::new();
        let mut starts = vec![0];
        let name = |number: usize| match number {
            3 | 700 => "twin".to_owned(),
            _ => "x".repeat(number % 40) + &number.to_string(),
        };
        for number in 0..1000 {
            text.extend_from_slice(name(number).as_bytes());
            starts.push(u32::try_from(text.len()).unwrap());
        }
        let table = ByName::new(&text, &starts);
        for number in 0..1000 {
            assert!(table.candidates(&name(number)).any(|index| index == number), "{number}");
        }
        let twins: Vec<usize> = table
            .candidates("twin")
            .filter(|index| [3, 700].contains(index))
            .collect();
        assert_eq!(twins, [3, 700]);
    }

    #[test]
    fn a_table_without_symbols_finds_none() {
        assert_eq!(ByName::new(&[], &[0]).candidates("schedule").next(), None);
    }
}
