//! How livepatch keeps, for each task, whether the task runs old or new code: `task_struct.patch_state` and `TIF_PATCH_PENDING`
//! (kernel/livepatch/transition.c, since 4.12).
//!
//! A task whose flag is set gets `klp_target_state` as its `patch_state` when it returns to user mode, and its flag is cleared
//! (`klp_update_patch_state`, called from the exit to user mode and from the idle loop). Its children inherit both (`klp_copy_process`).
//! While no transition of the guest's own is under way, `klp_target_state` is `KLP_UNDEFINED`, and so is each task's `patch_state`. A transition of
//! vmpatch uses these two fields, and no others: a task is *marked* where its `patch_state` is a [`Mark`] and its flag is set. So the guest
//! itself takes the mark away from a task that returns to user mode.
//!
//! `klp_transition_patch` that is not null keeps the guest's own transitions out: `__klp_enable_patch` and `__klp_disable_patch` give EBUSY.
//! All other code of the kernel only compares it (kernel/livepatch/core.c; read in 5.10, 6.1, 6.12 and 7.2), but for
//! `klp_transition_work`, which must not be pending.
//!
//! The number of the flag is no constant: it is 13 up to 6.18 and 9 in 7.2. It is read from the code of `klp_update_patch_state`, which is compared
//! with the types.

use super::{INT, KernelError, Live};
use crate::addr::Gva;
use crate::memory::VirtMemory;
use iced_x86::{Code, Decoder, DecoderOptions, FlowControl, Instruction, OpKind, Register};
use std::fmt;

/// `KLP_UNDEFINED`, or `KLP_TRANSITION_IDLE` since 6.13: the task is in no transition.
pub(crate) const UNDEFINED: u32 = u32::MAX;
/// Most bytes of `klp_update_patch_state` that are read.
const CODE_BYTES_MAX: u64 = 128;
/// `WORK_STRUCT_PENDING_BIT` (include/linux/workqueue.h).
const WORK_PENDING: u64 = 1;
const UPDATE: &str = "klp_update_patch_state";

/// The code that a marked task runs while a patch is in transition; unmarked tasks run the other one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Mark {
    /// `KLP_UNPATCHED`: the old code. The patch is being applied.
    Old = 0,
    /// `KLP_PATCHED`: the new code. The patch is being reverted.
    New = 1,
}

impl fmt::Display for Mark {
    /// "old" or "new", as in "the old code".
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Old => "old",
            Self::New => "new",
        })
    }
}

/// Where this kernel keeps these fields. Offsets are of `struct task_struct`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PatchState {
    /// Offset of `patch_state`, an int.
    pub state: u64,
    /// Offset of the byte that holds the flag.
    pub pending: u64,
    /// The flag in that byte.
    pub pending_mask: u8,
    /// Guest-virtual address of `klp_transition_patch`, a pointer.
    pub owner: Gva,
}

/// Why this kernel's fields cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NoPatchState {
    /// The kernel has no livepatch.
    #[error(
        "the guest's kernel was built without livepatch (CONFIG_LIVEPATCH), which keeps for each task which code it runs"
    )]
    NoLivepatch,
    /// The code or types of livepatch are not those that are known.
    #[error("{what} of the guest's kernel is not understood: {found}")]
    NotUnderstood {
        /// What.
        what: &'static str,
        /// What was found.
        found: String,
    },
    /// A livepatch of the guest's own is in transition, or was a moment ago.
    #[error("a livepatch of the guest's own is in transition")]
    OwnTransition,
}

/// Finds the fields.
///
/// # Errors
///
/// The kernel cannot be read. Inner errors: it cannot be used.
pub fn find(live: &Live<'_>) -> Result<Result<PatchState, NoPatchState>, KernelError> {
    let (Some(update), Some(owner)) = (
        live.kernel.symbol_of_feature(UPDATE)?,
        live.kernel.symbol_of_feature("klp_transition_patch")?,
    ) else {
        return Ok(Err(NoPatchState::NoLivepatch));
    };
    let task = live.kernel.btf.structure("task_struct")?;
    let (Some(state), Some(flags)) = (task.try_member("patch_state"), task.try_member("thread_info.flags")) else {
        return Ok(Err(NoPatchState::NoLivepatch));
    };
    let decoded = decode(&code(live, update)?, update.0);
    let target = live.kernel.symbol_of_feature("klp_target_state")?;
    let is_known = |decoded: &Decoded| {
        (decoded.flags, decoded.state) == (flags.offset(), state.offset())
            && state.size == 4
            && decoded.bit < 8 * flags.size.min(8)
            && target.is_none_or(|target| target.0 == decoded.target)
    };
    let Some(decoded) = decoded.filter(is_known) else {
        return Ok(Err(NoPatchState::NotUnderstood {
            what: UPDATE,
            found: decoded.map_or_else(
                || "other instructions than those that clear a flag and store klp_target_state".to_owned(),
                |decoded| {
                    format!(
                        "{decoded:x?}, and by the types {:#x} and {:#x}",
                        flags.offset(),
                        state.offset()
                    )
                },
            ),
        }));
    };
    Ok(Ok(PatchState {
        state: state.offset(),
        pending: flags.offset().wrapping_add(decoded.bit / 8),
        pending_mask: 1 << (decoded.bit % 8),
        owner,
    }))
}

