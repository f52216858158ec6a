//! The exported symbols that a module was compiled against, with the checksums of their types (`CONFIG_MODVERSIONS`).
//!
//! - `__versions`: `struct modversion_info` (include/linux/module.h), 8 bytes for the checksum and 56 for the name;
//! - `__version_ext_crcs` and `__version_ext_names` (`CONFIG_EXTENDED_MODVERSIONS`, since 6.14; scripts/mod/modpost.c,
//!   `add_extended_versions`): 4 bytes for each checksum, and the names in the same order, each with a NUL behind it.

use super::{ModuleError, PatchModule};

/// Bytes of a `struct modversion_info`, and of the checksum at its start.
const ENTRY_BYTES: usize = 64;
const CRC_BYTES: usize = 8;
/// Most symbols of a module.
const VERSIONS_MAX: usize = 1 << 16;

const ENTRIES: &str = "__versions";
const EXTENDED_CRCS: &str = "__version_ext_crcs";
const EXTENDED_NAMES: &str = "__version_ext_names";

/// A symbol that the module uses, and the checksum of its type.
pub type Version<'d> = (&'d str, u32);

impl<'d> PatchModule<'d> {
    /// The symbols with their checksums, from both forms. Empty for a module with neither.
    ///
    /// # Errors
    ///
    /// [`ModuleError::Versions`]: a part is cut off, or the kernel's loader could not compare it.
    pub fn versions(&self) -> Result<Vec<Version<'d>>, ModuleError> {
        let data = |name| self.section_named(name).map(|(_, section)| section.data);
        let mut versions = entries(data(ENTRIES).unwrap_or_default())?;
        versions.extend(match (data(EXTENDED_CRCS), data(EXTENDED_NAMES)) {
            (None, None) => Vec::new(),
            (Some(crcs), Some(names)) => extended(crcs, names)?,
            (Some(_), None) => return Err(malformed(EXTENDED_CRCS, 0, "there is no __version_ext_names")),
            (None, Some(_)) => return Err(malformed(EXTENDED_NAMES, 0, "there is no __version_ext_crcs")),
        });
        Ok(versions)
    }
}

fn entries(data: &[u8]) -> Result<Vec<Version<'_>>, ModuleError> {
    let (entries, rest) = data.as_chunks::<ENTRY_BYTES>();
    bound(ENTRIES, entries.len())?;
    if !rest.is_empty() {
        return Err(malformed(ENTRIES, data.len(), "the last entry is cut off"));
    }
    let mut versions = Vec::new();
    for (index, entry) in entries.iter().enumerate() {
        let at = index * ENTRY_BYTES;
        let (crc, name) = entry.split_at(CRC_BYTES);
        let crc = crc.try_into().map_or(0, u64::from_le_bytes);
        let crc = u32::try_from(crc).map_err(|_| malformed(ENTRIES, at, "the checksum has more than 32 bits"))?;
        let end = name.iter().position(|byte| *byte == 0);
        let end = end.ok_or_else(|| malformed(ENTRIES, at, "the name has no end"))?;
        versions.push((text(ENTRIES, at, name.get(..end).unwrap_or_default())?, crc));
    }
    Ok(versions)
}

fn extended<'d>(crcs: &'d [u8], names: &'d [u8]) -> Result<Vec<Version<'d>>, ModuleError> {
    let (crcs, rest) = crcs.as_chunks::<4>();
    bound(EXTENDED_CRCS, crcs.len())?;
    if !rest.is_empty() {
        return Err(malformed(EXTENDED_CRCS, crcs.len() * 4, "the last checksum is cut off"));
    }
    let Some((0, all)) = names.split_last() else {
        return Err(malformed(EXTENDED_NAMES, names.len(), "the last name has no end"));
    };
    let mut names = all.split(|byte| *byte == 0);
    let mut versions = Vec::new();
    let mut at = 0;
    for crc in crcs {
        let name = names
            .next()
            .ok_or_else(|| malformed(EXTENDED_NAMES, at, "there are fewer names than checksums"))?;
        versions.push((text(EXTENDED_NAMES, at, name)?, u32::from_le_bytes(*crc)));
        at += name.len() + 1;
    }
    match names.next() {
        Some(_) => Err(malformed(EXTENDED_NAMES, at, "there are more names than checksums")),
        None => Ok(versions),
    }
}

