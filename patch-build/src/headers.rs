//! What a kernel's modules are built with, out of Debian's headers packages.

use std::fs;
use std::path::{Path, PathBuf};

use crate::cache::{self, Cache};
use crate::digest;
use crate::packages::{self, Package};
use crate::runtime::{self, Runtime};
use crate::toolchain::{self, Toolchain};

/// Why a kernel's build files could not be had.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A package could not be had.
    #[error(transparent)]
    Package(#[from] packages::Error),
    /// The cache could not be used.
    #[error(transparent)]
    Cache(#[from] cache::Error),
    /// The libraries of the kernel's tools could not be had.
    #[error(transparent)]
    Runtime(#[from] runtime::Error),
    /// A headers package does not say where the rest of the kernel's build files is.
    #[error("{package} depends on no {prefix}… package, but on: {found}")]
    NoDependency {
        /// The headers package.
        package: String,
        /// What the wanted package's name begins with.
        prefix: &'static str,
        /// All that the package depends on.
        found: String,
    },
    /// There is no compiler like the one that made the kernel.
    #[error(transparent)]
    Toolchain(#[from] toolchain::Error),
}

/// The build files of one kernel: its configuration and generated headers, the headers that all flavours share, and the
/// build's own scripts and tools. In the cache; nothing is installed.
#[derive(Clone, Debug)]
pub struct Headers {
    release: String,
    toolchain: Toolchain,
    id: String,
    folder: PathBuf,
    cache: Cache,
}

impl Headers {
    /// The build files for the kernel `release` (as `uname -r` says it), of that package version if one is given, else of
    /// the one that apt would install. Refused where the compiler that made the kernel is not to be had.
    pub fn fetch(cache: &Cache, release: &str, version: Option<&str>) -> Result<Self, Error> {
        let name = format!("linux-headers-{release}");
        let headers = packages::fetch_into(cache, &name, version)?;
        let parts = parts(cache, &headers)?;
        let versions: Vec<&str> = parts.iter().map(Package::version).collect();
        let id = digest(&versions);
        let root = cache.folder(&format!("kernel-trees/{release}_{id}"), |root| {
            parts.iter().try_for_each(|part| part.unpack_into(root))?;
            make_movable(&root.join("usr/src").join(&name))?;
            if runtime::is_needed(&parts)? {
                Runtime::fetch(cache, &parts)?.give_to(root)?;
            }
            Ok::<(), Error>(())
        })?;
        let folder = root.join("usr/src").join(&name);
        let toolchain = Toolchain::fetch(cache, release, &folder.join(".config"))?;
        Ok(Self {
            release: release.to_owned(),
            toolchain,
            id,
            folder,
            cache: cache.clone(),
        })
    }

    /// The kernel's release, as `uname -r` says it.
    pub fn release(&self) -> &str {
        &self.release
    }

    /// The folder to run make in, as for the `build` link in `/lib/modules`.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The kernel's compiler: the first line of its `--version`.
    pub fn compiler(&self) -> &str {
        self.toolchain.version()
    }

    /// The value of `PATH` with which that compiler is found: the machine's own, or one out of a package.
    pub fn search_path(&self) -> String {
        self.toolchain.search_path()
    }

    /// Where what is built for this kernel is kept.
    pub fn cache(&self) -> &Cache {
        &self.cache
    }

    /// Names the versions of the packages that the tree was made of.
    pub fn id(&self) -> &str {
        &self.id
    }
}

/// The headers package and the two that it cannot do without.
fn parts(cache: &Cache, headers: &Package) -> Result<[Package; 3], Error> {
    let depends = headers.depends()?;
    let part = |prefix| {
        let (name, version) = packages::dependency(&depends, prefix).ok_or_else(|| Error::NoDependency {
            package: headers.name().to_owned(),
            prefix,
            found: depends.trim().to_owned(),
        })?;
        packages::fetch_into(cache, name, version).map_err(Error::from)
    };
    Ok([headers.clone(), part("linux-headers-")?, part("linux-kbuild-")?])
}

/// Makes a kernel's headers work outside `/usr/src`: its Makefile is one line that includes the shared one by its
/// absolute path; all links are relative already. The `vmlinux` with nothing but type information, which newer packages
/// have, goes away: with it the build wants pahole.
fn make_movable(headers: &Path) -> Result<(), Error> {
    let makefile = headers.join("Makefile");
    let text = fs::read_to_string(&makefile).map_err(cache::Error::io("read", &makefile))?;
    let text = text.replace("/usr/src/", "../");
    fs::write(&makefile, text).map_err(cache::Error::io("write", &makefile))?;
    let vmlinux = headers.join("vmlinux");
    if vmlinux.exists() {
        fs::remove_file(&vmlinux).map_err(cache::Error::io("remove", &vmlinux))?;
    }
    Ok(())
}
