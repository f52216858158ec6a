//! Allocates a patch's per-CPU variables: memory at the same offset in the area of every CPU, from the reserve that the guest keeps for
//! modules, as its own loader does (`__alloc_reserved_percpu`, mm/percpu.c).
//!
//! The reserve is one `struct pcpu_chunk`: a map of the units in use (`units.rs`), a map of the starts of allocations, and hints by which
//! the allocator skips parts of the map. An allocation sets its bits, and writes the hints as the kernel finds them when it scans the whole
//! map. All this happens in the pause, while no task of the guest holds `pcpu_lock` or `pcpu_alloc_mutex`.
//!
//! The size in the patch's `struct module` (`module.percpu_size`) is written last when memory is allocated, and first when it is freed. If
//! it is zero, the allocation is not the patch's. A vmpatch that is killed in between leaves at worst a few bytes of the reserve in use. It
//! never frees an allocation that the guest has handed out since.

mod units;

use crate::addr::{Gpa, Gva};
use crate::change::Change;
use crate::kernel::{KernelError, Live};
use crate::memory::{MemoryError, VirtMemory};
use serde::{Deserialize, Serialize};
use std::ops::Range;
use units::{Hints, Units};

/// Size of a unit in bytes (`PCPU_MIN_ALLOC_SIZE`): 4 in all releases from 4.14 to 7.2. [`Reserve::find`] checks it.
const UNIT_BYTES: u64 = 4;
/// Bytes of per-CPU memory with common hints (`PCPU_BITMAP_BLOCK_SIZE`): a page.
const BLOCK_BYTES: u64 = 4096;
/// Most pages of a reserve. It has 8 KiB, unaligned (`PERCPU_MODULE_RESERVE`).
const PAGES_MAX: u64 = 64;
/// Most bytes of initial values, of all CPUs together. They are written in the pause.
const VALUES_BYTES_MAX: u64 = 256 << 10;
/// Name of the change that marks the allocation as the patch's, for errors.
const MARK: &str = "module.percpu_size";
/// What the guest is doing when it changes the reserve.
const CHANGING: &str = "taking or giving back per-CPU memory";
/// Name of what is read here, for errors.
const WHAT: &str = "the guest's reserve of per-CPU memory";

/// Why a patch gets no per-CPU memory. Nothing was changed.
#[derive(Debug, thiserror::Error)]
pub enum PerCpuError {
    /// The kernel keeps no reserve for modules.
    #[error("the guest's kernel keeps no per-CPU memory in reserve for modules (it has no pcpu_reserved_chunk)")]
    NoReserve,
    /// The reserve has no free run of that size.
    #[error(
        "the module needs {bytes} contiguous bytes of per-CPU memory; the guest's reserve for modules has no such run among its {free} free bytes"
    )]
    Full {
        /// Bytes that the module needs.
        bytes: u64,
        /// All free bytes of the reserve.
        free: u64,
    },
    /// The initial values of all CPUs are so many that the pause would be long.
    #[error(
        "{bytes} bytes of per-CPU variables on {cpus} CPUs are more than the {VALUES_BYTES_MAX} that a pause has time for"
    )]
    TooBig {
        /// Bytes of variables on each CPU.
        bytes: u64,
        /// Number of possible CPUs.
        cpus: usize,
    },
    /// The allocator's state cannot be read, or is not understood.
    #[error(transparent)]
    Kernel(#[from] KernelError),
}

/// An allocation in the guest's reserve.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Allocation {
    /// The per-CPU pointer to it. The guest-virtual address is this and a CPU's offset.
    pub at: u64,
    /// Length in bytes, a whole number of units.
    pub bytes: u64,
    /// The first unit, counted from the start of the reserve.
    unit: u64,
    /// Guest-virtual address of the patch's `module.percpu_size`.
    mark: u64,
}

/// The guest's reserve.
struct Reserve {
    units: Units,
    /// Bits of `bound_map`: the start of each allocation, and the end of the last one.
    bounds: Units,
    count: u64,
    free_bytes: u64,
    map_at: Gva,
    bounds_at: Gva,
    free_bytes_at: Gva,
    empty_pages_at: Gva,
    /// Guest-virtual addresses of the hints of the whole reserve and of each block, with their units.
    hints: Vec<(Gva, Range<u64>)>,
    /// The per-CPU pointer to the first unit.
    first: u64,
}