fn text<'d>(section: &'static str, at: usize, name: &'d [u8]) -> Result<&'d str, ModuleError> {
    let text = std::str::from_utf8(name).map_err(|_| malformed(section, at, "the name is not UTF-8"))?;
    if text.is_empty() {
        return Err(malformed(section, at, "the name is empty"));
    }
    Ok(text)
}

fn bound(section: &'static str, found: usize) -> Result<(), ModuleError> {
    if found > VERSIONS_MAX {
        return Err(ModuleError::TooMany {
            what: section,
            found,
            max: VERSIONS_MAX,
        });
    }
    Ok(())
}

fn malformed(section: &'static str, at: usize, problem: &'static str) -> ModuleError {
    ModuleError::Versions { section, at, problem }
}

#[cfg(test)]
mod tests {
    use crate::module::PatchModule;
    use crate::module::testing::TestElf;
    use object::elf::SHF_ALLOC;

    /// The symbols of a module with these sections, or the error.
    fn versions(sections: &[(&'static str, &[u8])]) -> Result<Vec<(String, u32)>, String> {
        let mut elf = TestElf::livepatch(&[0xc3]);
        for (name, data) in sections {
            elf.section(name, SHF_ALLOC.0, data);
        }
        let file = elf.build();
        let module = PatchModule::parse(&file).unwrap();
        let versions = module.versions().map_err(|error| error.to_string())?;
        Ok(versions.into_iter().map(|(name, crc)| (name.to_owned(), crc)).collect())
    }

    fn entry(name: &[u8], crc: u64) -> Vec<u8> {
        let mut entry = [&crc.to_le_bytes()[..], name].concat();
        entry.resize(64, 0);
        entry
    }

    #[test]
    fn both_forms_are_read() {
        let plain = [entry(b"printk", 0x1234_5678), entry(b"kfree", 7)].concat();
        let all = versions(&[
            ("__versions", &plain),
            ("__version_ext_crcs", &[1, 0, 0, 0, 2, 0, 0, 0x80]),
            ("__version_ext_names", b"_RNv\0kfree\0"),
        ]);
        let expected = [
            ("printk", 0x1234_5678),
            ("kfree", 7),
            ("_RNv", 1),
            ("kfree", 0x8000_0002),
        ];
        assert_eq!(all.unwrap(), expected.map(|(name, crc)| (name.to_owned(), crc)));
        assert_eq!(versions(&[]), Ok(Vec::new()));
    }

    #[test]
    fn what_is_cut_off_or_damaged_is_an_error() {
        let whole = entry(b"printk", 7);
        let endless = entry(&[b'a'; 56], 7);
        for (data, problem) in [
            (&whole[..63], "the last entry is cut off"),
            (&whole[..8], "the last entry is cut off"),
            (&entry(b"printk", 1 << 32), "the checksum has more than 32 bits"),
            (&endless, "the name has no end"),
            (&entry(b"", 7), "the name is empty"),
            (&entry(b"\xff", 7), "the name is not UTF-8"),
        ] {
            let error = versions(&[("__versions", data)]).unwrap_err();
            assert!(error.contains(problem) && error.contains("__versions"), "{error}");
        }
    }

    #[test]
    fn names_and_checksums_of_the_extended_form_must_be_as_many() {
        for (crcs, names, problem) in [
            (&[1, 0, 0, 0][..], &b"a\0b\0"[..], "more names than checksums"),
            (&[1, 0, 0, 0, 2, 0, 0, 0], b"a\0", "fewer names than checksums"),
            (&[1, 0, 0], b"a\0", "the last checksum is cut off"),
            (&[1, 0, 0, 0], b"a", "the last name has no end"),
        ] {
            let error = versions(&[("__version_ext_crcs", crcs), ("__version_ext_names", names)]).unwrap_err();
            assert!(error.contains(problem), "{error}");
        }
        let error = versions(&[("__version_ext_names", b"a\0")]).unwrap_err();
        assert!(error.contains("there is no __version_ext_crcs"), "{error}");
    }
}
