//! A kernel out of its Debian packages: image, configuration, modules.

use std::fs;
use std::path::{Path, PathBuf};

use crate::cache::{self, Cache};
use crate::packages::{self, Package};

/// What the names of the packages begin with that a kernel comes in since 7.2: the image, its modules, and what is known of
/// both.
const PARTS: [&str; 3] = ["linux-binary-", "linux-modules-", "linux-base-"];

/// How many packages may lead to the one that has the kernel: `linux-image-amd64` to `linux-image-RELEASE-amd64`.
const HOPS_MAX: usize = 3;

/// Why a kernel could not be had.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Its package could not be had.
    #[error(transparent)]
    Package(#[from] packages::Error),
    /// A release in place of a package.
    #[error("{release} is no package but a kernel's release; Debian's package of that kernel is linux-image-{release}")]
    Release {
        /// The release.
        release: String,
    },
    /// The package has no kernel, or more than one.
    #[error("package {package} has {found} kernels, not one: it is no kernel image")]
    NotOneImage {
        /// The package's name.
        package: String,
        /// How many kernels there are.
        found: usize,
    },
    /// The package has neither a kernel nor depends on one.
    #[error("package {package} has no folder boot, and depends on no package of a kernel: it is no kernel image")]
    NoKernel {
        /// The package's name.
        package: String,
    },
    /// The unpacked package could not be read.
    #[error(transparent)]
    Files(#[from] cache::Error),
}

/// What a kernel package installs, in the cache.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KernelFiles {
    /// What `uname -r` says in the guest.
    pub release: String,
    /// The compressed kernel, as a boot loader takes it.
    pub vmlinuz: PathBuf,
    /// The configuration that the kernel was built with.
    pub config: PathBuf,
    /// The folder with the kernel's modules, `lib/modules/RELEASE`.
    pub modules: PathBuf,
    /// The version of the package that has the kernel.
    pub version: String,
    /// The packages that all this came from, as `NAME=VERSION`.
    pub packages: Vec<String>,
}

impl KernelFiles {
    /// Fetches the kernel package `name`, in that version if one is given, else in the one that apt would install.
    pub fn fetch(cache: &Cache, name: &str, version: Option<&str>) -> Result<Self, Error> {
        if name.starts_with(|first: char| first.is_ascii_digit()) {
            return Err(Error::Release {
                release: name.to_owned(),
            });
        }
        let mut image = packages::fetch_into(cache, name, version)?;
        for _ in 0..HOPS_MAX {
            let tree = image.unpacked()?;
            if tree.join("boot").is_dir() {
                return Self::in_tree(&[image], &tree);
            }
            let depends = image.depends()?;
            let parts = PARTS.map(|prefix| packages::dependency(&depends, prefix));
            if let [Some(binary), Some(modules), Some(base)] = parts {
                let parts = [binary, modules, base].map(|(name, version)| packages::fetch_into(cache, name, version));
                let [binary, modules, base] = parts;
                let parts = [binary?, modules?, base?];
                let key = format!("kernels/{}_{}", image.name(), image.version());
                let tree = cache.folder(&key, |root| parts.iter().try_for_each(|part| part.unpack_into(root)))?;
                return Self::in_tree(&parts, &tree);
            }
            // What is always the newest kernel of its kind is empty, too.
            let (name, version) = packages::dependency(&depends, "linux-image-").ok_or_else(|| Error::NoKernel {
                package: image.name().to_owned(),
            })?;
            image = packages::fetch_into(cache, name, version)?;
        }
        Err(Error::NoKernel {
            package: image.name().to_owned(),
        })
    }

    fn in_tree(packages: &[Package], tree: &Path) -> Result<Self, Error> {
        let old = tree.join("boot");
        let is_old = old.is_dir();
        let folder = if is_old { old } else { tree.join("usr/lib/modules") };
        let entries = fs::read_dir(&folder).map_err(cache::Error::io("list", &folder))?;
        let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        let releases: Vec<String> = if is_old {
            names
                .filter_map(|name| Some(name.strip_prefix("vmlinuz-")?.to_owned()))
                .collect()
        } else {
            names
                .filter(|name| folder.join(name).join("vmlinuz").is_file())
                .collect()
        };
        let [release] = releases.as_slice() else {
            return Err(Error::NotOneImage {
                package: spelled(packages).join(", "),
                found: releases.len(),
            });
        };
        let (file, modules) = if is_old {
            let file = |name| folder.join(format!("{name}-{release}"));
            ([file("vmlinuz"), file("config")], modules_in(tree, release))
        } else {
            let modules = folder.join(release);
            ([modules.join("vmlinuz"), modules.join("config")], modules)
        };
        let [vmlinuz, config] = file;
        Ok(Self {
            release: release.clone(),
            vmlinuz,
            config,
            modules,
            version: packages
                .first()
                .map(|package| package.version().to_owned())
                .unwrap_or_default(),
            packages: spelled(packages),
        })
    }
}

/// The folder with a kernel's modules in an unpacked package: Debian 13's packages have it below `usr`.
fn modules_in(tree: &Path, release: &str) -> PathBuf {
    let [old, new] = ["lib/modules", "usr/lib/modules"].map(|folder| tree.join(folder).join(release));
    if new.is_dir() { new } else { old }
}

fn spelled(packages: &[Package]) -> Vec<String> {
    let spelled = |package: &Package| format!("{}={}", package.name(), package.version());
    packages.iter().map(spelled).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_are_found_where_the_release_of_debian_puts_them() {
        let root = std::env::temp_dir().join(format!("vmpatch-modules-in-{}", std::process::id()));
        for folder in ["lib/modules", "usr/lib/modules"] {
            let tree = root.join(folder.replace('/', "-"));
            let modules = tree.join(folder).join("6.12.0-x");
            fs::create_dir_all(&modules).unwrap();
            assert_eq!(modules_in(&tree, "6.12.0-x"), modules);
        }
        fs::remove_dir_all(&root).unwrap();
    }

    /// What `uname -r` says is at hand sooner than the package's name.
    #[test]
    fn a_release_is_refused_with_the_name_of_its_package() {
        let nowhere = Cache::at(PathBuf::from("/nonexistent"));
        let refused = KernelFiles::fetch(&nowhere, "6.1.0-47-amd64", None).unwrap_err();
        assert!(
            refused.to_string().ends_with("is linux-image-6.1.0-47-amd64"),
            "{refused}"
        );
    }
}
