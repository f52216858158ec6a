//! Functions that patches hold. A patch that takes a function which others hold leads it from their code to its own; the kernel's code is
//! at the bottom.

use super::Refusal;
use crate::addr::Gva;
use crate::change::Change;
use crate::kernel::Live;
use crate::redirect::{JUMP_BYTES, RedirectError, jump_bytes};
use crate::registry::{PatchedFunction, Record};
use std::collections::{BTreeMap, BTreeSet};

/// A patch that holds a function.
#[derive(Debug, Clone, Copy)]
pub(super) struct Holder<'r> {
    /// The patch.
    pub record: &'r Record,
    /// The function, as the patch's record has it.
    pub function: &'r PatchedFunction,
    /// The changes of its code and of its ftrace record.
    changes: &'r [Change],
}

/// The holders of each function, oldest first: the last one's code runs.
#[derive(Debug, Default)]
pub(super) struct Holders<'r>(BTreeMap<u64, Vec<Holder<'r>>>);

impl<'r> Holders<'r> {
    /// The holders among `records`.
    pub fn of(records: impl IntoIterator<Item = &'r Record>) -> Self {
        let mut records: Vec<_> = records.into_iter().collect();
        records.sort_by_key(|record| record.order);
        let mut holders = Self::default();
        for record in records {
            for (function, changes) in record.changes_by_function() {
                holders.0.entry(function.old).or_default().push(Holder {
                    record,
                    function,
                    changes,
                });
            }
        }
        holders
    }

    /// Those of the function at `old`.
    pub fn at(&self, old: u64) -> &[Holder<'r>] {
        self.0.get(&old).map_or(&[], Vec::as_slice)
    }

    /// The bottom and the top holder of each function.
    pub fn ends(&self) -> impl Iterator<Item = (&Holder<'r>, &Holder<'r>)> {
        self.0
            .values()
            .filter_map(|holders| Some((holders.first()?, holders.last()?)))
    }
}

/// A function of `record` that a later one of `records` holds, too, and that one's name.
pub(super) fn covered<'r>(records: impl IntoIterator<Item = &'r Record>, record: &Record) -> Option<(String, &'r str)> {
    let own: BTreeSet<u64> = record.functions.iter().map(|function| function.old).collect();
    let mut later = records.into_iter().filter(|later| later.order > record.order);
    later.find_map(|later| {
        let shared = later.functions.iter().find(|function| own.contains(&function.old))?;
        Some((shared.name.clone(), later.id.as_str()))
    })
}

impl<'r> Holder<'r> {
    /// True where the function leads to this patch's code.
    pub fn is_in_place(&self, live: &Live<'_>) -> bool {
        self.jumps().all(|jump| matches!(jump.is_made_now(live), Ok(true)))
    }

    /// Requires that the function leads to this patch's code.
    pub fn require_in_place(&self, live: &Live<'_>) -> Result<(), Refusal> {
        if self.is_in_place(live) {
            return Ok(());
        }
        let found = self.jumps().find_map(|jump| jump.verify(live.memory).err());
        Err(Refusal::NotActive {
            id: self.record.id.clone(),
            function: self.function.name.clone(),
            found: found.map_or_else(|| "a jump that changes".to_owned(), |error| error.to_string()),
        })
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
    pub fn led_back(&self, bottom: &Holder<'_>) -> Result<Vec<Change>, RedirectError> {
        self.require_alike(bottom)?;
        let both = self.jumps().zip(bottom.jumps());
        Ok(both
            .map(|(top, bottom)| top.followed_by(bottom.old_bytes().to_vec()))
            .collect())
    }

    /// What is to be undone to give the function, which `top` holds and `changes` lead elsewhere, what this patch has found in its place.
    pub fn and_then(&self, top: &Holder<'_>, changes: &[Change]) -> Result<Vec<Change>, RedirectError> {
        top.require_alike(self)?;
        let jumps = self.jumps().zip(changes).map(|(first, then)| then.after(first));
        Ok(jumps.chain(self.flags().cloned()).collect())
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
        self.changes.iter().filter(|change| change.is_of_bits())
    }

    /// The changes of the function's code: one, or two where the jump crosses a page boundary.
    fn jumps(&self) -> impl Iterator<Item = &'r Change> {
        self.changes.iter().filter(|change| !change.is_of_bits())
    }

    /// Requires that another patch has its jump in the same bytes.
    fn require_alike(&self, other: &Holder<'_>) -> Result<(), RedirectError> {
        let place = |jump: &Change| (jump.gpa(), jump.len());
        match self.jumps().map(place).eq(other.jumps().map(place)) {
            true => Ok(()),
            false => Err(self.no_jump(format!("another place than that of {}", other.record.id))),
        }
    }

    /// Guest-virtual address of the jump, from where it leads.
    fn jump_at(&self) -> Result<Gva, RedirectError> {
        let bytes: Vec<u8> = self.jumps().flat_map(|jump| jump.new_bytes().iter().copied()).collect();
        match bytes.as_slice() {
            &[0xe9, a, b, c, d] => {
                let distance = i64::from(i32::from_le_bytes([a, b, c, d])).cast_unsigned();
                Ok(Gva(self.function.new.wrapping_sub(distance).wrapping_sub(JUMP_BYTES)))
            }
            other => Err(self.no_jump(crate::change::hex::encode(other))),
        }
    }

    fn no_jump(&self, found: String) -> RedirectError {
        RedirectError::NoJump {
            name: self.function.name.clone(),
            id: self.record.id.clone(),
            found,
        }
    }
}
