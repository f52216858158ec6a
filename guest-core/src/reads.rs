//! Preconditions of a plan: the bytes that it was made from, which must be unchanged when it is committed.
//!
//! A plan is made while the guest runs, and the guest's own code adds and removes neighbours of every structure that the plan edits. Therefore a
//! [`Live`](crate::kernel::Live) with [`Reads`] records all that is read through it, with the page-table entries that led there. Constant data
//! are read through [`Live::constant`](crate::kernel::Live::constant) instead.

use crate::addr::Gpa;
use crate::change::ChangeError;
use crate::memory::{MemoryError, PhysMemory};
use std::cell::RefCell;

/// Most bytes between two reads that are merged into one.
const GAP_BYTES_MAX: u64 = 64;
/// Most bytes of merged reads.
const PART_BYTES_MAX: u64 = 4096;

/// The reads that were recorded so far.
#[derive(Debug, Default)]
pub struct Reads {
    log: RefCell<Vec<Part>>,
}

/// Bytes that must be unchanged.
#[derive(Debug, Clone)]
struct Part {
    gpa: Gpa,
    bytes: Vec<u8>,
    /// The bits that must be unchanged.
    mask: Vec<u8>,
    /// What the guest is doing when it changes them.
    doing: &'static str,
}

impl Reads {
    /// Records that `bytes` were read at `gpa`. `doing` is what the guest is doing when it changes them.
    pub(crate) fn keep(&self, gpa: Gpa, bytes: &[u8], doing: &'static str) {
        self.keep_masked(gpa, bytes, vec![0xff; bytes.len()], doing);
    }

    /// Records a word of which only the bits of `mask` must be unchanged.
    pub(crate) fn keep_bits(&self, gpa: Gpa, word: u64, mask: u64, doing: &'static str) {
        self.keep_masked(gpa, &word.to_le_bytes(), mask.to_le_bytes().into(), doing);
    }

    fn keep_masked(&self, gpa: Gpa, bytes: &[u8], mask: Vec<u8>, doing: &'static str) {
        self.log.borrow_mut().push(Part {
            gpa,
            bytes: bytes.to_vec(),
            mask,
            doing,
        });
    }

    /// The preconditions of a plan that was made from these reads.
    pub fn preconditions(&self) -> Preconditions {
        let mut log = self.log.borrow().clone();
        log.sort_by_key(|part| part.gpa);
        let mut parts: Vec<Part> = Vec::new();
        for part in log {
            if !parts.last_mut().is_some_and(|last| last.join(&part)) {
                parts.push(part);
            }
        }
        Preconditions { parts }
    }
}

impl Part {
    fn end(&self) -> Gpa {
        self.gpa.wrapping_add(self.bytes.len() as u64)
    }

    /// Merges `other`, which does not begin in front of this one, if it is near and agrees in the bytes that both have.
    fn join(&mut self, other: &Self) -> bool {
        let (Some(offset), gap) = (
            other.gpa.checked_sub(self.gpa),
            other.gpa.0.saturating_sub(self.end().0),
        ) else {
            return false;
        };
        let len = offset.saturating_add(other.bytes.len() as u64);
        if self.doing != other.doing || gap > GAP_BYTES_MAX || len > PART_BYTES_MAX {
            return false;
        }
        let (Ok(offset), Ok(len)) = (usize::try_from(offset), usize::try_from(len)) else {
            return false;
        };
        let theirs = || other.bytes.iter().zip(&other.mask);
        let ours = self.bytes.iter().zip(&self.mask).skip(offset);
        if ours
            .zip(theirs())
            .any(|((a, of_a), (b, of_b))| (a ^ b) & of_a & of_b != 0)
        {
            return false;
        }
        let len = len.max(self.bytes.len());
        self.bytes.resize(len, 0);
        self.mask.resize(len, 0);
        let slots = self.bytes.iter_mut().zip(&mut self.mask).skip(offset);
        for ((byte, counts), (theirs, of_theirs)) in slots.zip(theirs()) {
            *byte = (*byte & !of_theirs) | (theirs & of_theirs);
            *counts |= of_theirs;
        }
        true
    }
}

