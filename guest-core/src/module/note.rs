//! The note that `vmpatch build` writes into a module: the origin of the patch, and the code that it was made for. A guest that runs other code is refused.
//!
//! Format: one ELF note (System V ABI) in the section [`NOTE_SECTION`]: owner `vmpatch`, type 1, and as its contents JSON text.
//! Members are only ever added; a note of a later `format` is refused.

use crate::change::hex;
use crate::pattern::Pattern;
use serde::{Deserialize, Serialize};

/// The section that the note is in.
pub const NOTE_SECTION: &str = ".note.vmpatch";
/// The note's owner, with the zero byte of the ELF format.
const OWNER: &[u8; 8] = b"vmpatch\0";
/// The note's type.
const KIND: u32 = 1;
/// The format of notes that is written and read here.
const FORMAT: u32 = 1;
/// Size of a note's header in bytes: two lengths and the type.
const HEADER_BYTES: usize = 12;
/// Most bytes of a note.
const NOTE_BYTES_MAX: usize = 16 << 20;

/// The origin of a patch, and the code that it was made for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Note {
    /// Format of the note.
    pub format: u32,
    /// The patch's name.
    pub name: String,
    /// Version of the patch, as its builder counts.
    #[serde(default)]
    pub version: String,
    /// Identifiers of the flaws that it fixes: `CVE-2026-52928`.
    #[serde(default)]
    pub cves: Vec<String>,
    /// Description of the patch, for people.
    #[serde(default)]
    pub description: String,
    /// The packages that the sources came from: `linux-source-6.1 6.1.170-3`.
    #[serde(default)]
    pub sources: Vec<String>,
    /// The program that built it.
    #[serde(default)]
    pub builder: String,
    /// Release of the kernel that it was made for.
    #[serde(default)]
    pub kernel: String,
    /// The old functions.
    pub functions: Vec<OldCode>,
    /// The risks that its builder has allowed.
    #[serde(default)]
    pub allowed: Vec<AllowedRisk>,
}

/// The code of an old function.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OldCode {
    /// Name of the function in kallsyms.
    pub name: String,
    /// Position among symbols of that name, from 1; 0 if the name is unique.
    #[serde(default)]
    pub sympos: u64,
    /// Its module; `None` for the kernel image.
    #[serde(default)]
    pub object: Option<String>,
    /// Its bytes.
    pub size: u64,
    /// SHA-256 of its code, in which masked bytes are zero, in hexadecimal digits.
    pub digest: String,
    /// The code, with bytes masked that may differ in a guest.
    pub code: Pattern,
}

/// A risk that was allowed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AllowedRisk {
    /// Name of the risk, as for `vmpatch build --allow`.
    pub risk: String,
    /// What it concerns: a function, variable or type.
    pub place: String,
    /// What may go wrong, for people.
    pub reason: String,
}

/// Why a note cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NoteError {
    /// The section is no ELF note of vmpatch, or is cut off.
    #[error("section {NOTE_SECTION} is not a note of vmpatch: {what}")]
    Damaged {
        /// What is wrong with it.
        what: String,
    },
    /// The note was written by a later vmpatch.
    #[error("section {NOTE_SECTION} has format {found}, this vmpatch knows {FORMAT}")]
    Format {
        /// Format of the note.
        found: u32,
    },
    /// The digest of a function is not that of its code.
    #[error("section {NOTE_SECTION}: {function} has digest {digest} and code whose digest is {computed}")]
    Digest {
        /// The function.
        function: String,
        /// The digest in the note.
        digest: String,
        /// The digest of the code in the note.
        computed: String,
    },
}

impl OldCode {
    /// The code of an old function.
    pub fn new(name: &str, sympos: u64, object: Option<&str>, code: Pattern) -> Self {
        Self {
            name: name.to_owned(),
            sympos,
            object: object.map(str::to_owned),
            size: u64::try_from(code.len()).unwrap_or(u64::MAX),
            digest: hex::encode(&code.digest()),
            code,
        }
    }
}

impl Note {
    /// An empty note in the current format.
    pub fn new(name: &str) -> Self {
        Self {
            format: FORMAT,
            name: name.to_owned(),
            version: String::new(),
            cves: Vec::new(),
            description: String::new(),
            sources: Vec::new(),
            builder: String::new(),
            kernel: String::new(),
            functions: Vec::new(),
            allowed: Vec::new(),
        }
    }

