//! Redirects an old function to the new one: with a jump in its ftrace site, or behind it.

use crate::addr::{Gpa, Gva};
use crate::change::Change;
use crate::kernel::ftrace::{self, ENDBR_BYTES};
use crate::kernel::livepatch::Held;
use crate::kernel::{KernelError, Live, nops, sites};
use crate::memory::VirtMemory;
use crate::registry::Redirect;

/// Bytes of `jmp rel32`, of a call and of a site's NOP.
pub(crate) const JUMP_BYTES: u64 = 5;
/// `endbr64`, and the `nopl -42(%rax)` that a sealed one becomes (arch/x86/include/asm/ibt.h, since 5.18).
const ENDBRS: [[u8; 4]; 2] = [[0xf3, 0x0f, 0x1e, 0xfa], [0x0f, 0x1f, 0x40, 0xd6]];

/// Why a function cannot be redirected. Nothing was changed.
#[derive(Debug, thiserror::Error)]
pub enum RedirectError {
    /// The kernel's tables cannot be read.
    #[error("reading what the kernel says of {name}")]
    Kernel {
        /// The function.
        name: String,
        /// Why.
        source: Box<KernelError>,
    },
    /// A livepatch of the guest's own redirects the function.
    #[error(
        "{name} at {at} is already held by {livepatch}, a livepatch of the guest's own; its tenant must disable that one first"
    )]
    OwnLivepatch {
        /// The function.
        name: String,
        /// Its address.
        at: Gva,
        /// The livepatch's module.
        livepatch: String,
    },
    /// The function is too short for the jump.
    #[error("{name} at {at} has {len} bytes, too short to redirect: the jump needs {needed}")]
    TooShort {
        /// The function.
        name: String,
        /// Its address.
        at: Gva,
        /// Length of the function in bytes, up to the next symbol.
        len: u64,
        /// Bytes up to the end of the jump.
        needed: u64,
    },
    /// The kernel itself rewrites the bytes that the jump would take.
    #[error("{name} at {at}: {what} is in the bytes that the jump would take")]
    Rewritten {
        /// The function.
        name: String,
        /// Its address.
        at: Gva,
        /// What the kernel rewrites there.
        what: String,
    },
    /// The site holds neither the NOP nor a call of ftrace.
    #[error("{name}: its ftrace site {at} holds {found}, expected the NOP {expected}")]
    Foreign {
        /// The function.
        name: String,
        /// Guest-virtual address of the site.
        at: Gva,
        /// Its bytes in hex.
        found: String,
        /// The guest's NOP in hex.
        expected: String,
    },
    /// The record of the patch that holds the function has no jump for it.
    #[error("{name}: the record of {id}, which holds it, has {found} for its jump")]
    NoJump {
        /// The function.
        name: String,
        /// The patch.
        id: String,
        /// The bytes of the record in hex.
        found: String,
    },
    /// The new function is further away than a jump reaches.
    #[error("{name}: from {from} to {to} is further than a 32-bit jump reaches")]
    Distance {
        /// The function.
        name: String,
        /// Guest-virtual address of the jump.
        from: Gva,
        /// Guest-virtual address of the new function.
        to: Gva,
    },
}

/// Plans to redirect the function `name`, `len` bytes at `at`, to `new`. `held` are the functions that livepatches of the guest's own replace.
///
/// # Errors
///
/// The function cannot be redirected.
pub fn redirect(
    live: &Live<'_>,
    name: &str,
    at: Gva,
    len: u64,
    new: Gva,
    held: &[Held],
) -> Result<(Redirect, Vec<Change>), RedirectError> {
    let kernel = |source| RedirectError::Kernel {
        name: name.to_owned(),
        source: Box::new(source),
    };
    require_no_livepatch(name, at, held)?;
    let record = ftrace::record(live, at).map_err(kernel)?;
    if let Some(record) = record.filter(|record| !record.is_held()) {
        let bytes = read5(live, record.site).map_err(kernel)?;
        let nop = nops::in_sites(live, live.kernel.symbols.unique(nops::IDEAL_NOPS)).map_err(kernel)?;
        if bytes != nop {
            return Err(RedirectError::Foreign {
                name: name.to_owned(),
                at: record.site,
                found: crate::change::hex::encode(&bytes),
                expected: crate::change::hex::encode(&nop),
            });
        }
        let mut changes = jump(live, name, record.site, new, &bytes)?;
        if !record.is_disabled() {
            changes.push(disable(live, name, &record).map_err(kernel)?);
        }
        return Ok((Redirect::Ftrace, changes));
    }
    let entry = record.map_or_else(|| behind_endbr(live, at).map_err(kernel), |record| Ok(record.site))?;
    let from = if record.is_some() {
        entry.wrapping_add(JUMP_BYTES)
    } else {
        entry
    };
    let to = from.wrapping_add(JUMP_BYTES);
    let needed = to.0.wrapping_sub(at.0);
    if needed > len {
        return Err(RedirectError::TooShort {
            name: name.to_owned(),
            at,
            len,
            needed,
        });
    }
    if let Some(what) = sites::rewritten_in(live, &(from..to)).map_err(kernel)? {
        return Err(RedirectError::Rewritten {
            name: name.to_owned(),
            at,
            what,
        });
    }
    let bytes = read5(live, from).map_err(kernel)?;
    Ok((Redirect::Body, jump(live, name, from, new, &bytes)?))
}