/// Chooses `bytes` bytes, at a multiple of `align` from the start of a CPU's area, for the module whose `percpu_size` is at `mark`. Changes
/// nothing.
///
/// # Errors
///
/// The reserve has no space for them, or cannot be read.
pub fn choose(live: &Live<'_>, bytes: u64, align: u64, mark: Gva) -> Result<Allocation, PerCpuError> {
    let live = &live.that_changes_when(CHANGING);
    let reserve = Reserve::find(live)?;
    let cpus = possible_cpus(live)?.len();
    let wanted = bytes.div_ceil(UNIT_BYTES);
    let total = bytes.saturating_mul(cpus as u64);
    if total > VALUES_BYTES_MAX {
        return Err(PerCpuError::TooBig { bytes, cpus });
    }
    let free = reserve.free_bytes;
    let unit = reserve.units.last_fit(wanted, align.div_ceil(UNIT_BYTES).max(1));
    let unit = unit.ok_or(PerCpuError::Full { bytes, free })?;
    Ok(Allocation {
        at: reserve.first.wrapping_add(unit.saturating_mul(UNIT_BYTES)),
        bytes: wanted.saturating_mul(UNIT_BYTES),
        unit,
        mark: mark.0,
    })
}

impl Allocation {
    /// Plans the allocation, with the initial values `values` on every CPU. The byte of the patch's data at the guest-virtual address `data.0`
    /// is at the guest-physical address `data.1`; the data are staged before. The changes must be made in a pause.
    ///
    /// # Errors
    ///
    /// The reserve cannot be read.
    pub fn take(&self, live: &Live<'_>, values: &[u8], data: (Gva, Gpa)) -> Result<Vec<Change>, PerCpuError> {
        let live = &live.that_changes_when(CHANGING);
        let mut reserve = Reserve::find(live)?;
        let mut changes = Vec::new();
        let mut initial = values.to_vec();
        initial.resize(usize::try_from(self.bytes).unwrap_or(0), 0);
        for offset in possible_cpus(live)? {
            let at = Gva(self.at.wrapping_add(offset));
            changes.extend(becomes(live, "a CPU's copy of the patch's variables", at, &initial)?);
        }
        let units = self.units();
        reserve.units.fill(units.clone(), true);
        reserve.bounds.fill(units.clone(), false);
        for end in [units.start, units.end] {
            reserve.bounds.fill(end..end.saturating_add(1), true);
        }
        reserve.free_bytes = reserve.free_bytes.saturating_sub(self.bytes);
        changes.extend(reserve.changes(live)?);
        let mark = data.1.wrapping_add(self.mark.wrapping_sub(data.0.0));
        changes.push(Change::replace(MARK, mark, int(0), int(self.bytes)).of_data());
        Ok(changes)
    }

    /// Plans to free the allocation in the reserve as it is now. Gives no changes for an allocation that was not made. The changes must be made
    /// in a pause, when the guest no longer uses the variables.
    ///
    /// # Errors
    ///
    /// The reserve cannot be read, or contradicts the allocation.
    pub fn free(&self, live: &Live<'_>) -> Result<Vec<Change>, KernelError> {
        let live = &live.that_changes_when(CHANGING);
        let mark = live.read_u32(Gva(self.mark)).map_err(unreadable(Gva(self.mark)))?;
        let units = self.units();
        if u64::from(mark) != self.bytes {
            return Ok(Vec::new());
        }
        let mut reserve = Reserve::find(live).map_err(|error| match error {
            PerCpuError::Kernel(error) => error,
            other => damaged(other.to_string(), "the reserve that the patch has memory of"),
        })?;
        // The record comes from the guest: the units must be in the map, and in use.
        if units.end > reserve.count || units.clone().any(|unit| !reserve.units.is_set(unit)) {
            return Err(damaged(format!("units {units:?} free"), "the patch's units in use"));
        }
        let mut changes = fragments(live, MARK, Gva(self.mark), &int(self.bytes), &int(0))?;
        reserve.units.fill(units, false);
        reserve.free_bytes = reserve.free_bytes.saturating_add(self.bytes);
        changes.extend(reserve.changes(live)?);
        Ok(changes)
    }

    fn units(&self) -> Range<u64> {
        self.unit..self.unit.saturating_add(self.bytes / UNIT_BYTES)
    }
}