    /// The entry of a function of an object, which is a module, or `None` for the kernel image.
    pub fn function(&self, name: &str, sympos: u64, object: Option<&str>) -> Option<&OldCode> {
        self.functions
            .iter()
            .find(|old| old.name == name && old.sympos == sympos && old.object.as_deref() == object)
    }

    /// Encodes the section. The same note gives the same bytes.
    pub fn to_bytes(&self) -> Result<Vec<u8>, serde_json::Error> {
        let text = serde_json::to_vec(self)?;
        let len = |bytes: usize| u32::try_from(bytes).unwrap_or(u32::MAX).to_le_bytes();
        let mut bytes = Vec::with_capacity(HEADER_BYTES + OWNER.len() + text.len() + 3);
        bytes.extend(len(OWNER.len()));
        bytes.extend(len(text.len()));
        bytes.extend(KIND.to_le_bytes());
        bytes.extend(OWNER);
        bytes.extend(text);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        Ok(bytes)
    }

    /// Decodes the section.
    ///
    /// # Errors
    ///
    /// The note cannot be used.
    pub fn parse(section: &[u8]) -> Result<Self, NoteError> {
        let damaged = |what: &str| NoteError::Damaged { what: what.to_owned() };
        if section.len() > NOTE_BYTES_MAX {
            return Err(damaged("it is longer than any"));
        }
        let (header, rest) = section
            .split_at_checked(HEADER_BYTES)
            .ok_or_else(|| damaged("it is cut off"))?;
        let word = |at: usize| -> Option<u32> {
            let bytes: &[u8; 4] = header.get(at..)?.first_chunk()?;
            Some(u32::from_le_bytes(*bytes))
        };
        let owner_len = u32::try_from(OWNER.len()).ok();
        let (_, rest) = rest
            .split_first_chunk::<8>()
            .filter(|(owner, _)| *owner == OWNER && word(0) == owner_len)
            .ok_or_else(|| damaged("its owner is another"))?;
        if word(8) != Some(KIND) {
            return Err(damaged("its type is another"));
        }
        let text = word(4)
            .and_then(|len| rest.get(..usize::try_from(len).ok()?))
            .ok_or_else(|| damaged("it is cut off"))?;
        let json = |cause: serde_json::Error| damaged(&cause.to_string());
        #[derive(Deserialize)]
        struct Head {
            format: u32,
        }
        let head: Head = serde_json::from_slice(text).map_err(json)?;
        if head.format != FORMAT {
            return Err(NoteError::Format { found: head.format });
        }
        let note: Self = serde_json::from_slice(text).map_err(json)?;
        for old in &note.functions {
            let computed = hex::encode(&old.code.digest());
            if computed != old.digest || u64::try_from(old.code.len()) != Ok(old.size) {
                return Err(NoteError::Digest {
                    function: old.name.clone(),
                    digest: old.digest.clone(),
                    computed,
                });
            }
        }
        Ok(note)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn note() -> Note {
        let mut note = Note::new("livepatch-x");
        note.cves.push("CVE-2026-1".to_owned());
        note.functions
            .push(OldCode::new("f", 2, None, Pattern::new(&[0x90, 0xc3])));
        note
    }

    #[test]
    fn a_note_reads_back() {
        let bytes = note().to_bytes().unwrap();
        assert_eq!(bytes.len() % 4, 0);
        assert_eq!(Note::parse(&bytes), Ok(note()));
    }

    #[test]
    fn every_cut_is_refused() {
        let bytes = note().to_bytes().unwrap();
        for len in 0..bytes.len() - 4 {
            assert!(Note::parse(&bytes[..len]).is_err(), "cut at {len}");
        }
    }

    #[test]
    fn a_later_format_is_refused_by_its_number() {
        let later = Note { format: 2, ..note() };
        let found = Note::parse(&later.to_bytes().unwrap());
        assert_eq!(found, Err(NoteError::Format { found: 2 }));
    }

    #[test]
    fn code_that_does_not_have_the_digest_is_refused() {
        let mut wrong = note();
        wrong.functions[0].code = Pattern::new(&[0x90, 0xcc]);
        assert!(matches!(
            Note::parse(&wrong.to_bytes().unwrap()),
            Err(NoteError::Digest { .. })
        ));
    }

    #[test]
    fn the_note_of_another_owner_is_refused() {
        let mut bytes = note().to_bytes().unwrap();
        bytes[12] = b'V';
        assert!(matches!(Note::parse(&bytes), Err(NoteError::Damaged { .. })));
    }
}