/// Finds the fields, and requires that no transition uses them.
///
/// # Errors
///
/// As [`find`].
pub fn find_unused(live: &Live<'_>) -> Result<Result<PatchState, NoPatchState>, KernelError> {
    let live = &live.that_changes_when("applying a livepatch of its own");
    let Ok(found) = find(live)? else { return find(live) };
    let (Some(target), Some(work)) = (
        live.kernel.symbol_of_feature("klp_target_state")?,
        live.kernel.symbol_of_feature("klp_transition_work")?,
    ) else {
        return Ok(Err(NoPatchState::NotUnderstood {
            what: "livepatch",
            found: "no klp_target_state or no klp_transition_work".to_owned(),
        }));
    };
    let word = |what, at| {
        live.read_u64(at)
            .map_err(|source| KernelError::Unreadable { what, at, source })
    };
    let is_idle = word("klp_transition_patch", found.owner)? == 0
        && word("klp_target_state", target)? & INT == u64::from(UNDEFINED)
        && word("klp_transition_work", work)? & WORK_PENDING == 0;
    Ok(is_idle.then_some(found).ok_or(NoPatchState::OwnTransition))
}

fn code(live: &Live<'_>, at: Gva) -> Result<Vec<u8>, KernelError> {
    let end = live.kernel.symbols.containing(at).map_or(at, |(_, next)| next);
    let len = end.0.saturating_sub(at.0).min(CODE_BYTES_MAX);
    let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
    let read = live.constant().read(at, &mut bytes);
    read.map_err(|source| KernelError::Unreadable {
        what: UPDATE,
        at,
        source,
    })?;
    Ok(bytes)
}

/// What the code of `klp_update_patch_state` tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Decoded {
    /// Offset of the word with the flag, and the flag's number in it.
    flags: u64,
    bit: u64,
    /// Offset that gets the state.
    state: u64,
    /// Guest-virtual address that the state comes from.
    target: u64,
}

/// Decodes code at `ip` that has the task in RDI: `lock btr $bit, flags(%rdi)`, then `mov target, %reg` and `mov %reg, state(%rdi)`.
fn decode(code: &[u8], ip: u64) -> Option<Decoded> {
    let mut instructions = Vec::new();
    for instruction in &mut Decoder::with_ip(64, code, ip, DecoderOptions::NONE) {
        if instruction.is_invalid() || instruction.flow_control() == FlowControl::Return {
            break;
        }
        instructions.push(instruction);
    }
    let of_task = |one: &Instruction| {
        one.memory_base() == Register::RDI
            && one.memory_index() == Register::None
            && one.segment_prefix() == Register::None
    };
    let mut clears = instructions.iter().enumerate().filter(|(_, one)| {
        matches!(one.code(), Code::Btr_rm64_imm8 | Code::Btr_rm32_imm8) && one.has_lock_prefix() && of_task(one)
    });
    let (at, clear) = clears.next()?;
    if clears.next().is_some() {
        return None;
    }
    let behind = instructions.get(at..)?;
    let load = behind.iter().position(|one| {
        one.code() == Code::Mov_r32_rm32 && one.op1_kind() == OpKind::Memory && one.is_ip_rel_memory_operand()
    })?;
    let (load, store) = (behind.get(load)?, behind.get(load + 1)?);
    let stores = store.code() == Code::Mov_rm32_r32 && store.op0_kind() == OpKind::Memory && of_task(store);
    (stores && store.op1_register() == load.op0_register()).then_some(Decoded {
        flags: clear.memory_displacement64(),
        bit: u64::from(clear.immediate8()),
        state: store.memory_displacement64(),
        target: load.ip_rel_memory_address(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// lock btr $9, (%rdi); jae; mov 0x100(%rip), %eax; mov %eax, 0x163c(%rdi); ret
    const CODE: [u8; 21] = [
        0xf0, 0x48, 0x0f, 0xba, 0x37, 9, 0x73, 0x0c, 0x8b, 5, 0, 1, 0, 0, 0x89, 0x87, 0x3c, 0x16, 0, 0, 0xc3,
    ];

    #[test]
    fn flag_and_fields_are_read_from_the_code() {
        let expected = Decoded {
            flags: 0,
            bit: 9,
            state: 0x163c,
            target: 0x1000 + 14 + 0x100,
        };
        assert_eq!(decode(&CODE, 0x1000), Some(expected));
    }

    #[test]
    fn other_code_is_not_understood() {
        for (at, byte) in [(0, 0x90), (4, 0x36), (8, 0x8d), (15, 0x97), (14, 0x8b), (20, 0)] {
            let mut code = CODE;
            code[at] = byte;
            let is_known = decode(&code, 0x1000).is_some();
            assert_eq!(is_known, at == 20, "byte {at}");
        }
        assert_eq!(decode(&[CODE, CODE].concat()[..20], 0), decode(&CODE, 0));
        assert_eq!(decode(&[&CODE[..20], &CODE[..]].concat(), 0), None, "two flags");
        assert_eq!(decode(&[], 0), None);
    }
}
