//! Functions that patches hold. A patch that takes a function which others hold leads it from their code to its own; the kernel's code is
//! at the bottom.

use super::Refusal;
use crate::addr::Gva;
use crate::change::Change;
use crate::kernel::Live;
use crate::redirect::{JUMP_BYTES, RedirectError, jump_bytes};
use crate::registry::{PatchedFunction, Record};

/// A patch that holds a function.
#[derive(Debug, Clone, Copy)]
pub(super) struct Holder<'r> {
    /// The patch.
    pub record: &'r Record,
    /// The function, as the patch's record has it.
    pub function: &'r PatchedFunction,
}

/// Those of `records` that hold the function at `old`, oldest first: the last one's code runs.
pub(super) fn holders<'r>(records: impl IntoIterator<Item = &'r Record>, old: Gva) -> Vec<Holder<'r>> {
    let holder = |record: &'r Record| {
        let mut functions = record.functions.iter();
        let function = functions.find(|function| function.old == old.0)?;
        Some(Holder { record, function })
    };
    let mut holders: Vec<_> = records.into_iter().filter_map(holder).collect();
    holders.sort_by_key(|holder| holder.record.order);
    holders
}

/// A function of `record` that a later one of `records` holds, too, and that one's name.
pub(super) fn covered<'r>(records: impl IntoIterator<Item = &'r Record>, record: &Record) -> Option<(String, &'r str)> {
    records
        .into_iter()
        .filter(|later| later.order > record.order)
        .find_map(|later| {
            let is_shared = |function: &&PatchedFunction| record.functions.iter().any(|own| own.old == function.old);
            let shared = later.functions.iter().find(is_shared)?;
            Some((shared.name.clone(), later.id.as_str()))
        })
}

impl<'r> Holder<'r> {
    /// Requires that the function leads to this patch's code.
    pub fn require_in_place(&self, live: &Live<'_>) -> Result<(), Refusal> {
        for jump in self.jumps() {
            if !matches!(jump.is_made_now(live), Ok(true)) {
                return Err(Refusal::NotActive {
                    id: self.record.id.clone(),
                    function: self.function.name.clone(),
                    found: "not its jump".to_owned(),
                });
            }
        }
        Ok(())
    }

    /// The changes that lead the function from this patch's code to `new`.
    pub fn led_to(&self, new: Gva) -> Result<Vec<Change>, RedirectError> {
        let name = &self.function.name;
        let from = self.jump_at()?;
        let bytes = jump_bytes(name, from, new)?;
        let mut rest = bytes.as_slice();
        let fragments = self.jumps().map(|jump| {
            let (front, behind) = rest.split_at_checked(jump.len()).unwrap_or((rest, &[]));
            rest = behind;
            jump.followed_by(front.to_vec())
        });
        Ok(fragments.collect())
    }

    /// The changes that lead the function from this patch's code to what `bottom` has found in its place.
    pub fn led_back(&self, bottom: &Holder<'_>) -> Vec<Change> {
        let both = self.jumps().zip(bottom.jumps());
        both.map(|(top, bottom)| top.followed_by(bottom.old_bytes().to_vec()))
            .collect()
    }

    /// What is to be undone to give the function, which `changes` lead elsewhere, what this patch has found in its place.
    pub fn and_then(&self, changes: &[Change]) -> Vec<Change> {
        let jumps = self.jumps().zip(changes).map(|(first, then)| then.after(first));
        jumps.chain(self.flags().cloned()).collect()
    }

    /// Puts what this patch has found in the jump's place into `code`, a copy of the function's code from `start` on.
    pub fn uncover(&self, start: Gva, code: &mut [u8]) -> Result<(), RedirectError> {
        let offset = usize::try_from(self.jump_at()?.0.wrapping_sub(start.0)).unwrap_or(code.len());
        let found = self.jumps().flat_map(|jump| jump.old_bytes());
        for (byte, found) in code.iter_mut().skip(offset).zip(found) {
            *byte = *found;
        }
        Ok(())
    }

    /// The changes of the function's ftrace record.
    pub fn flags(&self) -> impl Iterator<Item = &'r Change> {
        self.record
            .changes_of(self.function)
            .iter()
            .filter(|change| change.is_of_bits())
    }

    /// The changes of the function's code: one, or two where the jump crosses a page boundary.
    fn jumps(&self) -> impl Iterator<Item = &'r Change> {
        self.record
            .changes_of(self.function)
            .iter()
            .filter(|change| !change.is_of_bits())
    }

    /// Guest-virtual address of the jump, from where it leads.
    fn jump_at(&self) -> Result<Gva, RedirectError> {
        let bytes: Vec<u8> = self.jumps().flat_map(|jump| jump.new_bytes().iter().copied()).collect();
        match bytes.as_slice() {
            &[0xe9, a, b, c, d] => {
                let distance = i64::from(i32::from_le_bytes([a, b, c, d])).cast_unsigned();
                Ok(Gva(self.function.new.wrapping_sub(distance).wrapping_sub(JUMP_BYTES)))
            }
            other => Err(RedirectError::NoJump {
                name: self.function.name.clone(),
                id: self.record.id.clone(),
                found: crate::change::hex::encode(other),
            }),
        }
    }
}
