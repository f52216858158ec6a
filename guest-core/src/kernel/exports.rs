//! The symbols that the kernel image exports to modules: `__ksymtab` (include/linux/export-internal.h; place-relative since 4.19:
//! value, name and namespace, 4 bytes each), sorted by name.

use super::{KernelError, Live};
use crate::addr::Gva;
use crate::memory::VirtMemory;

/// Longest name that is read, in bytes. `KSYM_NAME_LEN` is 512 since 6.1.
const NAME_BYTES_MAX: usize = 512;
/// Most entries of a table, more than a kernel has.
const ENTRIES_MAX: u64 = 1 << 20;

/// An exported symbol.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Export {
    /// Guest-virtual address.
    pub address: Gva,
    /// The checksum of its type, in kernels that have them (`CONFIG_MODVERSIONS`): 4 bytes for each entry of the table (`__kcrctab`; plain
    /// values on x86 in all releases from 4.19 to 6.12).
    pub crc: Option<u32>,
}

/// Finds the image's export `name`; `None` if there is none. Searches both tables, because vmpatch applies modules whatever their licence:
/// the operator is responsible for them.
///
/// # Errors
///
/// The tables cannot be read.
pub fn find(live: &Live<'_>, name: &str) -> Result<Option<Export>, KernelError> {
    let live = &live.constant();
    for (start, stop, crcs) in [
        ("__start___ksymtab", "__stop___ksymtab", "__start___kcrctab"),
        ("__start___ksymtab_gpl", "__stop___ksymtab_gpl", "__start___kcrctab_gpl"),
    ] {
        let at = |symbol| live.kernel.symbols.unique(symbol);
        let (Some(start), Some(stop)) = (at(start), at(stop)) else {
            continue;
        };
        let size = live.kernel.btf.structure("kernel_symbol")?.size();
        let count = stop.0.saturating_sub(start.0) / size.max(1);
        if let Some((index, address)) = search(live, start, count.min(ENTRIES_MAX), name)? {
            let crc = at(crcs).map(|crcs| crc(live, crcs, index));
            return Ok(Some(Export {
                address,
                crc: crc.transpose()?,
            }));
        }
    }
    Ok(None)
}

/// The checksum at `index` of a table.
pub(super) fn crc(live: &Live<'_>, crcs: Gva, index: u64) -> Result<u32, KernelError> {
    let at = crcs.wrapping_add(4 * index);
    live.read_u32(at).map_err(|source| KernelError::Unreadable {
        what: "__kcrctab",
        at,
        source,
    })
}

/// The index and the address of `name` in one table of `count` entries.
pub(super) fn search(live: &Live<'_>, start: Gva, count: u64, name: &str) -> Result<Option<(u64, Gva)>, KernelError> {
    let size = live.kernel.btf.structure("kernel_symbol")?.size();
    let entry = |index: u64| start.wrapping_add(index * size);
    let (mut low, mut high) = (0, count);
    while low < high {
        let middle = low + (high - low) / 2;
        let at = relative(live, entry(middle).wrapping_add(4))?;
        match text(live, at)?.as_slice().cmp(name.as_bytes()) {
            std::cmp::Ordering::Less => low = middle + 1,
            std::cmp::Ordering::Greater => high = middle,
            std::cmp::Ordering::Equal => return Ok(Some((middle, relative(live, entry(middle))?))),
        }
    }
    Ok(None)
}

/// The address that a place-relative 32-bit offset leads to.
fn relative(live: &Live<'_>, at: Gva) -> Result<Gva, KernelError> {
    let offset = live.read_u32(at).map_err(|source| KernelError::Unreadable {
        what: "__ksymtab",
        at,
        source,
    })?;
    Ok(at.wrapping_offset(i64::from(offset.cast_signed())))
}

/// The bytes up to the NUL. Names in `__ksymtab_strings` are read in at most two steps.
fn text(live: &Live<'_>, at: Gva) -> Result<Vec<u8>, KernelError> {
    let mut bytes = [0; NAME_BYTES_MAX];
    for len in [64, NAME_BYTES_MAX] {
        let Some(now) = bytes.get_mut(..len) else { break };
        live.read(at, now).map_err(|source| KernelError::Unreadable {
            what: "__ksymtab_strings",
            at,
            source,
        })?;
        if let Some(end) = now.iter().position(|byte| *byte == 0) {
            return Ok(now.get(..end).unwrap_or_default().to_vec());
        }
    }
    Ok(bytes.to_vec())
}
