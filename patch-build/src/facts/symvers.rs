//! `Module.symvers`: what the kernel and its modules export, with the checksum of each symbol's type.

use std::collections::HashMap;

/// One exported symbol.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Export {
    /// The checksum of its type, which a module that uses it must have in `__versions`.
    pub crc: u32,
    /// Who exports it: `None` is the kernel itself, else the module's name, as `/proc/modules` has it.
    pub module: Option<String>,
    /// Whether only modules of a GPL-compatible licence may use it.
    pub gpl_only: bool,
    /// The namespace that a module must import; empty for none.
    pub namespace: String,
}

/// All exported symbols by name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Exports(HashMap<String, Export>);

impl Exports {
    /// Reads the text of a `Module.symvers`: lines of CRC, symbol, file, kind and namespace, separated by tabs (scripts/mod/modpost.c
    /// of 6.1, `write_dump`). Lines of another form are skipped.
    pub fn parse(text: &str) -> Self {
        Self(text.lines().filter_map(line).collect())
    }

    /// The export of that name.
    pub fn get(&self, symbol: &str) -> Option<&Export> {
        self.0.get(symbol)
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

fn line(line: &str) -> Option<(String, Export)> {
    let mut fields = line.split('\t');
    let crc = u32::from_str_radix(fields.next()?.strip_prefix("0x")?, 16).ok()?;
    let (symbol, file, kind) = (fields.next()?, fields.next()?, fields.next()?);
    let export = Export {
        crc,
        module: (file != "vmlinux").then(|| module_name(file)),
        gpl_only: kind.ends_with("_GPL"),
        namespace: fields.next().unwrap_or_default().to_owned(),
    };
    Some((symbol.to_owned(), export))
}

/// The name that `/proc/modules` has for a module's file (`net/9p/9pnet-fd`).
pub(crate) fn module_name(file: &str) -> String {
    let base = file.rsplit('/').next().unwrap_or(file);
    base.strip_suffix(".ko").unwrap_or(base).replace('-', "_")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_export_has_its_checksum_its_owner_its_licence_and_its_namespace() {
        let exports = Exports::parse(
            "0x2e2b40d2\tstrncat\tvmlinux\tEXPORT_SYMBOL\t\n\
             0xffffffff\taf_alg_poll\tcrypto/af-alg\tEXPORT_SYMBOL_GPL\tCRYPTO\nno line\n",
        );
        assert_eq!(exports.len(), 2);
        assert_eq!(
            exports.get("strncat"),
            Some(&Export {
                crc: 0x2e2b_40d2,
                module: None,
                gpl_only: false,
                namespace: String::new()
            })
        );
        let poll = exports.get("af_alg_poll").unwrap();
        assert_eq!(
            (poll.module.as_deref(), poll.gpl_only, poll.namespace.as_str()),
            (Some("af_alg"), true, "CRYPTO")
        );
    }
}
