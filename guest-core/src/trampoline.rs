//! The code by which a task in transition chooses between the old and the new code of a function.
//!
//! While a patch is in transition, the jump of each of its functions leads to a trampoline. A task with the [`Mark`] goes on in the code that it
//! was in, any other one in the code that it is to be in. For an apply:
//!
//! ```text
//! mov  %gs:current, %r11
//! cmpl $0, patch_state(%r11)
//! jne  new
//! jmp  old
//! ```
//!
//! For a revert, the number is 1, and the two jumps change places.
//!
//! R11 and the flags are dead at the entry of a function (System V ABI for x86-64), but a compiler that knows the function could keep a value
//! in R11 across a call of it (`-fipa-ra`). GCC does not where it compiles for ftrace (`-pg`), so only functions with an ftrace site get a trampoline. It is a leaf that
//! leaves the stack alone: all of it has the ORC entry of a function's first instruction.

use crate::addr::Gva;
use crate::kernel::patch_state::Mark;
use crate::redirect::{RedirectError, jump_bytes};

/// Bytes of a trampoline, with filler.
pub(crate) const TRAMPOLINE_BYTES: u64 = 32;
/// Its instructions: the load of `current`, the comparison, and two jumps.
const LOAD: [u8; 5] = [0x65, 0x4c, 0x8b, 0x1c, 0x25];
const COMPARE: [u8; 3] = [0x41, 0x83, 0xbb];
const JUMP_IF_NOT_EQUAL: u8 = 0x0f;
const NOT_EQUAL: u8 = 0x85;
const FILLER: u8 = 0xcc;

/// What trampolines read of a task.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct TaskAccess {
    /// Per-CPU address of `current`.
    current: i32,
    /// Offset of `patch_state` in `struct task_struct`.
    state: i32,
}

impl TaskAccess {
    /// `current`: its per-CPU symbol's address; `state`: the offset of `patch_state`. `None` where an instruction cannot hold one of them.
    pub fn new(current: Gva, state: u64) -> Option<Self> {
        Some(Self {
            current: i32::try_from(current.0.cast_signed()).ok()?,
            state: i32::try_from(state).ok()?,
        })
    }
}

/// The trampoline at `at` of the function `name`, whose code is at `old` and `new`.
pub(crate) fn trampoline(
    name: &str,
    at: Gva,
    task: TaskAccess,
    mark: Mark,
    (old, new): (Gva, Gva),
) -> Result<Vec<u8>, RedirectError> {
    let (marked, unmarked) = match mark {
        Mark::Old => (old, new),
        Mark::New => (new, old),
    };
    let mut code = Vec::with_capacity(TRAMPOLINE_BYTES as usize);
    code.extend(LOAD);
    code.extend(task.current.to_le_bytes());
    code.extend(COMPARE);
    code.extend(task.state.to_le_bytes());
    code.push((mark as u32).to_le_bytes()[0]);
    code.push(JUMP_IF_NOT_EQUAL);
    // The second byte of the conditional jump takes the place of the opcode of the jump: both are followed by the distance.
    let [_, distance @ ..] = jump_bytes(name, at.wrapping_add(code.len() as u64), unmarked)?;
    code.push(NOT_EQUAL);
    code.extend(distance);
    code.extend(jump_bytes(name, at.wrapping_add(code.len() as u64), marked)?);
    code.resize(TRAMPOLINE_BYTES as usize, FILLER);
    Ok(code)
}

#[cfg(test)]
mod tests {
    use super::*;
    use iced_x86::{Code, Decoder, DecoderOptions, Register};

    #[test]
    fn a_trampoline_reads_the_task_and_jumps_to_either_code() {
        let task = TaskAccess::new(Gva(0xffff_ffff_8300_1180), 0x163c).unwrap();
        let (old, new) = (Gva(0xffff_ffff_8100_1009), Gva(0xffff_ffff_fe00_2000));
        let at = Gva(0xffff_ffff_fe00_1fe0);
        for (mark, number, unmarked, marked) in [(Mark::Old, 0, new, old), (Mark::New, 1, old, new)] {
            let code = trampoline("f", at, task, mark, (old, new)).unwrap();
            assert_eq!(code.len() as u64, TRAMPOLINE_BYTES);
            let decoder = Decoder::with_ip(64, &code[..28], at.0, DecoderOptions::NONE);
            let all = decoder.into_iter().collect::<Vec<_>>();
            let [load, compare, if_not_equal, else_jump] = all.try_into().unwrap();
            assert_eq!((load.code(), load.op0_register()), (Code::Mov_r64_rm64, Register::R11));
            assert_eq!(
                (load.segment_prefix(), load.memory_displacement64()),
                (Register::GS, 0xffff_ffff_8300_1180)
            );
            assert_eq!(
                (compare.code(), compare.memory_base()),
                (Code::Cmp_rm32_imm8, Register::R11)
            );
            assert_eq!(
                (compare.memory_displacement64(), compare.immediate8()),
                (0x163c, number)
            );
            assert_eq!(
                (if_not_equal.code(), if_not_equal.near_branch_target()),
                (Code::Jne_rel32_64, unmarked.0)
            );
            assert_eq!(
                (else_jump.code(), else_jump.near_branch_target()),
                (Code::Jmp_rel32_64, marked.0)
            );
            assert_eq!(code[28..], [FILLER; 4]);
        }
    }

    #[test]
    fn an_address_that_no_instruction_can_hold_is_refused() {
        assert_eq!(TaskAccess::new(Gva(0x8000_0000), 0), None);
        assert_eq!(TaskAccess::new(Gva(0), 1 << 31), None);
    }
}
