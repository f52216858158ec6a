//! The sites in the text of the kernel and of its modules that the kernel itself rewrites at run time: jump labels, static calls, kprobes,
//! and lock prefixes (while it runs on one CPU and may get more).

use super::list::Walker;
use super::{KernelError, Live, modules};
use crate::addr::Gva;
use crate::memory::VirtMemory;
use std::ops::Range;

/// Longest site: a call or jump with its operand.
const SITE_BYTES: u64 = 5;
/// Most bytes of a table of sites that are read.
const TABLE_BYTES_MAX: u64 = 16 << 20;
/// The list of tables of lock prefixes.
const LOCK_LISTS: &str = "smp_alt_modules";
/// Buckets of `kprobe_table` (`KPROBE_HASH_BITS` is 6 in kernel/kprobes.c).
const KPROBE_BUCKETS: u64 = 64;

/// A table of sites: the name of its sites, the symbols at its ends, its members in `struct module`, and the type of its entries.
const TABLES: [(&str, [&str; 2], [&str; 2], &str); 2] = [
    (
        "jump label",
        ["__start___jump_table", "__stop___jump_table"],
        ["jump_entries", "num_jump_entries"],
        "jump_entry",
    ),
    (
        "static call",
        ["__start_static_call_sites", "__stop_static_call_sites"],
        ["static_call_sites", "num_static_call_sites"],
        "static_call_site",
    ),
];

/// The kind of site that the kernel rewrites in `range`, which is code of the kernel or of a module; `None` if there is none.
///
/// # Errors
///
/// The tables of sites cannot be read.
pub fn rewritten_in(live: &Live<'_>, range: &Range<Gva>) -> Result<Option<String>, KernelError> {
    let module = match live.kernel.image.segment(range.start) {
        Some(_) => None,
        None => modules::containing(live, range.start)?,
    };
    for (what, ends, members, row) in TABLES {
        let table = match &module {
            None => image_table(live, ends),
            Some(module) => module_table(live, what, module.at, members, row)?,
        };
        // A kernel without the table has no such sites.
        let Some((start, len)) = table else { continue };
        let row_bytes = live.kernel.btf.structure(row)?.size();
        if let Some(site) = place_relative(live, what, start, len, row_bytes)?.find(|site| overlaps(*site, range)) {
            return Ok(Some(format!("a {what} at {site}")));
        }
    }
    if let Some(site) = lock_prefixes(live)?.into_iter().find(|site| range.contains(site)) {
        return Ok(Some(format!("a lock prefix at {site}")));
    }
    let probe = kprobes(live)?.into_iter().find(|site| overlaps(*site, range));
    Ok(probe.map(|site| format!("a kprobe at {site}")))
}

/// Address and length in bytes of a table of the kernel image.
fn image_table(live: &Live<'_>, [start, stop]: [&str; 2]) -> Option<(Gva, u64)> {
    let symbols = &live.kernel.symbols;
    let (start, stop) = (symbols.unique(start)?, symbols.unique(stop)?);
    Some((start, stop.0.saturating_sub(start.0)))
}

/// Address and length in bytes of a table of a module.
fn module_table(
    live: &Live<'_>,
    what: &'static str,
    module: Gva,
    [start, count]: [&str; 2],
    row: &str,
) -> Result<Option<(Gva, u64)>, KernelError> {
    let live = &live.constant();
    let layout = live.kernel.btf.structure("module")?;
    let (Some(start), Some(count)) = (layout.try_member(start), layout.try_member(count)) else {
        return Ok(None);
    };
    let (start, count) = (module.wrapping_add(start.offset()), module.wrapping_add(count.offset()));
    let unreadable = |at| move |source| KernelError::Unreadable { what, at, source };
    let rows = live.read_u32(count).map_err(unreadable(count))?;
    let start = Gva(live.read_u64(start).map_err(unreadable(start))?);
    let bytes = live.kernel.btf.structure(row)?.size().saturating_mul(rows.into());
    Ok(Some((start, bytes)))
}

/// The address of the first kprobe that the guest has set in `range`.
///
/// # Errors
///
/// The table of kprobes cannot be read.
pub fn probe_in(live: &Live<'_>, range: &Range<Gva>) -> Result<Option<Gva>, KernelError> {
    Ok(kprobes(live)?.into_iter().find(|site| range.contains(site)))
}

fn overlaps(site: Gva, range: &Range<Gva>) -> bool {
    site < range.end && site.wrapping_add(SITE_BYTES) > range.start
}

/// The addresses in a table whose entries start with a place-relative 32-bit offset to the code (include/linux/jump_label.h since
/// 4.19, static_call_types.h since 5.10; arch/x86/kernel/alternative.c).
fn place_relative(
    live: &Live<'_>,
    what: &'static str,
    start: Gva,
    len: u64,
    row_bytes: u64,
) -> Result<impl Iterator<Item = Gva> + use<>, KernelError> {
    let len = len.min(TABLE_BYTES_MAX);
    let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
    live.constant()
        .read(start, &mut bytes)
        .map_err(|source| KernelError::Unreadable {
            what,
            at: start,
            source,
        })?;
    let step = usize::try_from(row_bytes.max(4)).unwrap_or(usize::MAX);
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

/// The lock prefixes that the kernel may still write or remove: `smp_alt_modules` lists their tables, of the kernel and its modules, while it
/// runs on one CPU only (arch/x86/kernel/alternative.c, 5.10 to 7.2).
fn lock_prefixes(live: &Live<'_>) -> Result<Vec<Gva>, KernelError> {
    let Some(head) = live.kernel.symbol_of_feature(LOCK_LISTS)? else {
        return Ok(Vec::new());
    };
    let live = &live.that_changes_when(modules::CHANGING);
    let entry = live.kernel.btf.structure("smp_alt_module")?;
    let (node, first, end) = (
        entry.offset("next")?,
        entry.offset("locks")?,
        entry.offset("locks_end")?,
    );
    let mut sites = Vec::new();
    for at in Walker::new(live).list(LOCK_LISTS, head, node)? {
        let word = |at: Gva| {
            let what = LOCK_LISTS;
            live.read_u64(at)
                .map_err(|source| KernelError::Unreadable { what, at, source })
        };
        let (start, end) = (word(at.wrapping_add(first))?, word(at.wrapping_add(end))?);
        sites.extend(place_relative(
            live,
            LOCK_LISTS,
            Gva(start),
            end.saturating_sub(start),
            4,
        )?);
    }
    Ok(sites)
}

/// The addresses of all kprobes. A kernel without kprobes has none.
fn kprobes(live: &Live<'_>) -> Result<Vec<Gva>, KernelError> {
    let live = &live.that_changes_when("setting kprobes");
    let Some(table) = live.kernel.symbol_of_feature("kprobe_table")? else {
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
