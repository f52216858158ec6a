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

    /// The file of a module, decompressed: the module as it was shipped, with its symbols.
    pub fn read(&self, name: &str) -> Result<Vec<u8>, Error> {
        let folder = self
            .0
            .as_deref()
            .ok_or_else(|| Error::NoFolder { name: name.to_owned() })?;
        // A package's list; depmod's own list, modules.dep, appears only where the package is installed.
        let list = folder.join("modules.order");
        let text = fs::read_to_string(&list).map_err(cache::Error::io("read", &list))?;
        let file = text
            .lines()
            .find(|file| module_name(&file.replace(".o", ".ko")) == name)
            .ok_or_else(|| Error::Unknown {
                name: name.to_owned(),
                list: list.clone(),
            })?;
        read(&folder.join(Path::new(file).with_extension("ko")))
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