/// What must be in guest memory for a plan to be committed. Preconditions are not written.
#[derive(Debug, Clone, Default)]
pub struct Preconditions {
    /// In ascending order.
    parts: Vec<Part>,
}

impl Preconditions {
    /// Checks all preconditions, with one request to `memory`.
    ///
    /// # Errors
    ///
    /// [`ChangeError::Changing`] for bytes that have changed, or [`ChangeError::Memory`].
    pub fn check(&self, memory: &dyn PhysMemory) -> Result<(), ChangeError> {
        let ranges: Vec<_> = self.parts.iter().map(|part| (part.gpa, part.bytes.len())).collect();
        let mut now = vec![0; ranges.iter().map(|(_, len)| len).sum()];
        let unreadable = |source: MemoryError| ChangeError::Memory {
            what: "reading again what was planned from".to_owned(),
            source,
        };
        memory.read_ranges(&ranges, &mut now).map_err(unreadable)?;
        let mut rest = now.as_slice();
        for part in &self.parts {
            let (found, later) = rest.split_at_checked(part.bytes.len()).unwrap_or((rest, &[]));
            rest = later;
            let bytes = found.iter().zip(&part.bytes).zip(&part.mask);
            let differs = |((now, then), mask): ((&u8, &u8), &u8)| (now ^ then) & mask != 0;
            if let Some(offset) = bytes.into_iter().position(differs) {
                return Err(ChangeError::Changing {
                    doing: part.doing,
                    gpa: part.gpa.wrapping_add(offset as u64),
                });
            }
        }
        Ok(())
    }

    /// Each byte with bits that must be unchanged: its address and these bits.
    pub fn bytes(&self) -> impl Iterator<Item = (Gpa, u8)> {
        self.parts.iter().flat_map(|part| {
            let bytes = (0_u64..).zip(&part.mask).filter(|(_, mask)| **mask != 0);
            bytes.map(|(offset, mask)| (part.gpa.wrapping_add(offset), *mask))
        })
    }

    /// Number of ranges of memory that are read for the check.
    pub fn places(&self) -> usize {
        self.parts.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Ram;

    const DOING: &str = "changing it";

    #[test]
    fn near_reads_are_merged_and_bytes_between_may_change() {
        let (ram, reads) = (Ram::new(256), Reads::default());
        reads.keep(Gpa(48), &[0; 8], DOING);
        reads.keep(Gpa(16), &[0; 8], DOING);
        reads.keep(Gpa(20), &[0; 8], DOING);
        reads.keep(Gpa(200), &[0; 8], DOING);
        reads.keep(Gpa(208), &[0; 8], "changing another thing");
        let all = reads.preconditions();
        assert_eq!(all.places(), 3);
        let counting: Vec<u64> = all.bytes().map(|(gpa, _)| gpa.0).collect();
        assert_eq!(
            counting,
            [16..28, 48..56, 200..216].into_iter().flatten().collect::<Vec<_>>()
        );
        ram.write(Gpa(30), &[1]).unwrap();
        all.check(&ram).unwrap();
        ram.write(Gpa(27), &[1]).unwrap();
        let error = all.check(&ram).unwrap_err();
        assert!(
            matches!(
                error,
                ChangeError::Changing {
                    doing: DOING,
                    gpa: Gpa(27)
                }
            ),
            "{error}"
        );
    }

    #[test]
    fn bytes_that_were_read_twice_with_other_values_never_hold() {
        let (ram, reads) = (Ram::new(64), Reads::default());
        reads.keep(Gpa(8), &[0; 8], DOING);
        reads.keep(Gpa(8), &[1, 0, 0, 0, 0, 0, 0, 0], DOING);
        for byte in [0, 1] {
            ram.write(Gpa(8), &[byte]).unwrap();
            reads.preconditions().check(&ram).unwrap_err();
        }
    }

    #[test]
    fn bits_outside_of_the_mask_may_change() {
        let (ram, reads) = (Ram::new(64), Reads::default());
        reads.keep_bits(Gpa(8), 0x1063, !0x60, DOING);
        ram.write(Gpa(8), &[0x23, 0x10]).unwrap();
        reads.preconditions().check(&ram).unwrap();
        ram.write(Gpa(8), &[0x62, 0x10]).unwrap();
        reads.preconditions().check(&ram).unwrap_err();
    }
}
