//! `.modinfo`: what a module says of itself, `key=value` strings with a NUL behind each
//! (include/linux/moduleparam.h, `MODULE_INFO`).

use super::ModuleError;

/// Largest `.modinfo`, in bytes: that of a driver with hundreds of aliases stays below.
const BYTES_MAX: usize = 1 << 20;

/// The entries of a module's `.modinfo`, in the file's order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModInfo<'d> {
    entries: Vec<(&'d str, &'d str)>,
}

impl<'d> ModInfo<'d> {
    pub(crate) fn parse(section: &'d [u8]) -> Result<Self, ModuleError> {
        if section.len() > BYTES_MAX {
            return Err(ModuleError::TooMany {
                what: "bytes in .modinfo",
                found: section.len(),
                max: BYTES_MAX,
            });
        }
        let mut entries = Vec::new();
        let mut at = 0;
        for raw in section.split(|byte| *byte == 0) {
            // The linker pads between strings with NULs: empty ones mean nothing.
            if !raw.is_empty() {
                let text = std::str::from_utf8(raw).map_err(|_| ModuleError::ModinfoText { at })?;
                entries.push(text.split_once('=').unwrap_or((text, "")));
            }
            at += raw.len() + 1;
        }
        Ok(Self { entries })
    }

    /// The first value of `key`.
    pub fn get(&self, key: &str) -> Option<&'d str> {
        self.all(key).next()
    }

    /// Every value of `key`: `import_ns`, `alias` and others come more than once.
    pub fn all<'a>(&'a self, key: &'a str) -> impl Iterator<Item = &'d str> + 'a {
        self.entries
            .iter()
            .filter(move |(k, _)| *k == key)
            .map(|(_, value)| *value)
    }

    /// The release that the module was built for: the first word of its `vermagic`, as `uname -r` prints it.
    pub fn release(&self) -> Option<&'d str> {
        self.get("vermagic")?.split_ascii_whitespace().next()
    }

    /// The other words of `vermagic`: `SMP`, `preempt`, `mod_unload`, `modversions` (include/linux/vermagic.h).
    pub fn configuration(&self) -> impl Iterator<Item = &'d str> {
        self.get("vermagic")
            .unwrap_or_default()
            .split_ascii_whitespace()
            .skip(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_split_at_the_first_equals_sign() {
        let info = ModInfo::parse(b"license=GPL\0\0\0parm=a=b\0livepatch=Y\0").unwrap();
        assert_eq!(info.get("license"), Some("GPL"));
        assert_eq!(info.get("parm"), Some("a=b"));
        assert_eq!(info.get("livepatch"), Some("Y"));
        assert_eq!(info.get("name"), None);
    }

    #[test]
    fn vermagic_is_a_release_and_words_of_configuration() {
        let info = ModInfo::parse(b"vermagic=6.1.0-47-cloud-amd64 SMP preempt mod_unload modversions \0").unwrap();
        assert_eq!(info.release(), Some("6.1.0-47-cloud-amd64"));
        assert_eq!(
            info.configuration().collect::<Vec<_>>(),
            ["SMP", "preempt", "mod_unload", "modversions"]
        );
    }

    #[test]
    fn repeated_keys_are_all_given() {
        let info = ModInfo::parse(b"import_ns=A\0import_ns=B\0").unwrap();
        assert_eq!(info.all("import_ns").collect::<Vec<_>>(), ["A", "B"]);
    }

    #[test]
    fn an_entry_that_is_not_text_is_named_by_its_offset() {
        assert_eq!(
            ModInfo::parse(b"a=b\0\xff=c\0"),
            Err(ModuleError::ModinfoText { at: 4 })
        );
    }
}
