//! The Debian kernels that guests run: a table of those that the tests refer to, and any other by its package's name.

use std::borrow::Cow;
use std::fs;
use std::path::{Path, PathBuf};

use patch_build::headers::{self, Headers};

use crate::cache;
use crate::packages;

/// What the names of the packages begin with that a kernel comes in since 7.2: the image, its modules, and what is known of
/// both.
const PARTS: [&str; 3] = ["linux-binary-", "linux-modules-", "linux-base-"];

/// Why a kernel could not be had.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Its package could not be had.
    #[error(transparent)]
    Package(#[from] packages::Error),
    /// The package has no kernel, or more than one.
    #[error("package {package} has {found} kernels, not one: it is no kernel image")]
    NotOneImage {
        /// The package's name.
        package: String,
        /// How many kernels there are.
        found: usize,
    },
    /// The package has neither a kernel nor depends on one.
    #[error("package {package} has no folder boot, and depends on no {prefix}… package: it is no kernel image")]
    NoPart {
        /// The package's name.
        package: String,
        /// What the wanted package's name begins with.
        prefix: &'static str,
    },
    /// The unpacked package could not be read.
    #[error(transparent)]
    Files(#[from] cache::Error),
}

/// A kernel, by the Debian package that it comes in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kernel {
    label: Cow<'static, str>,
    package: Cow<'static, str>,
    version: Option<Cow<'static, str>>,
}

impl Kernel {
    /// 6.1 for clouds, from before the security updates whose fixes the demo and the tests apply.
    pub const CLOUD_6_1: Self = Self::pinned("6.1-cloud", "linux-image-6.1.0-47-cloud-amd64", "6.1.170-3");
    /// 6.1 for any hardware, of the same source as [`Kernel::CLOUD_6_1`].
    pub const GENERIC_6_1: Self = Self::pinned("6.1", "linux-image-6.1.0-47-amd64", "6.1.170-3");
    /// 6.12 for clouds, as built for bookworm.
    pub const CLOUD_6_12: Self = Self::pinned(
        "6.12-cloud",
        "linux-image-6.12.117+deb12-cloud-amd64",
        "6.12.117-1~deb12u1",
    );
    /// 6.1 with PREEMPT_RT, of the same source as [`Kernel::CLOUD_6_1`].
    pub const RT_6_1: Self = Self::pinned("6.1-rt", "linux-image-6.1.0-47-rt-amd64", "6.1.170-3");
    /// 6.12 for any hardware, as built for bookworm.
    pub const GENERIC_6_12: Self = Self::pinned("6.12", "linux-image-6.12.117+deb12-amd64", "6.12.117-1~deb12u1");
    /// 5.10 for clouds, of bullseye.
    pub const CLOUD_5_10: Self = Self::pinned("5.10-cloud", "linux-image-5.10.0-46-cloud-amd64", "5.10.262-1");
    /// 5.10 for any hardware, of bullseye.
    pub const GENERIC_5_10: Self = Self::pinned("5.10", "linux-image-5.10.0-46-amd64", "5.10.262-1");
    /// 7.2 for clouds, of sid.
    pub const CLOUD_7_2: Self = Self::pinned("7.2-cloud", "linux-image-7.2.13+deb14-cloud-amd64", "7.2.13-1");
    /// 7.2 for any hardware, of sid.
    pub const GENERIC_7_2: Self = Self::pinned("7.2", "linux-image-7.2.13+deb14-amd64", "7.2.13-1");
    /// All kernels with a label of their own, the oldest first.
    pub const TABLE: [Self; 9] = [
        Self::CLOUD_5_10,
        Self::GENERIC_5_10,
        Self::CLOUD_6_1,
        Self::GENERIC_6_1,
        Self::RT_6_1,
        Self::CLOUD_6_12,
        Self::GENERIC_6_12,
        Self::CLOUD_7_2,
        Self::GENERIC_7_2,
    ];

