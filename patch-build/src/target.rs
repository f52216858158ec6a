//! The kernel that a patch is made for, by the Debian package that it comes in.

use std::fs;
use std::path::{Path, PathBuf};

use crate::cache::{self, Cache};
use crate::packages::{self, Package};
use crate::source::{Source, package};

/// How many packages may lead to the one that has the kernel: `linux-image-amd64`, `linux-image-RELEASE-amd64`,
/// `linux-binary-RELEASE-amd64`.
const HOPS_MAX: usize = 3;

/// Why a kernel is not known well enough to be built for.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A package could not be had.
    #[error(transparent)]
    Package(#[from] packages::Error),
    /// The cache could not be used.
    #[error(transparent)]
    Cache(#[from] cache::Error),
    /// A package has no kernel, or more than one.
    #[error("package {package} has {found} files boot/vmlinuz-*, not one, and depends on no other kernel package")]
    NotOneImage {
        /// The package's name.
        package: String,
        /// How many kernels there are.
        found: usize,
    },
    /// The package's version does not say which source it was made of.
    #[error("package {package}: no kernel series (as 6.1) in its version {version}")]
    NoSeries {
        /// The package's name.
        package: String,
        /// Its version.
        version: String,
    },
}

/// A kernel with all that building for it takes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// What `uname -r` says.
    pub release: String,
    /// The source that it was made of.
    pub source: Source,
    /// Its configuration.
    pub config: PathBuf,
    /// Its `Module.symvers`.
    pub symvers: PathBuf,
    /// The kernel: a bzImage or a `vmlinux`.
    pub image: PathBuf,
    /// The folder with its modules, `lib/modules/RELEASE`.
    pub modules: Option<PathBuf>,
    /// The packages that all this came from, as `NAME=VERSION`.
    pub packages: Vec<String>,
}

impl Target {
    /// The kernel in a Debian package (`NAME` or `NAME=VERSION`), with its headers and its source, fetched through apt unless
    /// they are in the cache.
    ///
    /// `progress` is told what takes time.
    pub fn package(cache: &Cache, name: &str, progress: &dyn Fn(&str)) -> Result<Self, Error> {
        let (name, version) = name
            .split_once('=')
            .map_or((name, None), |(name, version)| (name, Some(version)));
        progress(&format!("fetching {name}"));
        let (package, tree, release) = image(cache, name, version)?;
        let version = package.version();
        let headers = format!("linux-headers-{release}");
        let headers = packages::fetch_into(cache, &headers, Some(version))?;
        let headers_tree = headers.unpacked()?.join("usr/src").join(headers.name());
        let series = series(version).ok_or_else(|| Error::NoSeries {
            package: package.name().to_owned(),
            version: version.to_owned(),
        })?;
        let source_name = format!("linux-source-{series}");
        progress(&format!("fetching {source_name}={version}"));
        let source = package::whole(cache, &source_name, version)?;
        let spelled = |package: &Package| format!("{}={}", package.name(), package.version());
        Ok(Self {
            config: headers_tree.join(".config"),
            symvers: headers_tree.join("Module.symvers"),
            image: tree.join("boot").join(format!("vmlinuz-{release}")),
            modules: Some(modules(&tree, &release)),
            packages: vec![spelled(&package), spelled(&headers), format!("{source_name}={version}")],
            release,
            source,
        })
    }
}

/// The package that has the kernel, unpacked, and the kernel's release; metapackages lead to it.
fn image(cache: &Cache, name: &str, version: Option<&str>) -> Result<(Package, PathBuf, String), Error> {
    let mut package = packages::fetch_into(cache, name, version)?;
    for _ in 0..HOPS_MAX {
        let tree = package.unpacked()?;
        let releases = releases(&tree)?;
        if let [release] = releases.as_slice() {
            return Ok((package, tree, release.clone()));
        }
        let depends = package.depends()?;
        let next = ["linux-binary-", "linux-image-"]
            .iter()
            .find_map(|prefix| packages::dependency(&depends, prefix));
        match next {
            Some((name, version)) if releases.is_empty() => package = packages::fetch_into(cache, name, version)?,
            _ => {
                return Err(Error::NotOneImage {
                    package: package.name().to_owned(),
                    found: releases.len(),
                });
            }
        }
    }
    Err(Error::NotOneImage {
        package: package.name().to_owned(),
        found: 0,
    })
}

/// The releases of the kernels in an unpacked package.
fn releases(tree: &Path) -> Result<Vec<String>, cache::Error> {
    let boot = tree.join("boot");
    if !boot.exists() {
        return Ok(Vec::new());
    }
    let entries = fs::read_dir(&boot).map_err(cache::Error::io("list", &boot))?;
    let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    Ok(names
        .filter_map(|name| Some(name.strip_prefix("vmlinuz-")?.to_owned()))
        .collect())
}

/// Where a package keeps the modules: since Debian 13 below `usr`.
fn modules(tree: &Path, release: &str) -> PathBuf {
    let merged = tree.join("usr/lib/modules").join(release);
    if merged.exists() {
        merged
    } else {
        tree.join("lib/modules").join(release)
    }
}

/// `6.1` of `6.1.170-3`: a source package's name has it.
fn series(version: &str) -> Option<&str> {
    let (major, rest) = version.split_once('.')?;
    let minor = rest.split(|c: char| !c.is_ascii_digit()).next()?;
    let digits = |part: &str| !part.is_empty() && part.chars().all(|c| c.is_ascii_digit());
    (digits(major) && digits(minor)).then(|| version.get(..major.len() + 1 + minor.len()))?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_series_is_what_a_source_package_is_named_after() {
        assert_eq!(series("6.1.170-3"), Some("6.1"));
        assert_eq!(series("6.12.117-1~deb12u1"), Some("6.12"));
        assert_eq!(series("7.2-1"), Some("7.2"));
        assert_eq!((series("7"), series("x.1")), (None, None));
    }
}
