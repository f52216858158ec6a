//! ORC tables: the entry for an address.
//!
//! A table has two arrays of equal length: 32-bit distances from each element's own address to its code, in ascending order of the code, and
//! the entries (`__orc_find`, arch/x86/kernel/unwind_orc.c). The kernel's own table has some 370,000 entries in 3.6 MB, of which a walk needs
//! a few dozen: they are looked up in guest memory.

use super::error::{SetupError, UnwindError};
use super::orc::{ENTRY_BYTES_MAX, OrcFormat, Rule};
use crate::addr::Gva;
use crate::memory::VirtMemory;

/// Most entries of a table, more than any kernel or module has.
const ENTRIES_MAX: u64 = 1 << 24;

/// One table, in guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OrcTable {
    ips: Gva,
    entries: Gva,
    count: u64,
}

impl OrcTable {
    /// The table with `count` elements, whose distances start at `ips` and whose entries start at `entries`. It must be sorted, as the kernel's
    /// own loader sorts a module's.
    ///
    /// # Errors
    ///
    /// `count` is more than any table has.
    pub fn new(ips: Gva, entries: Gva, count: u64) -> Result<Self, SetupError> {
        if count == 0 || count > ENTRIES_MAX {
            return Err(SetupError::NotUnderstood {
                what: "ORC table",
                found: format!("{count} entries"),
                expected: format!("1 to {ENTRIES_MAX}"),
            });
        }
        Ok(Self { ips, entries, count })
    }

    /// Number of elements.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// The rule for the code at `ip`: the entry of the last element at or below it.
    ///
    /// # Errors
    ///
    /// The table cannot be read, or the entry is not valid.
    pub fn rule(&self, memory: &dyn VirtMemory, format: &OrcFormat, ip: Gva) -> Result<Rule, UnwindError> {
        let mut bytes = [0; ENTRY_BYTES_MAX];
        let entry = bytes.get_mut(..format.entry_bytes()).ok_or(UnwindError::NoOrc { ip })?;
        self.entry(memory, ip, entry)?;
        format.decode(ip, entry)
    }

    /// Fills `entry`, which has the length of one entry, with the entry for `ip`.
    ///
    /// # Errors
    ///
    /// The table cannot be read.
    pub fn entry(&self, memory: &dyn VirtMemory, ip: Gva, entry: &mut [u8]) -> Result<(), UnwindError> {
        let unreadable = |at: Gva| {
            move |source| UnwindError::Unreadable {
                what: "the ORC table",
                at: at.0,
                source,
            }
        };
        // The elements below `low` are at or below `ip`; those from `high` on are above it.
        let (mut low, mut high) = (0, self.count);
        while low < high {
            let middle = low + (high - low) / 2;
            let place = self.ips.wrapping_add(middle * 4);
            let distance = memory.read_u32(place).map_err(unreadable(place))?.cast_signed();
            if place.wrapping_offset(distance.into()) <= ip {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        let index = low.checked_sub(1).ok_or(UnwindError::NoOrc { ip })?;
        let at = self.entries.wrapping_add(index.wrapping_mul(entry.len() as u64));
        memory.read(at, entry).map_err(unreadable(at))
    }
}
