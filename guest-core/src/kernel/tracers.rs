//! The tracers of the guest: its registered `ftrace_ops`, and the functions that each of them wants.
//!
//! `ftrace_ops_list` → `ftrace_ops.next` … `ftrace_list_end` (kernel/trace/ftrace.c); `ftrace_ops.func_hash` →
//! `ftrace_ops_hash`: a filter, which is empty if all functions are wanted, and exceptions (include/linux/ftrace.h, since
//! 3.18). Both are `ftrace_hash` (kernel/trace/trace.h): `1 << size_bits` buckets of `ftrace_func_entry`.

use super::list::Walker;
use super::{KernelError, Live, ftrace};
use crate::addr::Gva;
use crate::memory::VirtMemory;

/// Most registered `ftrace_ops` that are walked. A guest has a handful.
const OPS_MAX: usize = 1 << 8;
/// Largest `size_bits`: `FTRACE_HASH_MAX_BITS` is 12 in kernel/trace/ftrace.c (5.10 to 6.12).
const SIZE_BITS_MAX: u64 = 12;
/// Bytes of a bucket: an `hlist_head`.
const BUCKET_BYTES: u64 = 8;

/// True if a tracer wants the function whose ftrace site is at `site`. A kernel without a list of `ftrace_ops` was built without tracers.
///
/// When a tracer registers, unregisters or changes its filter, one of the pointers that lead to it changes: the kernel replaces an
/// `ftrace_hash` in use, and does not change it (`ftrace_hash_move`, kernel/trace/ftrace.c).
///
/// # Errors
///
/// The list of `ftrace_ops` cannot be read.
pub fn is_wanted(live: &Live<'_>, site: Gva) -> Result<bool, KernelError> {
    let Some(mut link) = live.kernel.symbol_of_feature("ftrace_ops_list")? else {
        return Ok(false);
    };
    let live = &live.that_changes_when(ftrace::CHANGING);
    let btf = &live.kernel.btf;
    let ops = btf.structure("ftrace_ops")?;
    let end = live.kernel.symbol("ftrace_list_end")?;
    let mut walker = Walker::new(&live.constant());
    let mut wanted = false;
    let pointer = |at| word(live, at).map(Gva);
    for _ in 0..OPS_MAX {
        let op = pointer(link)?;
        if op == end || op.0 == 0 {
            return Ok(wanted);
        }
        link = op.wrapping_add(ops.offset("next")?);
        let both = pointer(op.wrapping_add(ops.offset("func_hash")?))?;
        let hashes = btf.structure("ftrace_ops_hash")?;
        let filter = pointer(both.wrapping_add(hashes.offset("filter_hash")?))?;
        let except = pointer(both.wrapping_add(hashes.offset("notrace_hash")?))?;
        let in_filter = matches!(contains(live, &mut walker, filter, site)?, None | Some(true));
        wanted |= in_filter && contains(live, &mut walker, except, site)? != Some(true);
    }
    Err(KernelError::Disagrees {
        what: "the list of ftrace_ops",
        found: format!("more than {OPS_MAX}"),
        expected: "an end".to_owned(),
    })
}

/// True if an `ftrace_hash` holds an address; `None` if the hash is empty.
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
            if word(&live.constant(), at.wrapping_add(ip))? == site.0 {
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
