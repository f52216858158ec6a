//! Other versions of QEMU, unpacked beside the installed one.

use std::path::{Path, PathBuf};

use crate::cache::{self, Cache};
use crate::packages;

/// The version of bookworm: its packages, with all that they need beside the libraries of the installed QEMU.
const BOOKWORM: [(&str, &str); 5] = [
    ("qemu-system-x86", "1:7.2+dfsg-7+deb12u18+b3"),
    ("qemu-system-common", "1:7.2+dfsg-7+deb12u18+b3"),
    ("qemu-system-data", "1:7.2+dfsg-7+deb12u18"),
    ("seabios", "1.16.2-1"),
    ("ipxe-qemu", "1.0.0+git-20190125.36a4c85-5.1"),
];

/// Why a version could not be had.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A package of it could not be had.
    #[error(transparent)]
    Package(#[from] packages::Error),
    /// The cache could not be used.
    #[error(transparent)]
    Cache(#[from] cache::Error),
}

/// QEMU 7.2, the program. It finds its firmware where it would be installed, relative to itself (`qemu_find_file`, QEMU 5.2
/// and later), so all its packages are unpacked into one folder.
pub fn bookworm() -> Result<PathBuf, Error> {
    let cache = Cache::from_env()?;
    let folder = cache.folder("qemu/7.2-bookworm", |folder| unpack(&cache, folder))?;
    Ok(folder.join("usr/bin/qemu-system-x86_64"))
}

fn unpack(cache: &Cache, folder: &Path) -> Result<(), Error> {
    for (name, version) in BOOKWORM {
        packages::fetch_into(cache, name, Some(version))?.unpack_into(folder)?;
    }
    Ok(())
}
