//! What two sequences have in common, in its order.

/// A comparison of more pairs than this is not made.
const PAIRS_MAX: usize = 1 << 24;

/// For each of the new ones its place among the old ones, along a longest common subsequence; `None` where that would take too long.
pub(crate) fn places<T: PartialEq>(old: &[T], new: &[T]) -> Option<Vec<Option<usize>>> {
    let start = old.iter().zip(new).take_while(|(one, other)| one == other).count();
    let (old_rest, new_rest) = (old.get(start..)?, new.get(start..)?);
    let backwards = old_rest.iter().rev().zip(new_rest.iter().rev());
    let end = backwards.take_while(|(one, other)| one == other).count();
    let middle = common(
        old_rest.get(..old_rest.len() - end)?,
        new_rest.get(..new_rest.len() - end)?,
    )?;
    let mut places: Vec<Option<usize>> = (0..start).map(Some).collect();
    places.extend(middle.into_iter().map(|at| Some(start + at?)));
    places.extend((old.len() - end..old.len()).map(Some));
    Some(places)
}

fn common<T: PartialEq>(old: &[T], new: &[T]) -> Option<Vec<Option<usize>>> {
    let width = new.len() + 1;
    let mut places = vec![None; new.len()];
    if old.is_empty() || new.is_empty() {
        return Some(places);
    }
    if (old.len() + 1).saturating_mul(width) > PAIRS_MAX {
        return None;
    }
    // How much is common to what follows each pair.
    let mut lengths = vec![0_u32; (old.len() + 1) * width];
    for (at, one) in old.iter().enumerate().rev() {
        for (there, other) in new.iter().enumerate().rev() {
            lengths[at * width + there] = if one == other {
                lengths[(at + 1) * width + there + 1] + 1
            } else {
                lengths[(at + 1) * width + there].max(lengths[at * width + there + 1])
            };
        }
    }
    let (mut at, mut there) = (0, 0);
    while let (Some(one), Some(other)) = (old.get(at), new.get(there)) {
        if one == other {
            places[there] = Some(at);
            (at, there) = (at + 1, there + 1);
        } else if lengths[(at + 1) * width + there] >= lengths[at * width + there + 1] {
            at += 1;
        } else {
            there += 1;
        }
    }
    Some(places)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_common_is_found_around_several_changes() {
        let places = |old: &str, new: &str| {
            let (old, new): (Vec<char>, Vec<char>) = (old.chars().collect(), new.chars().collect());
            places(&old, &new).unwrap()
        };
        assert_eq!(
            places("abcd", "xabcyd"),
            [None, Some(0), Some(1), Some(2), None, Some(3)]
        );
        assert_eq!(places("abc", "c"), [Some(2)]);
        assert_eq!(places("", "a"), [None]);
        assert_eq!(places("aab", "ab"), [Some(0), Some(2)]);
    }
}
