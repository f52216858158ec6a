//! Who traces: the `ftrace_ops` that the guest has registered, and which functions each of them wants.
//!
//! `ftrace_ops_list` → `ftrace_ops.next` … `ftrace_list_end` (kernel/trace/ftrace.c); `ftrace_ops.func_hash` →
//! `ftrace_ops_hash`: a filter, which is empty where all functions are wanted, and exceptions (include/linux/ftrace.h, since
//! 3.18). Both are `ftrace_hash` (kernel/trace/trace.h): `1 << size_bits` buckets of `ftrace_func_entry`.

use super::list::Walker;
use super::{KernelError, Live};
use crate::addr::Gva;
use crate::memory::VirtMemory;

/// Registered `ftrace_ops` walked at the most: a guest has a handful.
const OPS_MAX: usize = 1 << 8;
/// `size_bits` at the most: `FTRACE_HASH_MAX_BITS` is 12 in kernel/trace/ftrace.c (5.10 to 6.12).
const SIZE_BITS_MAX: u64 = 12;
/// Bytes of a bucket: an `hlist_head`.
const BUCKET_BYTES: u64 = 8;

/// What was found: whether somebody wants to see a function, and what that was read from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tracers {
    /// True where a registered `ftrace_ops` wants the function.
    pub wanted: bool,
    /// The words that it depends on, each with its value: whoever registers, leaves or changes a filter changes one of them.
    pub words: Vec<(Gva, u64)>,
}

/// Finds out whether anybody wants to see the function whose ftrace site is at `site`. A kernel that has no list of
/// `ftrace_ops` was built without tracers.
pub fn of(live: &Live<'_>, site: Gva) -> Result<Tracers, KernelError> {
    let mut found = Tracers {
        wanted: false,
        words: Vec::new(),
    };
    let Some(mut link) = live.kernel.symbols.unique("ftrace_ops_list") else {
        return Ok(found);
    };
    let btf = &live.kernel.btf;
    let ops = btf.structure("ftrace_ops")?;
    let end = live.kernel.symbol("ftrace_list_end")?;
    let mut walker = Walker::new(live);
    for _ in 0..OPS_MAX {
        let op = found.pointer(live, link)?;
        if op == end || op.0 == 0 {
            return Ok(found);
        }
        link = op.wrapping_add(ops.offset("next")?);
        let both = found.pointer(live, op.wrapping_add(ops.offset("func_hash")?))?;
        let hashes = btf.structure("ftrace_ops_hash")?;
        let filter = found.pointer(live, both.wrapping_add(hashes.offset("filter_hash")?))?;
        let except = found.pointer(live, both.wrapping_add(hashes.offset("notrace_hash")?))?;
        let in_filter = matches!(contains(live, &mut walker, filter, site)?, None | Some(true));
        found.wanted |= in_filter && contains(live, &mut walker, except, site)? != Some(true);
    }
    Err(KernelError::Disagrees {
        what: "the list of ftrace_ops",
        found: format!("more than {OPS_MAX}"),
        expected: "an end".to_owned(),
    })
}

impl Tracers {
    /// Reads a pointer on which the answer depends.
    fn pointer(&mut self, live: &Live<'_>, at: Gva) -> Result<Gva, KernelError> {
        let value = word(live, at)?;
        self.words.push((at, value));
        Ok(Gva(value))
    }
}

/// Whether an `ftrace_hash` has an address; `None` where it is empty.
fn contains(live: &Live<'_>, walker: &mut Walker<'_>, hash: Gva, site: Gva) -> Result<Option<bool>, KernelError> {
    let btf = &live.kernel.btf;
    let (layout, entry) = (btf.structure("ftrace_hash")?, btf.structure("ftrace_func_entry")?);
    if hash.0 == 0 || word(live, hash.wrapping_add(layout.offset("count")?))? == 0 {
        return Ok(None);
    }
    let size_bits = word(live, hash.wrapping_add(layout.offset("size_bits")?))?;
    if size_bits > SIZE_BITS_MAX {
        return Err(KernelError::Disagrees {
            what: "ftrace_hash.size_bits",
            found: size_bits.to_string(),
            expected: format!("at most {SIZE_BITS_MAX}"),
        });
    }
    let buckets = Gva(word(live, hash.wrapping_add(layout.offset("buckets")?))?);
    let (node, ip) = (entry.offset("hlist")?, entry.offset("ip")?);
    for bucket in 0..1_u64 << size_bits {
        let head = buckets.wrapping_add(bucket * BUCKET_BYTES);
        for at in walker.hlist("ftrace_hash.buckets", head, node)? {
            if word(live, at.wrapping_add(ip))? == site.0 {
                return Ok(Some(true));
            }
        }
    }
    Ok(Some(false))
}

fn word(live: &Live<'_>, at: Gva) -> Result<u64, KernelError> {
    let what = "who traces";
    live.read_u64(at)
        .map_err(|source| KernelError::Unreadable { what, at, source })
}
