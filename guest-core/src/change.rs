//! A guarded write: a change of guest memory that knows the bytes that it replaces, and can be checked, read back and undone.

use crate::addr::{Gpa, Gva};
use crate::kernel::Live;
use crate::memory::{MemoryError, PhysMemory};
use serde::{Deserialize, Serialize};
use std::ops::Range;

/// Why a change cannot be made or checked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ChangeError {
    /// Guest memory does not hold the expected bytes.
    #[error("{what} at {gpa}: found {found}, expected {expected}")]
    Unexpected {
        /// What the bytes are.
        what: String,
        /// Guest-physical address of the first byte shown.
        gpa: Gpa,
        /// The guest's bytes in hex, from the first ones that differ.
        found: String,
        /// The expected bytes in hex.
        expected: String,
    },
    /// The guest has changed bytes that a plan was made from.
    #[error("the guest is {doing}: the byte at {gpa} has changed since it was planned")]
    Changing {
        /// What the guest is doing.
        doing: &'static str,
        /// Guest-physical address of the first byte that differs.
        gpa: Gpa,
    },
    /// Guest memory cannot be read or written.
    #[error("{what}")]
    Memory {
        /// What was being read or written.
        what: String,
        /// Why.
        source: MemoryError,
    },
}

impl ChangeError {
    /// That `what` cannot be read or written.
    pub(crate) fn of(what: &str) -> impl FnOnce(MemoryError) -> Self {
        let what = what.to_owned();
        move |source| Self::Memory { what, source }
    }
}

/// A change of `old` bytes at a guest-physical address to `new` ones.
///
/// With a mask, only its bits belong to the change. The other bits are the guest's, and stay.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Change {
    what: String,
    gpa: u64,
    #[serde(with = "hex")]
    old: Vec<u8>,
    #[serde(with = "hex")]
    new: Vec<u8>,
    #[serde(with = "hex", default, skip_serializing_if = "Vec::is_empty")]
    mask: Vec<u8>,
    /// True if no CPU executes the bytes.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    data: bool,
    /// Bytes that this vmpatch may have written there in place of the new ones, or none: a jump that leads to the same code by another way.
    #[serde(with = "hex", default, skip_serializing_if = "Vec::is_empty")]
    via: Vec<u8>,
}

impl Change {
    /// Changes all bits of `old` to `new`. A longer one of the two is cut.
    pub fn replace(what: impl Into<String>, gpa: Gpa, mut old: Vec<u8>, mut new: Vec<u8>) -> Self {
        let len = old.len().min(new.len());
        old.truncate(len);
        new.truncate(len);
        Self {
            what: what.into(),
            gpa: gpa.0,
            old,
            new,
            mask: Vec::new(),
            data: false,
            via: Vec::new(),
        }
    }

    /// Changes a little-endian word of 8 bytes from `old` to `new`.
    pub fn word(what: impl Into<String>, gpa: Gpa, old: u64, new: u64) -> Self {
        Self::replace(what, gpa, old.to_le_bytes().into(), new.to_le_bytes().into())
    }

    /// Sets the bits of `mask` in one byte.
    pub fn set_bits(what: impl Into<String>, gpa: Gpa, mask: u8) -> Self {
        Self {
            what: what.into(),
            gpa: gpa.0,
            old: vec![0],
            new: vec![mask],
            mask: vec![mask],
            data: false,
            via: Vec::new(),
        }
    }

    /// The same change, of bytes that no CPU executes: they need not be written as code.
    #[must_use]
    pub fn of_data(self) -> Self {
        Self { data: true, ..self }
    }

    /// The same change, where `via` may also be in place of the new bytes: restoring the old ones replaces that, too.
    pub(crate) fn or_via(self, via: Vec<u8>) -> Self {
        Self { via, ..self }
    }

    /// The same change, where nothing else may be in place of the new bytes.
    pub(crate) fn without_via(&self) -> Self {
        self.clone().or_via(Vec::new())
    }

    /// The change of the old bytes to those that may be in place of the new ones; `None` where there are none.
    pub(crate) fn by_way(&self) -> Option<Self> {
        (!self.via.is_empty()).then(|| Self {
            new: self.via.clone(),
            via: self.new.clone(),
            ..self.clone()
        })
    }

