//! Reading the structures that describe a patch: bytes of the module's data, with a relocation for each pointer.

use super::sections::{Relocation, SectionOffset};
use super::{PatchError, PatchModule};
use object::elf::R_X86_64_64;

/// Longest function or object name, in bytes (`KSYM_NAME_LEN`, include/linux/kallsyms.h).
const NAME_BYTES_MAX: usize = 512;

impl PatchModule<'_> {
    /// The place that a pointer at `at` will hold the address of; none for a null pointer.
    pub(super) fn pointer(&self, member: &'static str, at: SectionOffset) -> Result<Option<SectionOffset>, PatchError> {
        let expected = "a pointer to this module's data, or null";
        let value = self.number::<8>(member, at)?;
        if value != 0 {
            return Err(self.member(member, at, &format!("{value:#x}"), expected));
        }
        let Some(relocation) = self.section(at.section).and_then(|s| s.relocation_at(at.offset)) else {
            return Ok(None);
        };
        match self.target(relocation, 0).filter(|_| relocation.kind == R_X86_64_64.0) {
            Some(target) => Ok(Some(target)),
            None => Err(self.member(member, at, &self.describe(relocation), expected)),
        }
    }

    /// The little-endian number of `N` bytes, at most 8, at `at`.
    pub(super) fn number<const N: usize>(&self, member: &'static str, at: SectionOffset) -> Result<u64, PatchError> {
        let bytes: [u8; N] = self
            .section(at.section)
            .and_then(|s| s.bytes(at.offset))
            .ok_or_else(|| self.member(member, at, "outside its section", "a whole structure"))?;
        Ok(bytes
            .iter()
            .rev()
            .fold(0, |value, byte| (value << 8) | u64::from(*byte)))
    }

    pub(super) fn text(&self, member: &'static str, at: SectionOffset) -> Result<String, PatchError> {
        let bytes = self
            .section(at.section)
            .and_then(|s| s.data.get(usize::try_from(at.offset).ok()?..));
        let bytes = bytes.unwrap_or_default();
        let end = bytes.iter().take(NAME_BYTES_MAX).position(|byte| *byte == 0);
        let text = end
            .and_then(|end| std::str::from_utf8(bytes.get(..end)?).ok())
            .filter(|text| !text.is_empty());
        text.map(str::to_owned)
            .ok_or_else(|| self.member(member, at, "no text", "a name of 1 to 511 bytes"))
    }

    /// The name that a pointer at `at` leads to; none for a null pointer.
    pub(super) fn name_at(&self, member: &'static str, at: SectionOffset) -> Result<Option<String>, PatchError> {
        let pointer = self.pointer(member, at)?;
        pointer.map(|text| self.text(member, text)).transpose()
    }

    /// Where the new function begins that a pointer at `at` leads to, its size and its name.
    pub(super) fn new_function(
        &self,
        member: &'static str,
        at: SectionOffset,
    ) -> Result<(SectionOffset, u64, Option<String>), PatchError> {
        let expected = "a function in executable code";
        let Some(new) = self.pointer(member, at)? else {
            return Err(self.member(member, at, "null", expected));
        };
        let found = self.function_at(new).map(|(size, symbol)| (new, size, symbol));
        found.ok_or_else(|| self.member(member, at, &self.place(new), expected))
    }

    /// Size and name of the function that begins at `at`; none where that is not code.
    fn function_at(&self, at: SectionOffset) -> Option<(u64, Option<String>)> {
        let section = self.section(at.section).filter(|s| s.is_executable())?;
        let rest = section.size.checked_sub(at.offset).filter(|rest| *rest > 0)?;
        Some(match self.elf.function_at(at) {
            Some(symbol) => (symbol.size.min(rest), Some(symbol.name.to_owned())),
            None => (rest, None),
        })
    }

    pub(super) fn member(
        &self,
        member: &'static str,
        at: SectionOffset,
        found: &str,
        expected: &'static str,
    ) -> PatchError {
        PatchError::Member {
            member,
            at: self.place(at),
            found: found.into(),
            expected,
        }
    }

    fn describe(&self, relocation: &Relocation) -> String {
        format!(
            "a relocation of type {} against {}",
            relocation.kind,
            self.symbol_name(relocation)
        )
    }
}