    const fn pinned(label: &'static str, package: &'static str, version: &'static str) -> Self {
        Self {
            label: Cow::Borrowed(label),
            package: Cow::Borrowed(package),
            version: Some(Cow::Borrowed(version)),
        }
    }

    /// The kernel with this label in [`Kernel::TABLE`], or the one in the package of this name (`NAME` or
    /// `NAME=VERSION`).
    pub fn named(name: &str) -> Self {
        if let Some(kernel) = Self::TABLE.into_iter().find(|kernel| kernel.label == name) {
            return kernel;
        }
        let (package, version) = match name.split_once('=') {
            Some((package, version)) => (package, Some(version.to_owned().into())),
            None => (name, None),
        };
        Self {
            label: name.to_owned().into(),
            package: package.to_owned().into(),
            version,
        }
    }

    /// The short name by which [`Kernel::named`] finds it.
    pub fn label(&self) -> &str {
        &self.label
    }

    /// The name of its package.
    pub fn package(&self) -> &str {
        &self.package
    }

    /// The version of its package, if it is bound to one.
    pub fn version(&self) -> Option<&str> {
        self.version.as_deref()
    }

    /// What the kernel's modules are built with, in the user's cache.
    pub fn headers(&self) -> Result<Headers, headers::Error> {
        let release = self.package.strip_prefix("linux-image-").unwrap_or(&self.package);
        Headers::fetch(&cache::Cache::from_env()?, release, self.version())
    }

    /// Fetches the kernel into the user's cache.
    pub fn fetch(&self) -> Result<KernelFiles, Error> {
        let image = packages::fetch(&self.package, self.version())?;
        let tree = image.unpacked()?;
        if tree.join("boot").is_dir() {
            return KernelFiles::in_tree(&self.package, &tree);
        }
        // Since 7.2 the image package is empty, and depends on those that the kernel is in.
        let cache = cache::Cache::from_env()?;
        let key = format!("kernels/{}_{}", image.name(), image.version());
        let tree = cache.folder(&key, |root| {
            for prefix in PARTS {
                let depends = image.depends()?;
                let (name, version) = packages::dependency(&depends, prefix).ok_or_else(|| Error::NoPart {
                    package: self.package.clone().into_owned(),
                    prefix,
                })?;
                packages::fetch_into(&cache, name, version)?.unpack_into(root)?;
            }
            Ok::<(), Error>(())
        })?;
        KernelFiles::in_tree(&self.package, &tree)
    }
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
}

impl KernelFiles {
    fn in_tree(package: &str, tree: &Path) -> Result<Self, Error> {
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
                package: package.to_owned(),
                found: releases.len(),
            });
        };
        let (file, modules) = if is_old {
            let file = |name| folder.join(format!("{name}-{release}"));
            (
                [file("vmlinuz"), file("config")],
                tree.join("lib/modules").join(release),
            )
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
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_label_names_a_kernel_of_the_table() {
        assert_eq!(Kernel::named("6.1-cloud"), Kernel::CLOUD_6_1);
    }

    #[test]
    fn any_other_name_is_a_package_with_or_without_version() {
        let kernel = Kernel::named("linux-image-6.1.0-48-amd64");
        assert_eq!(
            (kernel.package(), kernel.version()),
            ("linux-image-6.1.0-48-amd64", None)
        );
        let kernel = Kernel::named("linux-image-6.1.0-48-amd64=6.1.172-1");
        assert_eq!(
            (kernel.package(), kernel.version()),
            ("linux-image-6.1.0-48-amd64", Some("6.1.172-1"))
        );
    }

    #[test]
    fn the_table_has_no_label_twice() {
        let labels: std::collections::BTreeSet<_> = Kernel::TABLE.iter().map(|kernel| kernel.label.clone()).collect();
        assert_eq!(labels.len(), Kernel::TABLE.len());
    }
}
