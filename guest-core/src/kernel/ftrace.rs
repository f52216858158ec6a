//! The guest's ftrace records: the site of each function, and whether the guest uses it.
//!
//! `struct ftrace_page` and `struct dyn_ftrace` (kernel/trace/ftrace.c, include/linux/ftrace.h; the record is address,
//! flags, arch since 2.6.28). Records of one page group are sorted by address.

use super::{KernelError, Live};
use crate::addr::Gva;
use crate::btf::Btf;
use crate::memory::VirtMemory;

/// Most page groups that are walked. A kernel has a few hundred.
const GROUPS_MAX: usize = 1 << 16;
/// Most records of a group.
const RECORDS_MAX: u32 = 1 << 20;
/// Bytes of `endbr64`, or of the NOP that a sealed one becomes, in front of the site.
pub const ENDBR_BYTES: u64 = 4;

/// What the guest is doing when it changes its records or the counts in them.
pub const CHANGING: &str = "changing what it traces, or loading or unloading modules";

/// Bits of `dyn_ftrace.flags` that count its users: the low 19 or more (`FTRACE_REF_MAX_SHIFT`, include/linux/ftrace.h, up to
/// 7.2). No record has more users than these can count.
const USERS: u64 = 0xffff;

/// Bits of `dyn_ftrace.flags`, as the guest's kernel numbers them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Meaning {
    /// `FTRACE_FL_ENABLED`: the site holds a call.
    pub enabled: u64,
    /// `FTRACE_FL_DISABLED`: ftrace leaves the record alone.
    pub disabled: u64,
    /// `FTRACE_FL_IPMODIFY`: a user of ftrace redirects the function.
    pub ip_modify: u64,
}

impl Meaning {
    /// Looks up the bits in this kernel's types.
    pub fn of(btf: &Btf) -> Result<Self, KernelError> {
        let flag = |name| match btf.enumerator(name)?.cast_unsigned() {
            flag if flag.is_power_of_two() => Ok(flag),
            flag => Err(KernelError::Disagrees {
                what: name,
                found: format!("{flag:#x}"),
                expected: "one bit".to_owned(),
            }),
        };
        Ok(Self {
            enabled: flag("FTRACE_FL_ENABLED")?,
            disabled: flag("FTRACE_FL_DISABLED")?,
            ip_modify: flag("FTRACE_FL_IPMODIFY")?,
        })
    }

    /// True if a tracer, kprobe, BPF program or livepatch of the guest uses a site with these flags, or would use it if tracing were not
    /// switched off (`kernel.ftrace_enabled`).
    pub fn is_held(&self, flags: u64) -> bool {
        flags & (self.enabled | USERS) != 0
    }
}

/// One function's record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FtraceRecord {
    /// Guest-virtual address of the site: of the 5-byte NOP or call.
    pub site: Gva,
    /// Guest-virtual address of `dyn_ftrace.flags`.
    pub flags_at: Gva,
    /// Value of `dyn_ftrace.flags`.
    pub flags: u64,
    /// The meaning of its bits.
    pub meaning: Meaning,
}

impl FtraceRecord {
    /// True if the guest uses the site: see [`Meaning::is_held`].
    pub fn is_held(&self) -> bool {
        self.meaning.is_held(self.flags)
    }

    /// True if the record is disabled: ftrace leaves the site alone.
    pub fn is_disabled(&self) -> bool {
        self.flags & self.meaning.disabled != 0
    }
}

/// Finds the record of the function at `function`. Its site is at the entry, or behind the `endbr64` there. `None` for a function without a
/// record (notrace).
///
/// # Errors
///
/// The records cannot be read.
pub fn record(live: &Live<'_>, function: Gva) -> Result<Option<FtraceRecord>, KernelError> {
    let what = "ftrace record";
    let btf = &live.kernel.btf;
    let (group, record) = (btf.structure("ftrace_page")?, btf.structure("dyn_ftrace")?);
    let (next, records, index) = (group.offset("next")?, group.offset("records")?, group.offset("index")?);
    let (ip, flags, size) = (record.offset("ip")?, record.offset("flags")?, record.size());
    let meaning = Meaning::of(btf)?;
    let start = live.kernel.symbol("ftrace_pages_start")?;
    let live = &live.that_changes_when(CHANGING);
    let read = |at: Gva| {
        live.read_u64(at)
            .map_err(|source| KernelError::Unreadable { what, at, source })
    };
    let mut at = Gva(read(start)?);
    for _ in 0..GROUPS_MAX {
        if at.0 == 0 {
            return Ok(None);
        }
        let first = Gva(read(at.wrapping_add(records))?);
        let index_at = at.wrapping_add(index);
        let count = live
            .read_u32(index_at)
            .map_err(|source| KernelError::Unreadable {
                what,
                at: index_at,
                source,
            })?
            .min(RECORDS_MAX);
        let entry = |n: u32| first.wrapping_add(u64::from(n) * size);
        // Most groups are of other functions: the kernel fills groups in the order of addresses.
        let site = |n: u32| {
            let at = entry(n).wrapping_add(ip);
            let read = live.constant().read_u64(at);
            read.map_err(|source| KernelError::Unreadable { what, at, source })
        };
        let is_here = count > 0 && site(count - 1)? >= function.0 && site(0)? <= function.0.saturating_add(ENDBR_BYTES);
        let (mut low, mut high) = (0, if is_here { count } else { 0 });
        while low < high {
            let middle = low + (high - low) / 2;
            match site(middle)? < function.0 {
                true => low = middle + 1,
                false => high = middle,
            }
        }
        if is_here && low < count {
            let site = Gva(site(low)?);
            if site == function || site == function.wrapping_add(ENDBR_BYTES) {
                let flags_at = entry(low).wrapping_add(flags);
                return Ok(Some(FtraceRecord {
                    site,
                    flags_at,
                    flags: read(flags_at)?,
                    meaning,
                }));
            }
        }
        at = Gva(read(at.wrapping_add(next))?);
    }
    Err(KernelError::Disagrees {
        what: "the chain of ftrace page groups",
        found: format!("more than {GROUPS_MAX}"),
        expected: "an end".to_owned(),
    })
}
