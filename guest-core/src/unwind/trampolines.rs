//! ftrace's own trampolines: copies of `ftrace_caller` or `ftrace_regs_caller`, one for each user of ftrace.
//!
//! They have no ORC table. The entries of the copied code apply (`orc_ftrace_find`, arch/x86/kernel/unwind_orc.c; `create_trampoline`,
//! arch/x86/kernel/ftrace.c).

use super::error::SetupError;
use super::view::KernelView;
use crate::addr::Gva;
use std::ops::Range;

/// Most users of ftrace in a guest.
const OPS_MAX: usize = 4096;
/// The flag of users that get all registers (include/linux/ftrace.h).
const SAVE_REGS: &str = "FTRACE_OPS_FL_SAVE_REGS";

/// One trampoline.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Trampoline {
    pub text: Range<Gva>,
    copy_of: Range<Gva>,
}

impl Trampoline {
    /// The address in the original code that `at` is a copy of. The copy ends with a return, as does the copied part of the original. `None` for
    /// the data behind the copy.
    pub fn original(&self, at: Gva) -> Option<Gva> {
        let original = self.copy_of.start.checked_add(at.checked_sub(self.text.start)?)?;
        (original <= self.copy_of.end).then_some(original)
    }
}

/// Where the list `ftrace_ops_list` is, and the offsets of what is read of each user.
#[derive(Debug, Clone)]
pub(super) struct Trampolines {
    head: Gva,
    end: Gva,
    plain: Range<Gva>,
    regs: Range<Gva>,
    start: u64,
    size: u64,
    next: u64,
    flags: u64,
    save_regs: u64,
}

impl Trampolines {
    /// Looks up the list; `None` for a kernel without ftrace, or with one that does not tell the size of its trampolines.
    pub fn find(view: &dyn KernelView) -> Result<Option<Self>, SetupError> {
        let list = view.symbol("ftrace_ops_list").zip(view.symbol("ftrace_list_end"));
        let code = view
            .symbol_range("ftrace_caller")
            .zip(view.symbol_range("ftrace_regs_caller"));
        let (Some((head, end)), Some((plain, regs))) = (list, code) else {
            return Ok(None);
        };
        // The next symbol is within the original and would end its range too early. In a kernel without the symbols of the ends, a part of each trampoline is
        // unknown code.
        let whole = |name: &str, end: Gva| view.symbol(name).unwrap_or(end);
        let plain = plain.start..whole("ftrace_caller_end", plain.end);
        let regs = regs.start..whole("ftrace_regs_caller_end", regs.end);
        let ops = view.btf().structure("ftrace_ops")?;
        let (Some(start), Some(size)) = (ops.try_member("trampoline"), ops.try_member("trampoline_size")) else {
            return Ok(None);
        };
        let (next, flags) = (ops.offset("next")?, ops.offset("flags")?);
        let save_regs = view.btf().enumerator(SAVE_REGS)?.cast_unsigned();
        let (start, size) = (start.offset(), size.offset());
        Ok(Some(Self {
            head,
            end,
            plain,
            regs,
            start,
            size,
            next,
            flags,
            save_regs,
        }))
    }

    /// Reads the trampolines that are in use now, sorted by address.
    pub fn read(&self, view: &dyn KernelView) -> Result<Vec<Trampoline>, SetupError> {
        let what = "the list of ftrace users";
        let word = |at: Gva| {
            view.read_u64(at)
                .map_err(|source| SetupError::Unreadable { what, at, source })
        };
        let mut found = Vec::new();
        let mut at = Gva(word(self.head)?);
        for _ in 0..OPS_MAX {
            if at == self.end || at == Gva(0) {
                found.sort_by_key(|trampoline: &Trampoline| trampoline.text.start);
                return Ok(found);
            }
            let (text, size) = (
                Gva(word(at.wrapping_add(self.start))?),
                word(at.wrapping_add(self.size))?,
            );
            let has_regs = word(at.wrapping_add(self.flags))? & self.save_regs != 0;
            let copy_of = if has_regs { &self.regs } else { &self.plain };
            if let Some(end) = text.checked_add(size)
                && text != Gva(0)
                && size != 0
            {
                found.push(Trampoline {
                    text: text..end,
                    copy_of: copy_of.clone(),
                });
            }
            at = Gva(word(at.wrapping_add(self.next))?);
        }
        let (found, expected) = (format!("more than {OPS_MAX}"), "an end".to_owned());
        Err(SetupError::NotUnderstood { what, found, expected })
    }
}
