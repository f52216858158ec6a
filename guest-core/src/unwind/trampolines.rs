//! ftrace's own trampolines: copies of `ftrace_caller` or `ftrace_regs_caller`, one for each user of ftrace.
//!
//! They have no ORC table; the one of the code that they are a copy of fits (kernel: `orc_ftrace_find` in
//! arch/x86/kernel/unwind_orc.c, `create_trampoline` in arch/x86/kernel/ftrace.c).

use super::error::SetupError;
use super::view::KernelView;
use crate::addr::Gva;
use std::ops::Range;

/// More users of ftrace than any guest has.
const OPS_MAX: usize = 4096;
/// The flag of users that get all registers, include/linux/ftrace.h.
const SAVE_REGS: &str = "FTRACE_OPS_FL_SAVE_REGS";

/// One trampoline.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Trampoline {
    pub text: Range<Gva>,
    copy_of: Range<Gva>,
}

impl Trampoline {
    /// The place in the original code that `at` is a copy of. Behind the copy a return is put, as it stands behind
    /// the part of the original that is copied. `None` for the data after that.
    pub fn original(&self, at: Gva) -> Option<Gva> {
        let original = self.copy_of.start.checked_add(at.checked_sub(self.text.start)?)?;
        (original <= self.copy_of.end).then_some(original)
    }
}

/// Reads the list `ftrace_ops_list`, sorted by address. Empty for a kernel without ftrace, or with one that does not
/// tell the size of its trampolines.
pub(super) fn read(view: &dyn KernelView) -> Result<Vec<Trampoline>, SetupError> {
    let what = "the list of ftrace users";
    let (Some(head), Some(end)) = (view.symbol("ftrace_ops_list"), view.symbol("ftrace_list_end")) else {
        return Ok(Vec::new());
    };
    let (Some(plain), Some(regs)) = (
        view.symbol_range("ftrace_caller"),
        view.symbol_range("ftrace_regs_caller"),
    ) else {
        return Ok(Vec::new());
    };
    // the symbols within them end the range before their own end; where they lack, less is understood
    let whole = |name: &str, end: Gva| view.symbol(name).unwrap_or(end);
    let plain = plain.start..whole("ftrace_caller_end", plain.end);
    let regs = regs.start..whole("ftrace_regs_caller_end", regs.end);
    let ops = view.btf().structure("ftrace_ops")?;
    let (Some(start), Some(size)) = (ops.try_member("trampoline"), ops.try_member("trampoline_size")) else {
        return Ok(Vec::new());
    };
    let (next, flags) = (ops.offset("next")?, ops.offset("flags")?);
    let save_regs = view.btf().enumerator(SAVE_REGS)?.cast_unsigned();
    let word = |at: Gva| {
        view.read_u64(at)
            .map_err(|source| SetupError::Unreadable { what, at, source })
    };
    let mut found = Vec::new();
    let mut at = Gva(word(head)?);
    for _ in 0..OPS_MAX {
        if at == end || at == Gva(0) {
            found.sort_by_key(|trampoline: &Trampoline| trampoline.text.start);
            return Ok(found);
        }
        let (text, size) = (
            Gva(word(at.wrapping_add(start.offset()))?),
            word(at.wrapping_add(size.offset()))?,
        );
        let copy_of = if word(at.wrapping_add(flags))? & save_regs != 0 {
            &regs
        } else {
            &plain
        };
        if let Some(end) = text.checked_add(size)
            && text != Gva(0)
            && size != 0
        {
            found.push(Trampoline {
                text: text..end,
                copy_of: copy_of.clone(),
            });
        }
        at = Gva(word(at.wrapping_add(next))?);
    }
    let (found, expected) = (format!("more than {OPS_MAX}"), "an end".to_owned());
    Err(SetupError::NotUnderstood { what, found, expected })
}