/// Plans to set the disabled bit in `dyn_ftrace.flags`. Without it, the guest's own tracing would find the jump in the site, warn, and turn
/// ftrace off for good.
fn disable(live: &Live<'_>, name: &str, record: &ftrace::FtraceRecord) -> Result<Change, KernelError> {
    let bit = u64::from(record.meaning.disabled.trailing_zeros());
    let at = record.flags_at.wrapping_add(bit / 8);
    let (gpa, _) = physical(live, at)?;
    Ok(Change::set_bits(format!("ftrace flags of {name}"), gpa, 1 << (bit % 8)).of_data())
}

/// The address behind the `endbr64` at `at`, which indirect calls need; `at` if there is none.
fn behind_endbr(live: &Live<'_>, at: Gva) -> Result<Gva, KernelError> {
    let bytes = read5(live, at)?;
    Ok(if ENDBRS.iter().any(|endbr| bytes.starts_with(endbr)) {
        at.wrapping_add(ENDBR_BYTES)
    } else {
        at
    })
}

/// The jump of the function `name` from `from` to `to`: `jmp rel32`.
pub(crate) fn jump_bytes(name: &str, from: Gva, to: Gva) -> Result<[u8; 5], RedirectError> {
    let distance = to.0.wrapping_sub(from.0.wrapping_add(JUMP_BYTES)).cast_signed();
    let distance = i32::try_from(distance).map_err(|_| RedirectError::Distance {
        name: name.to_owned(),
        from,
        to,
    })?;
    let [a, b, c, d] = distance.to_le_bytes();
    Ok([0xe9, a, b, c, d])
}

/// Refuses a function that a livepatch of the guest's own, one of `held`, replaces.
pub(crate) fn require_no_livepatch(name: &str, at: Gva, held: &[Held]) -> Result<(), RedirectError> {
    match Held::last_of(held, at) {
        None => Ok(()),
        Some(held) => Err(RedirectError::OwnLivepatch {
            name: name.to_owned(),
            at,
            livepatch: held.livepatch.clone(),
        }),
    }
}

/// The jump, as one change, or as two if it crosses a page boundary: the pages of a module may be anywhere in physical memory.
fn jump(live: &Live<'_>, name: &str, from: Gva, to: Gva, old: &[u8; 5]) -> Result<Vec<Change>, RedirectError> {
    let new = jump_bytes(name, from, to)?;
    let kernel = |source| RedirectError::Kernel {
        name: name.to_owned(),
        source: Box::new(source),
    };
    let (gpa, contiguous) = physical(live, from).map_err(kernel)?;
    let first = usize::try_from(contiguous.clamp(1, JUMP_BYTES)).unwrap_or(old.len());
    let ((old_front, old_rest), (new_front, new_rest)) = (old.split_at(first), new.split_at(first));
    let fragment =
        |gpa, old: &[u8], new: &[u8]| Change::replace(format!("jump of {name}"), gpa, old.into(), new.into());
    let mut changes = vec![fragment(gpa, old_front, new_front)];
    if !old_rest.is_empty() {
        let (gpa, _) = physical(live, from.wrapping_add(first as u64)).map_err(kernel)?;
        changes.push(fragment(gpa, old_rest, new_rest));
    }
    Ok(changes)
}

fn read5(live: &Live<'_>, at: Gva) -> Result<[u8; 5], KernelError> {
    let mut bytes = [0; 5];
    let what = "a function's entry";
    live.read(at, &mut bytes)
        .map_err(|source| KernelError::Unreadable { what, at, source })?;
    Ok(bytes)
}

fn physical(live: &Live<'_>, at: Gva) -> Result<(Gpa, u64), KernelError> {
    live.physical(at).map_err(|source| KernelError::Unreadable {
        what: "a function's entry",
        at,
        source,
    })
}
