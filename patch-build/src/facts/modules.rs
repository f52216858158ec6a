//! The modules that came with a kernel.

use std::fs;
use std::path::{Path, PathBuf};

use super::module_name;
use crate::{cache, command};

/// Why a module could not be read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no folder of modules.
    #[error("module {name} was not looked for: no folder with the kernel's modules is known")]
    NoFolder {
        /// The module.
        name: String,
    },
    /// The kernel has no such module.
    #[error("{} lists no module {name}", list.display())]
    Unknown {
        /// The module.
        name: String,
        /// The list of modules.
        list: PathBuf,
    },
    /// A file could not be read.
    #[error(transparent)]
    Files(#[from] cache::Error),
    /// A program of the host failed.
    #[error(transparent)]
    Command(#[from] command::Error),
}

/// The folder with a kernel's modules, `lib/modules/RELEASE`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Modules(Option<PathBuf>);

impl Modules {
    /// Those in that folder; none where there is no folder.
    pub fn new(folder: Option<PathBuf>) -> Self {
        Self(folder)
    }

    /// Whether the kernel has that module; what is not known counts as yes.
    pub fn has(&self, name: &str) -> Result<bool, Error> {
        if self.0.is_none() {
            return Ok(true);
        }
        Ok(self.list()?.iter().any(|file| module_name(file) == name))
    }

    /// The modules' files, relative to the folder: `kernel/crypto/af_alg.ko`. None where there is no folder.
    pub fn list(&self) -> Result<Vec<String>, Error> {
        let Some(folder) = &self.0 else {
            return Ok(Vec::new());
        };
        // A package's list; depmod's own list, modules.dep, appears only where the package is installed.
        let list = folder.join("modules.order");
        let text = fs::read_to_string(&list).map_err(cache::Error::io("read", &list))?;
        // The build's own lists name objects.
        let name = |file: &str| format!("{}.ko", file.trim_end_matches(".ko").trim_end_matches(".o"));
        Ok(text.lines().map(name).collect())
    }

    /// The modules' names, as `/proc/modules` has them.
    pub fn names(&self) -> Result<Vec<String>, Error> {
        Ok(self.list()?.iter().map(|file| module_name(file)).collect())
    }

    /// The file of a module, decompressed: the module as it was shipped, with its symbols.
    pub fn read(&self, name: &str) -> Result<Vec<u8>, Error> {
        let folder = self
            .0
            .as_deref()
            .ok_or_else(|| Error::NoFolder { name: name.to_owned() })?;
        let list = self.list()?;
        let file = list
            .iter()
            .find(|file| module_name(file) == name)
            .ok_or_else(|| Error::Unknown {
                name: name.to_owned(),
                list: folder.join("modules.order"),
            })?;
        read(&folder.join(file))
    }
}

/// A module's file; lists name it without the suffix of its compression (6.1 has none, 6.12 `.xz`).
fn read(listed: &Path) -> Result<Vec<u8>, Error> {
    for (suffix, program) in [(".xz", "xz"), (".zst", "zstd"), (".gz", "gzip")] {
        let packed = PathBuf::from(format!("{}{suffix}", listed.display()));
        if packed.exists() {
            return Ok(command::output(
                program,
                &["-dcq", &packed.to_string_lossy()],
                Path::new("/"),
            )?);
        }
    }
    Ok(fs::read(listed).map_err(cache::Error::io("read", listed))?)
}