    /// The change of what is there now, old, new or in between, to the new bytes; `None` where they are there. For planners.
    pub(crate) fn completion(&self, live: &Live<'_>) -> Result<Option<Self>, ChangeError> {
        let now = self.read_for_plan(live)?;
        if !self.is_ours_in(&now) {
            self.require(&now, &self.new)?;
        }
        let new = self.merged(&now);
        Ok((now != new).then(|| Self {
            old: now,
            new,
            mask: Vec::new(),
            ..self.clone()
        }))
    }

    /// True if no CPU executes the bytes.
    pub fn is_data(&self) -> bool {
        self.data
    }

    /// True if only some bits of the bytes belong to the change.
    pub(crate) fn is_of_bits(&self) -> bool {
        !self.mask.is_empty()
    }

    /// True if it changes a word to a pointer into `memory` or to its end. The low bits, in which trees keep colours, do not count.
    pub(crate) fn gives_pointer_to(&self, memory: &Range<Gva>) -> bool {
        let word = self.new.first_chunk().map(|word| Gva(u64::from_le_bytes(*word) & !7));
        word.is_some_and(|word| memory.start <= word && word <= memory.end)
    }

    /// True if it sets a little-endian word of 8 bytes to `word`.
    pub(crate) fn sets_word(&self, word: u64) -> bool {
        self.new == word.to_le_bytes()
    }

    /// The same change, to another word.
    pub(crate) fn to_word(&self, word: u64) -> Self {
        let new = word.to_le_bytes().into();
        Self { new, ..self.clone() }
    }

    /// The name of the bytes, for a person.
    pub fn what(&self) -> &str {
        &self.what
    }

    /// Guest-physical address of the bytes.
    pub fn gpa(&self) -> Gpa {
        Gpa(self.gpa)
    }

    /// Number of bytes.
    pub fn len(&self) -> usize {
        self.old.len()
    }

    /// True for a change of no bytes.
    pub fn is_empty(&self) -> bool {
        self.old.is_empty()
    }

    /// The old bytes.
    pub(crate) fn old_bytes(&self) -> &[u8] {
        &self.old
    }

    /// The new bytes.
    pub(crate) fn new_bytes(&self) -> &[u8] {
        &self.new
    }

    /// The change from what this one has written to `new`.
    pub(crate) fn followed_by(&self, new: Vec<u8>) -> Self {
        Self::replace(self.what.clone(), self.gpa(), self.new.clone(), new)
    }

    /// This change and `first`, which comes before it, in one. Both are of the same bytes.
    pub(crate) fn after(&self, first: &Self) -> Self {
        Self {
            old: first.old.clone(),
            ..self.clone()
        }
    }

    /// The change that undoes this one.
    pub fn undone(&self) -> Self {
        Self {
            old: self.new.clone(),
            new: self.old.clone(),
            ..self.clone()
        }
    }

    /// True if its lengths agree. A change from a record in the guest may be malformed.
    pub fn is_sound(&self) -> bool {
        let is_all_or_none = |part: &[u8]| part.is_empty() || part.len() == self.old.len();
        self.old.len() == self.new.len() && is_all_or_none(&self.mask) && is_all_or_none(&self.via)
    }

    /// Requires the old bytes, and gives the bytes to write.
    ///
    /// # Errors
    ///
    /// [`ChangeError::Unexpected`] or [`ChangeError::Memory`].
    pub fn prepare(&self, memory: &dyn PhysMemory) -> Result<Vec<u8>, ChangeError> {
        let now = self.read(memory)?;
        self.require(&now, &self.old)?;
        Ok(self.merged(&now))
    }

    /// Requires the new bytes.
    ///
    /// # Errors
    ///
    /// [`ChangeError::Unexpected`] or [`ChangeError::Memory`].
    pub fn verify(&self, memory: &dyn PhysMemory) -> Result<(), ChangeError> {
        let now = self.read(memory)?;
        self.require(&now, &self.new)
    }

    /// Requires the old bytes, writes the new ones, and reads them back.
    ///
    /// # Errors
    ///
    /// [`ChangeError::Unexpected`] or [`ChangeError::Memory`].
    pub fn make(&self, memory: &dyn PhysMemory) -> Result<(), ChangeError> {
        let bytes = self.prepare(memory)?;
        self.write(memory, &bytes)?;
        self.verify(memory)
    }

