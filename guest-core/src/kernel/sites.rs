//! Places in the kernel's text that the kernel itself rewrites at run time: jump labels, static calls, kprobes.

use super::list::Walker;
use super::{KernelError, Live};
use crate::addr::Gva;
use crate::memory::VirtMemory;
use std::ops::Range;

/// Longest site: a call or jump with its operand.
const SITE_BYTES: u64 = 5;
/// More bytes than a table of sites has; bounds memory.
const TABLE_BYTES_MAX: u64 = 16 << 20;
/// Buckets of `kprobe_table` (`KPROBE_HASH_BITS` is 6 in kernel/kprobes.c).
const KPROBE_BUCKETS: u64 = 64;

/// What the kernel rewrites somewhere in `range`; `None` where nothing.
pub fn rewritten_in(live: &Live<'_>, range: &Range<Gva>) -> Result<Option<String>, KernelError> {
    let tables = [
        (
            "jump label",
            "__start___jump_table",
            "__stop___jump_table",
            "jump_entry",
        ),
        (
            "static call",
            "__start_static_call_sites",
            "__stop_static_call_sites",
            "static_call_site",
        ),
    ];
    for (what, start, stop, entry) in tables {
        if let Some(site) = place_relative(live, what, start, stop, entry)?.find(|site| overlaps(*site, range)) {
            return Ok(Some(format!("a {what} at {site}")));
        }
    }
    let probe = kprobes(live)?.into_iter().find(|site| overlaps(*site, range));
    Ok(probe.map(|site| format!("a kprobe at {site}")))
}

/// The first kprobe that the guest has set in `range`.
pub fn probe_in(live: &Live<'_>, range: &Range<Gva>) -> Result<Option<Gva>, KernelError> {
    Ok(kprobes(live)?.into_iter().find(|site| range.contains(site)))
}

fn overlaps(site: Gva, range: &Range<Gva>) -> bool {
    site < range.end && site.wrapping_add(SITE_BYTES) > range.start
}

/// The addresses in a table whose entries start with a place-relative 32-bit offset to the code (include/linux/
/// jump_label.h since 4.19, static_call_types.h since 5.10). A kernel without the table has no such sites.
fn place_relative(
    live: &Live<'_>,
    what: &'static str,
    start: &str,
    stop: &str,
    entry: &str,
) -> Result<impl Iterator<Item = Gva> + use<>, KernelError> {
    let symbols = &live.kernel.symbols;
    let (start, len, size) = match (symbols.unique(start), symbols.unique(stop)) {
        (Some(start), Some(stop)) => {
            let len = stop.0.saturating_sub(start.0).min(TABLE_BYTES_MAX);
            (start, len, live.kernel.btf.structure(entry)?.size().max(4))
        }
        _ => (Gva(0), 0, 4),
    };
    let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
    live.read(start, &mut bytes).map_err(|source| KernelError::Unreadable {
        what,
        at: start,
        source,
    })?;
    let step = usize::try_from(size).unwrap_or(usize::MAX);
    let count = bytes.len() / step;
    Ok((0..count).filter_map(move |index| {
        let offset = i32::from_le_bytes(bytes.get(index * step..index * step + 4)?.try_into().ok()?);
        Some(
            start
                .wrapping_add((index * step) as u64)
                .wrapping_offset(i64::from(offset)),
        )
    }))
}

/// The addresses of all kprobes. A kernel without kprobes has none.
fn kprobes(live: &Live<'_>) -> Result<Vec<Gva>, KernelError> {
    let Some(table) = live.kernel.symbols.unique("kprobe_table") else {
        return Ok(Vec::new());
    };
    let probe = live.kernel.btf.structure("kprobe")?;
    let (node, addr) = (probe.offset("hlist")?, probe.offset("addr")?);
    let mut sites = Vec::new();
    let mut walker = Walker::new(live);
    for bucket in 0..KPROBE_BUCKETS {
        for at in walker.hlist("kprobe_table", table.wrapping_add(8 * bucket), node)? {
            let at = at.wrapping_add(addr);
            sites.push(Gva(live.read_u64(at).map_err(|source| KernelError::Unreadable {
                what: "kprobe",
                at,
                source,
            })?));
        }
    }
    Ok(sites)
}
