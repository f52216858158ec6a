//! Alternatives: code that the kernel replaces for the CPU it runs on (arch/x86/include/asm/alternative.h,
//! `apply_alternatives` in arch/x86/kernel/alternative.c; 6.1, 6.12).

use super::PatchModule;
use super::sections::SectionOffset;
use super::sites::{Pointer, TableError};

/// Layout of the guest kernel's `struct alt_instr`, in bytes. 12 bytes long in 6.1 and in late 5.10, with a trailing
/// `padlen` 13 before, with `flags` 14 since 6.3.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AltLayout {
    /// Size of the structure.
    pub size: u64,
    /// Offset of `instr_offset`, 4 bytes, relative to itself.
    pub instr_offset: u64,
    /// Offset of `repl_offset`, 4 bytes, relative to itself.
    pub repl_offset: u64,
    /// Offset of `cpuid`, 2 bytes: the number of a CPU feature bit.
    pub cpuid: u64,
    /// Offset of `flags`, 2 bytes, if there is such a member (6.3 and later; a bit field behind `cpuid`). Without it, the top bit of `cpuid` means
    /// "not".
    pub flags: Option<u64>,
    /// Offset of `instrlen`, 1 byte.
    pub instrlen: u64,
    /// Offset of `replacementlen`, 1 byte.
    pub replacementlen: u64,
}

/// `ALTINSTR_FLAG_INV`: the top bit of `cpuid`, in a structure without flags.
const CPUID_NOT: u16 = 1 << 15;
/// `ALT_FLAG_NOT`: replace if the CPU lacks the feature.
const FLAG_NOT: u16 = 1 << 0;
/// `ALT_FLAG_DIRECT_CALL` (6.8): the original is an indirect call through memory, which becomes a direct one.
const FLAG_DIRECT_CALL: u16 = 1 << 1;

/// One entry of `.altinstructions`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Alternative {
    /// Place of the entry.
    pub entry: SectionOffset,
    /// The code that may be replaced.
    pub site: SectionOffset,
    /// Its bytes.
    pub site_len: u8,
    /// The code to replace it with; `None` for an empty one that nothing points to, as klp-build leaves them
    /// (`arch_alt_ignore_new_reloc` in tools/objtool/arch/x86/special.c of 7.2).
    pub replacement: Option<SectionOffset>,
    /// Its bytes.
    pub replacement_len: u8,
    /// Number of the CPU feature.
    pub feature: u16,
    /// True: replace if the feature is missing.
    pub inverted: bool,
    /// True: replace the indirect call by a direct one.
    pub direct_call: bool,
}

impl PatchModule<'_> {
    /// Reads the entries of `.altinstructions`, in the order in which they are applied.
    pub(crate) fn alternatives(&self, layout: &AltLayout) -> Result<Vec<Alternative>, TableError> {
        let mut found = Vec::new();
        for (id, table) in self.sections_named(".altinstructions") {
            if layout.size == 0 || table.size % layout.size != 0 {
                let expected = "a whole number of entries of the guest's struct alt_instr";
                return Err(TableError::new(
                    table,
                    table.size,
                    format!("the end, with {} bytes an entry", layout.size),
                    expected,
                ));
            }
            let mut at = 0;
            while at < table.size {
                let short = || TableError::new(table, at, "the end of the section", "a whole entry");
                let byte = |member: u64| {
                    table
                        .bytes::<1>(at.saturating_add(member))
                        .map(|[byte]| byte)
                        .ok_or_else(short)
                };
                let word = |member: u64| {
                    table
                        .bytes::<2>(at.saturating_add(member))
                        .map(u16::from_le_bytes)
                        .ok_or_else(short)
                };
                let cpuid = word(layout.cpuid)?;
                let flags = match layout.flags {
                    Some(member) => word(member)?,
                    None if cpuid & CPUID_NOT != 0 => FLAG_NOT,
                    None => 0,
                };
                if flags & !(FLAG_NOT | FLAG_DIRECT_CALL) != 0 {
                    return Err(TableError::new(table, at, format!("flags {flags:#x}"), "flags 0 to 3"));
                }
                let replacement_at = at.saturating_add(layout.repl_offset);
                let replacement_len = byte(layout.replacementlen)?;
                let replacement = if replacement_len == 0 && table.relocation_at(replacement_at).is_none() {
                    None
                } else {
                    Some(self.site(table, replacement_at, Pointer::Relative)?)
                };
                let alternative = Alternative {
                    entry: SectionOffset {
                        section: id,
                        offset: at,
                    },
                    site: self.site(table, at.saturating_add(layout.instr_offset), Pointer::Relative)?,
                    site_len: byte(layout.instrlen)?,
                    replacement,
                    replacement_len,
                    feature: if layout.flags.is_some() {
                        cpuid
                    } else {
                        cpuid & !CPUID_NOT
                    },
                    inverted: flags & FLAG_NOT != 0,
                    direct_call: flags & FLAG_DIRECT_CALL != 0,
                };
                if alternative.replacement_len > alternative.site_len {
                    let found = format!(
                        "{} bytes in place of {}",
                        alternative.replacement_len, alternative.site_len
                    );
                    return Err(TableError::new(table, at, found, "a replacement that is not longer"));
                }
                found.push(alternative);
                at += layout.size;
            }
        }
        share_length(&mut found);
        Ok(found)
    }
}

/// Gives all entries of a site the longest length, as the kernel does since 6.9, so that the bytes behind a shorter one are filled, too. Entries
/// of one site follow each other; of nested alternatives, the outer one may be longer.
fn share_length(alternatives: &mut [Alternative]) {
    for run in alternatives.chunk_by_mut(|a, b| a.site == b.site) {
        let longest = run.iter().map(|a| a.site_len).max().unwrap_or_default();
        for alternative in run {
            alternative.site_len = longest;
        }
    }
}