    /// Writes what [`Change::prepare`] gave.
    pub(crate) fn write(&self, memory: &dyn PhysMemory, bytes: &[u8]) -> Result<(), ChangeError> {
        memory
            .write(self.gpa(), bytes)
            .map_err(|source| self.memory_error(source))
    }

    /// Restores the old bytes, as [`Change::restored`] gives them. Writes nothing if they are there.
    pub(crate) fn restore(&self, memory: &dyn PhysMemory) -> Result<(), ChangeError> {
        let bytes = self.restored(memory)?;
        if bytes == self.read(memory)? {
            return Ok(());
        }
        self.write(memory, &bytes)
    }

    /// The bytes that restore the old ones, whether all of this change was made, a part of it, or nothing.
    ///
    /// If a byte is neither old nor new, the guest has written there since, for example its own tracer. All bytes then stay as they are.
    ///
    /// # Errors
    ///
    /// [`ChangeError::Memory`].
    pub fn restored(&self, memory: &dyn PhysMemory) -> Result<Vec<u8>, ChangeError> {
        Ok(self.over(&self.read(memory)?))
    }

    /// The bytes that complete this change, whether all of it was made, a part of it, or nothing.
    ///
    /// # Errors
    ///
    /// [`ChangeError::Unexpected`] where a byte is neither old nor new, or [`ChangeError::Memory`].
    pub(crate) fn completed(&self, memory: &dyn PhysMemory) -> Result<Vec<u8>, ChangeError> {
        let now = self.read(memory)?;
        let restored = self.over(&now);
        self.require(&restored, &self.old)?;
        Ok(self.merged(&restored))
    }

    /// True where each byte is old or new: nobody else has written there since.
    ///
    /// # Errors
    ///
    /// [`ChangeError::Memory`].
    pub(crate) fn is_ours(&self, memory: &dyn PhysMemory) -> Result<bool, ChangeError> {
        Ok(self.is_ours_in(&self.read(memory)?))
    }

    /// The same as [`Change::is_ours`] for memory that holds `now`.
    fn is_ours_in(&self, now: &[u8]) -> bool {
        let is = |at: usize, now: u8, one: u8| (now ^ one) & self.mask_at(at) == 0;
        let mut bytes = now.iter().zip(&self.old).zip(&self.new).enumerate();
        bytes.all(|(at, ((&now, &old), &new))| {
            let via = self.via.get(at);
            is(at, now, old) || is(at, now, new) || via.is_some_and(|&via| is(at, now, via))
        })
    }

    /// The same as [`Change::restored`] for memory that holds `now`.
    fn over(&self, now: &[u8]) -> Vec<u8> {
        match self.is_ours_in(now) {
            true => self.undone().merged(now),
            false => now.to_vec(),
        }
    }

    /// The bytes in guest memory now.
    ///
    /// # Errors
    ///
    /// [`ChangeError::Memory`].
    pub fn current(&self, memory: &dyn PhysMemory) -> Result<Vec<u8>, ChangeError> {
        self.read(memory)
    }

    /// True if guest memory holds the new bytes.
    ///
    /// # Errors
    ///
    /// [`ChangeError::Memory`].
    pub fn is_made(&self, memory: &dyn PhysMemory) -> Result<bool, ChangeError> {
        Ok(self.require(&self.read(memory)?, &self.new).is_ok())
    }

    /// The same for planners.
    pub(crate) fn is_made_now(&self, live: &Live<'_>) -> Result<bool, ChangeError> {
        Ok(self.require(&self.read_for_plan(live)?, &self.new).is_ok())
    }

    /// The change that restores the old bytes, as [`Change::restored`] gives them; `None` if they are there. For planners.
    pub(crate) fn restoration(&self, live: &Live<'_>, what: &str) -> Result<Option<Self>, ChangeError> {
        let now = self.read_for_plan(live)?;
        let old = self.over(&now);
        Ok((now != old).then(|| Self {
            data: self.data,
            ..Self::replace(what, self.gpa(), now, old)
        }))
    }

    fn read_for_plan(&self, live: &Live<'_>) -> Result<Vec<u8>, ChangeError> {
        let mut now = vec![0; self.len()];
        live.read_physical(self.gpa(), &mut now)
            .map_err(|source| self.memory_error(source))?;
        Ok(now)
    }