impl Reserve {
    /// Reads the reserve, and checks that the kernel keeps it as described above.
    fn find(live: &Live<'_>) -> Result<Self, PerCpuError> {
        let symbols = &live.kernel.symbols;
        let pointer = symbols.unique("pcpu_reserved_chunk").ok_or(PerCpuError::NoReserve)?;
        let word = |at: Gva| live.read_u64(at).map_err(unreadable(at));
        let chunk = Gva(word(pointer)?);
        if chunk.0 == 0 {
            return Err(PerCpuError::NoReserve);
        }
        let btf = &live.kernel.btf;
        let (layout, block) = (
            btf.structure("pcpu_chunk").map_err(KernelError::from)?,
            btf.structure("pcpu_block_md").map_err(KernelError::from)?,
        );
        let member = |name: &str| {
            let offset = layout.offset(name).map_err(KernelError::from)?;
            Ok::<_, KernelError>(chunk.wrapping_add(offset))
        };
        let number = |at: Gva| Ok::<_, KernelError>(u64::from(live.read_u32(at).map_err(unreadable(at))?));
        let pages = number(member("nr_pages")?)?;
        let count = pages.saturating_mul(BLOCK_BYTES) / UNIT_BYTES;
        if pages == 0 || pages > PAGES_MAX {
            return Err(damaged(format!("{pages} pages"), "a few").into());
        }
        let blocks_at = Gva(word(member("md_blocks")?)?);
        let mut hints = vec![(member("chunk_md")?, 0..count)];
        for page in 0..pages {
            let first = page.saturating_mul(BLOCK_BYTES / UNIT_BYTES);
            let at = blocks_at.wrapping_add(page.saturating_mul(block.size()));
            hints.push((at, first..first.saturating_add(BLOCK_BYTES / UNIT_BYTES)));
        }
        let bits = block.offset("nr_bits").map_err(KernelError::from)?;
        for (at, units) in &hints {
            let (found, expected) = (number(at.wrapping_add(bits))?, units.end.saturating_sub(units.start));
            if found != expected {
                return Err(damaged(format!("hints of {found} units"), &format!("of {expected}")).into());
            }
        }
        let map = |name: &str, count: u64| {
            let at = Gva(word(member(name)?)?);
            let mut bytes = vec![0; usize::try_from(Units::bytes_for(count)).unwrap_or(0)];
            live.read(at, &mut bytes).map_err(unreadable(at))?;
            Ok::<_, KernelError>((at, Units::from_bytes(&bytes, count)))
        };
        let (map_at, units) = map("alloc_map", count)?;
        let (bounds_at, bounds) = map("bound_map", count.saturating_add(1))?;
        let free_bytes = number(member("free_bytes")?)?;
        let free: u64 = units
            .free_in(0..count)
            .iter()
            .map(|run| run.end.saturating_sub(run.start))
            .sum();
        if free.saturating_mul(UNIT_BYTES) != free_bytes {
            let found = format!("{free_bytes} bytes free, and {free} units");
            return Err(damaged(found, "4 bytes in a unit").into());
        }
        // The distance of a per-CPU pointer from the address in the first CPU's area (`__addr_to_pcpu_ptr`).
        let base_at = live.kernel.symbol("pcpu_base_addr")?;
        let start = symbols.unique("__per_cpu_start").unwrap_or(Gva(0));
        let first = word(member("base_addr")?)?
            .wrapping_sub(word(base_at)?)
            .wrapping_add(start.0);
        Ok(Self {
            units,
            bounds,
            count,
            free_bytes,
            map_at,
            bounds_at,
            free_bytes_at: member("free_bytes")?,
            empty_pages_at: member("nr_empty_pop_pages")?,
            hints,
            first,
        })
    }

