//! What is known about the kernel that a patch is made for, without a running guest.

mod config;
mod image;
mod modules;
mod symvers;

use std::fs;
use std::path::{Path, PathBuf};

use guest_core::kernel::kallsyms::Kallsyms;

use crate::cache;

pub use config::Config;
pub use image::Error as ImageError;
pub use modules::{Error as ModuleError, Modules};
pub(crate) use symvers::module_name;
pub use symvers::{Export, Exports};

/// Why the facts could not be had.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file could not be read.
    #[error(transparent)]
    Files(#[from] cache::Error),
    /// The kernel image could not be read.
    #[error(transparent)]
    Image(#[from] ImageError),
}

/// What is known about a kernel.
#[derive(Debug)]
pub struct KernelFacts {
    /// What `uname -r` says.
    pub release: String,
    /// What a module's `vermagic=` must be.
    pub vermagic: String,
    /// Its configuration.
    pub config: Config,
    /// The kernel as an ELF file, linked but not relocated: sections and their bytes, no symbols of its own.
    pub vmlinux: Vec<u8>,
    /// The kernel's own symbols, in the order in which sympos counts, at the addresses that `vmlinux` has.
    pub symbols: Kallsyms,
    /// What the kernel and its modules export.
    pub exports: Exports,
    /// The modules that came with it.
    pub modules: Modules,
}

/// Where the facts are read from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sources<'a> {
    /// What `uname -r` says.
    pub release: &'a str,
    /// See [`KernelFacts::vermagic`].
    pub vermagic: &'a str,
    /// The `.config`.
    pub config: &'a Path,
    /// A bzImage or a `vmlinux`.
    pub image: &'a Path,
    /// The `Module.symvers`.
    pub symvers: &'a Path,
    /// The folder of the kernel's modules, `lib/modules/RELEASE`, where there is one.
    pub modules: Option<PathBuf>,
}

impl KernelFacts {
    /// Reads them all.
    pub fn read(sources: &Sources<'_>) -> Result<Self, Error> {
        let image = fs::read(sources.image).map_err(cache::Error::io("read", sources.image))?;
        let vmlinux = image::vmlinux(sources.image, image)?;
        let symbols = image::symbols(sources.image, &vmlinux)?;
        Ok(Self {
            release: sources.release.to_owned(),
            vermagic: sources.vermagic.to_owned(),
            config: Config::parse(&text(sources.config)?),
            vmlinux,
            symbols,
            exports: Exports::parse(&text(sources.symvers)?),
            modules: Modules::new(sources.modules.clone()),
        })
    }
}

fn text(path: &Path) -> Result<String, cache::Error> {
    fs::read_to_string(path).map_err(cache::Error::io("read", path))
}