    /// Applies this change to a copy of the memory that starts at `base`, as far as the copy reaches.
    pub(crate) fn overlay(&self, base: Gpa, copy: &mut [u8]) {
        for (at, new) in self.new.iter().enumerate() {
            let offset = self.gpa().wrapping_add(at as u64).checked_sub(base);
            let byte = offset.and_then(|offset| copy.get_mut(usize::try_from(offset).ok()?));
            if let Some(byte) = byte {
                *byte = (*byte & !self.mask_at(at)) | (new & self.mask_at(at));
            }
        }
    }

    fn read(&self, memory: &dyn PhysMemory) -> Result<Vec<u8>, ChangeError> {
        let mut now = vec![0; self.len()];
        memory
            .read(self.gpa(), &mut now)
            .map_err(|source| self.memory_error(source))?;
        Ok(now)
    }

    /// True where the bytes at `at` are within this change, and each is an old or a new one of it, or as it is in memory.
    pub(crate) fn permits(&self, memory: &dyn PhysMemory, at: Gpa, bytes: &[u8]) -> bool {
        let own = at.0.checked_sub(self.gpa).and_then(|from| {
            let from = usize::try_from(from).ok()?;
            let all = from..from.checked_add(bytes.len())?;
            Some((from, self.old.get(all.clone())?, self.new.get(all)?))
        });
        let Some((from, old, new)) = own else { return false };
        let mask = (from..).map(|at| self.mask_at(at));
        let parts = || bytes.iter().zip(old.iter().zip(new)).zip(mask.clone());
        let is_own =
            |((byte, (old, new)), mask): ((&u8, (&u8, &u8)), u8)| (byte ^ old) & mask == 0 || (byte ^ new) & mask == 0;
        if parts().all(is_own) {
            return true;
        }
        let mut now = vec![0; bytes.len()];
        let is_read = memory.read(at, &mut now).is_ok();
        is_read && parts().zip(&now).all(|(part, now)| is_own(part) || part.0.0 == now)
    }

    fn merged(&self, now: &[u8]) -> Vec<u8> {
        let bytes = now.iter().zip(&self.new).enumerate();
        bytes
            .map(|(at, (now, new))| (now & !self.mask_at(at)) | (new & self.mask_at(at)))
            .collect()
    }

    fn require(&self, now: &[u8], expected: &[u8]) -> Result<(), ChangeError> {
        let differs = |(at, (a, b)): (usize, (&u8, &u8))| (a ^ b) & self.mask_at(at) != 0;
        let Some(first) = now.iter().zip(expected).enumerate().position(differs) else {
            return Ok(());
        };
        let shown = first & !7..(first + 8).min(now.len());
        let text = |bytes: &[u8]| hex::encode(bytes.get(shown.clone()).unwrap_or_default());
        Err(ChangeError::Unexpected {
            what: self.what.clone(),
            gpa: self.gpa().wrapping_add(shown.start as u64),
            found: text(now),
            expected: text(expected),
        })
    }

    fn mask_at(&self, at: usize) -> u8 {
        self.mask.get(at).copied().unwrap_or(0xff)
    }

    fn memory_error(&self, source: MemoryError) -> ChangeError {
        ChangeError::Memory {
            what: self.what.clone(),
            source,
        }
    }
}

/// Bytes as hex text, for records that a person may have to read in a crash dump.
pub(crate) mod hex {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub fn encode(bytes: &[u8]) -> String {
        let digit = |nibble: u8| char::from_digit(nibble.into(), 16).unwrap_or_default();
        let digits = bytes.iter().flat_map(|byte| [digit(byte >> 4), digit(byte & 0xf)]);
        let mut text = String::with_capacity(2 * bytes.len());
        text.extend(digits);
        text
    }