    /// Plans the changes from the guest's reserve to this state.
    fn changes(&self, live: &Live<'_>) -> Result<Vec<Change>, KernelError> {
        let layout = live.kernel.btf.structure("pcpu_block_md")?;
        let mut changes = becomes(live, WHAT, self.bounds_at, &self.bounds.to_bytes())?;
        changes.extend(becomes(live, WHAT, self.map_at, &self.units.to_bytes())?);
        changes.extend(becomes(live, WHAT, self.free_bytes_at, &int(self.free_bytes))?);
        let mut empty = 0;
        for (index, (at, units)) in self.hints.iter().enumerate() {
            let hints = Hints::of(&self.units, units.clone());
            let members = [
                ("scan_hint", 0),
                ("scan_hint_start", 0),
                ("contig_hint", hints.contig_hint),
                ("contig_hint_start", hints.contig_hint_start),
                ("left_free", hints.left_free),
                ("right_free", hints.right_free),
                ("first_free", hints.first_free),
            ];
            let mut bytes = vec![0; usize::try_from(layout.size()).unwrap_or(0)];
            live.read(*at, &mut bytes).map_err(unreadable(*at))?;
            for (name, value) in members {
                let start = usize::try_from(layout.offset(name)?).unwrap_or(usize::MAX);
                if let Some(slot) = bytes.get_mut(start..start.saturating_add(4)) {
                    slot.copy_from_slice(&int(value));
                }
            }
            changes.extend(becomes(live, WHAT, *at, &bytes)?);
            let whole = units.end.saturating_sub(units.start);
            empty += u64::from(index != 0 && hints.contig_hint == whole);
        }
        changes.extend(becomes(live, WHAT, self.empty_pages_at, &int(empty))?);
        Ok(changes)
    }
}

/// A value of type `int`, as in memory.
fn int(value: u64) -> Vec<u8> {
    value.to_le_bytes().into_iter().take(4).collect()
}

/// The offset of each possible CPU, which is added to a per-CPU pointer.
fn possible_cpus(live: &Live<'_>) -> Result<Vec<u64>, KernelError> {
    let mask = live.kernel.symbol("__cpu_possible_mask")?;
    let mut offsets = Vec::new();
    for (cpu, offset) in (0_u64..).zip(live.kernel.per_cpu_offsets()) {
        let at = mask.wrapping_add(cpu / 64 * 8);
        if live.read_u64(at).map_err(unreadable(at))? >> (cpu % 64) & 1 == 1 {
            offsets.push(*offset);
        }
    }
    Ok(offsets)
}

/// Plans to write `new` at `at`, from the first byte that differs to the last.
fn becomes(live: &Live<'_>, what: &str, at: Gva, new: &[u8]) -> Result<Vec<Change>, KernelError> {
    let mut old = vec![0; new.len()];
    live.read(at, &mut old).map_err(unreadable(at))?;
    let unlike = unlike(&old, new);
    let of = |bytes: &[u8]| bytes.get(unlike.clone()).unwrap_or_default().to_vec();
    fragments(live, what, at.wrapping_add(unlike.start as u64), &of(&old), &of(new))
}

/// The range from the first byte that differs to the last; empty, at the end, if none differs.
fn unlike(old: &[u8], new: &[u8]) -> Range<usize> {
    let differs = |(old, new): (&u8, &u8)| old != new;
    let len = old.len().min(new.len());
    let first = old.iter().zip(new).position(differs).unwrap_or(len);
    let last = old
        .iter()
        .zip(new)
        .rposition(differs)
        .map_or(len, |last| last.saturating_add(1));
    first..last
}

/// The changes of bytes at a guest-virtual address, one for each fragment that is contiguous in guest-physical memory.
fn fragments(live: &Live<'_>, what: &str, at: Gva, mut old: &[u8], mut new: &[u8]) -> Result<Vec<Change>, KernelError> {
    let mut changes = Vec::new();
    let mut at = at;
    while !new.is_empty() && !old.is_empty() {
        let (gpa, contiguous) = live.physical(at).map_err(unreadable(at))?;
        let len = usize::try_from(contiguous.max(1))
            .unwrap_or(usize::MAX)
            .min(new.len())
            .min(old.len());
        let ((now, old_rest), (then, new_rest)) = (old.split_at(len), new.split_at(len));
        changes.push(Change::replace(what, gpa, now.to_vec(), then.to_vec()).of_data());
        (old, new) = (old_rest, new_rest);
        at = at.wrapping_add(len as u64);
    }
    Ok(changes)
}

fn unreadable(at: Gva) -> impl FnOnce(MemoryError) -> KernelError {
    move |source| KernelError::Unreadable { what: WHAT, at, source }
}

fn damaged(found: String, expected: &str) -> KernelError {
    KernelError::Disagrees {
        what: WHAT,
        found,
        expected: expected.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_differs_is_written() {
        assert_eq!(unlike(&[1, 2, 3, 4, 5], &[1, 9, 3, 8, 5]), 1..4);
        assert_eq!(unlike(&[1, 2], &[9, 8]), 0..2);
        assert_eq!(unlike(&[1, 2], &[1, 2]), 2..2);
        assert_eq!(unlike(&[], &[]), 0..0);
    }
}
