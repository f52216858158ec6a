//! The ftrace records of a patch's functions. With them, the guest can trace and probe the functions like those of any module.
//!
//! A group of records (`struct ftrace_page`) is appended to a chain: `ftrace_pages_start` points at its first group, `ftrace_pages` at its
//! last. The kernel's own loader adds a group for each module (`ftrace_process_locs`, kernel/trace/ftrace.c; 5.10, 6.1, 6.12, 7.2). The
//! kernel holds `ftrace_lock` while it changes or counts records.
//!
//! ftrace counts in each record how many tracers want it. A tracer that started before the record was added is not counted, and its end
//! would bring the count below zero. A record that such a tracer wants is therefore disabled (`FTRACE_FL_DISABLED`), like those of
//! patched functions.

use super::words::{WORD, Words, damaged, unreadable};
use crate::addr::Gva;
use crate::kernel::ftrace::{self, Meaning};
use crate::kernel::{KernelError, Live, tracers};
use crate::memory::VirtMemory;
use serde::{Deserialize, Serialize};

/// Most groups that are walked. A kernel has a few hundred.
const GROUPS_MAX: usize = 1 << 16;
/// Most sites of a patch.
const SITES_MAX: u64 = 1 << 16;

/// The group of a patch's records.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Traced {
    /// Guest-virtual address of its `struct ftrace_page`. The records follow it.
    pub group: u64,
    /// Number of records.
    pub sites: u64,
}

/// Where and how this kernel keeps its ftrace records.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Groups {
    group_bytes: u64,
    next: u64,
    records: u64,
    index: u64,
    record_bytes: u64,
    ip: u64,
    flags: u64,
    /// Guest-virtual addresses of the pointers to the first group and to the last.
    first: Gva,
    last: Gva,
}

impl Groups {
    /// Looks everything up; `None` for a kernel that was built without ftrace.
    pub fn find(live: &Live<'_>) -> Result<Option<Self>, KernelError> {
        let Some(last) = live.kernel.symbol_of_feature("ftrace_pages")? else {
            return Ok(None);
        };
        let btf = &live.kernel.btf;
        let (group, record) = (btf.structure("ftrace_page")?, btf.structure("dyn_ftrace")?);
        let (group_bytes, record_bytes) = (group.size(), record.size());
        if group_bytes % WORD != 0 || record_bytes % WORD != 0 || record_bytes < 2 * WORD {
            return Err(damaged(
                format!("ftrace records of {record_bytes} bytes in groups of {group_bytes}"),
                "records of an address and flags",
            ));
        }
        Ok(Some(Self {
            group_bytes,
            next: group.offset("next")?,
            records: group.offset("records")?,
            index: group.offset("index")?,
            record_bytes,
            ip: record.offset("ip")?,
            flags: record.offset("flags")?,
            first: live.kernel.symbol("ftrace_pages_start")?,
            last,
        }))
    }

    /// Size of a group with its records, in bytes.
    pub fn bytes(&self, sites: usize) -> u64 {
        match sites {
            0 => 0,
            some => (some as u64)
                .saturating_mul(self.record_bytes)
                .saturating_add(self.group_bytes),
        }
    }

    /// Fills the group for these sites, in ascending order, which will be at `at`, and adds it to the chain.
    pub fn add(&self, live: &Live<'_>, words: &mut Words<'_>, at: Gva, sites: &[Gva]) -> Result<(), KernelError> {
        let disabled = Meaning::of(&live.kernel.btf)?.disabled;
        let records = at.wrapping_add(self.group_bytes);
        let count = sites.len() as u64;
        words.set(at.wrapping_add(self.next), 0)?;
        words.set(at.wrapping_add(self.records), records.0)?;
        // `index` shares its word with the order of the pages that records otherwise have: 0.
        words.set(at.wrapping_add(self.index), count)?;
        for (index, site) in (0_u64..).zip(sites) {
            let record = records.wrapping_add(index.saturating_mul(self.record_bytes));
            let is_wanted = tracers::is_wanted(live, *site)?;
            words.set(record.wrapping_add(self.ip), site.0)?;
            words.set(record.wrapping_add(self.flags), if is_wanted { disabled } else { 0 })?;
        }
        let last = Gva(words.get(self.last)?);
        words.set(last.wrapping_add(self.next), at.0)?;
        words.set(self.last, at.0)
    }

    /// Removes a group from the chain. After half of an addition or removal, only the pointers that lead to the group are changed.
    pub fn remove(&self, words: &mut Words<'_>, group: Gva) -> Result<(), KernelError> {
        let mut at = self.first;
        for _ in 0..GROUPS_MAX {
            let next = Gva(words.get(at)?);
            if next == group {
                words.set(at, words.get(group.wrapping_add(self.next))?)?;
                continue;
            }
            if next.0 != 0 {
                at = next.wrapping_add(self.next);
                continue;
            }
            if words.get(self.last)? == group.0 {
                words.set(self.last, at.wrapping_offset(-self.next.cast_signed()).0)?;
            }
            return Ok(());
        }
        Err(damaged(
            format!("more than {GROUPS_MAX} groups of ftrace records"),
            "an end",
        ))
    }
}

impl Traced {
    /// The site of the first of the patch's functions that the guest traces or probes.
    pub fn in_use(&self, live: &Live<'_>) -> Result<Option<Gva>, KernelError> {
        let Some(groups) = Groups::find(live)? else {
            return Ok(None);
        };
        let live = live.that_changes_when(ftrace::CHANGING);
        let meaning = Meaning::of(&live.kernel.btf)?;
        let at = Gva(self.group).wrapping_add(groups.group_bytes);
        let len = self.sites.min(SITES_MAX).saturating_mul(groups.record_bytes);
        let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
        live.read(at, &mut bytes).map_err(|source| unreadable(at, source))?;
        let word = |record: &[u8], offset: u64| {
            let word = record.get(usize::try_from(offset).ok()?..)?.first_chunk()?;
            Some(u64::from_le_bytes(*word))
        };
        let mut records = bytes.chunks_exact(usize::try_from(groups.record_bytes).unwrap_or(usize::MAX));
        Ok(records.find_map(|record| {
            let (ip, flags) = (word(record, groups.ip)?, word(record, groups.flags)?);
            meaning.is_held(flags).then_some(Gva(ip))
        }))
    }
}