    pub fn serialize<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&encode(bytes))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
        let text = String::deserialize(deserializer)?;
        let digit = |byte: u8| char::from(byte).to_digit(16);
        let byte = |pair: &[u8]| match pair {
            &[high, low] => u8::try_from(16 * digit(high)? + digit(low)?).ok(),
            _ => None,
        };
        let pairs = text.as_bytes().chunks(2);
        pairs
            .map(|pair| byte(pair).ok_or(D::Error::custom("not hex")))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Ram;

    fn bytes(ram: &Ram, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        ram.read(Gpa(at), &mut bytes).unwrap();
        bytes
    }

    #[test]
    fn a_change_refuses_bytes_that_it_does_not_expect_and_names_them() {
        let ram = Ram::new(64);
        ram.write(Gpa(16), &[0x0f, 0x1f, 0x44, 0x00, 0x01]).unwrap();
        let change = Change::replace("site", Gpa(16), vec![0x0f, 0x1f, 0x44, 0, 0], vec![0xe9, 1, 2, 3, 4]);
        let error = change.make(&ram).unwrap_err();
        assert_eq!(
            error.to_string(),
            "site at GPA 0x10: found 0f1f440001, expected 0f1f440000"
        );
        assert_eq!(bytes(&ram, 16, 5), [0x0f, 0x1f, 0x44, 0, 1]);
    }

    #[test]
    fn a_change_made_and_undone_leaves_the_bytes_as_they_were() {
        let ram = Ram::new(64);
        let change = Change::word("entry", Gpa(8), 0, 0x1063);
        change.make(&ram).unwrap();
        assert_eq!(bytes(&ram, 8, 2), [0x63, 0x10]);
        change.undone().make(&ram).unwrap();
        assert_eq!(bytes(&ram, 8, 8), [0; 8]);
    }

    #[test]
    fn bits_outside_of_the_mask_stay_as_they_are() {
        let ram = Ram::new(8);
        ram.write(Gpa(3), &[0x81]).unwrap();
        let change = Change::set_bits("flags", Gpa(3), 2);
        change.make(&ram).unwrap();
        assert_eq!(bytes(&ram, 3, 1), [0x83]);
        ram.write(Gpa(3), &[0x43]).unwrap();
        change.undone().make(&ram).unwrap();
        assert_eq!(bytes(&ram, 3, 1), [0x41]);
    }

    #[test]
    fn restoring_undoes_a_change_that_was_cut_off() {
        let ram = Ram::new(8);
        let change = Change::replace("site", Gpa(0), vec![1, 2, 3, 4], vec![5, 6, 7, 8]);
        ram.write(Gpa(0), &[5, 6, 3, 4]).unwrap();
        assert_eq!(change.restored(&ram).unwrap(), [1, 2, 3, 4]);
    }

    #[test]
    fn restoring_leaves_bytes_alone_that_the_guest_has_written_since() {
        let ram = Ram::new(16);
        let change = Change::replace("site", Gpa(0), vec![0x0f, 0x1f, 0x44, 0, 0], vec![0xe9, 1, 2, 3, 4]);
        let call = [0xe8, 0x1f, 2, 3, 9];
        ram.write(Gpa(0), &call).unwrap();
        assert_eq!(change.restored(&ram).unwrap(), call);
        let flags = Change::set_bits("flags", Gpa(8), 2);
        ram.write(Gpa(8), &[0x83]).unwrap();
        assert_eq!(flags.restored(&ram).unwrap(), [0x81]);
    }

    #[test]
    fn a_write_is_permitted_within_a_change_with_its_own_bytes_or_those_in_memory() {
        let ram = Ram::new(32);
        ram.write(Gpa(8), &[1, 2, 9, 4]).unwrap();
        let change = Change::replace("site", Gpa(8), vec![1, 2, 3, 4], vec![5, 6, 7, 8]);
        let permits = |at, bytes: &[u8]| change.permits(&ram, Gpa(at), bytes);
        assert!(permits(8, &[5, 6, 7, 8]) && permits(8, &[1, 2, 3, 4]) && permits(9, &[6, 3]));
        // What the guest has written there since stays.
        assert!(permits(8, &[1, 6, 9, 4]));
        assert!(!permits(8, &[1, 6, 10, 4]) && !permits(7, &[0, 5]) && !permits(8, &[5, 6, 7, 8, 0]));
        assert!(!permits(11, &[8, 0]) && !permits(12, &[0]) && !permits(u64::MAX, &[5]));
        let flags = Change::set_bits("flags", Gpa(8), 2);
        assert!(flags.permits(&ram, Gpa(8), &[0xff]) && flags.permits(&ram, Gpa(8), &[0]));
    }

    #[test]
    fn a_change_is_encoded_and_decoded() {
        let change = Change::set_bits("flags", Gpa(3), 2);
        let text = serde_json::to_string(&change).unwrap();
        assert_eq!(text, r#"{"what":"flags","gpa":3,"old":"00","new":"02","mask":"02"}"#);
        assert_eq!(serde_json::from_str::<Change>(&text).unwrap(), change);
    }
}
