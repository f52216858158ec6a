//! The kernel that a patch is made for, by the Debian package that it comes in.

use std::fs;
use std::path::PathBuf;

use crate::cache::{self, Cache};
use crate::facts::Config;
use crate::kernel_files::{self, KernelFiles};
use crate::packages;
use crate::source::{Source, package};

/// Why a kernel is not known well enough to be built for.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A package could not be had.
    #[error(transparent)]
    Package(#[from] packages::Error),
    /// The cache could not be used.
    #[error(transparent)]
    Cache(#[from] cache::Error),
    /// The kernel's package could not be had, or has none.
    #[error(transparent)]
    Kernel(#[from] kernel_files::Error),
    /// The build files of a kernel do not say which it is.
    #[error("{} has no line #define UTS_RELEASE \"…\"", path.display())]
    NoRelease {
        /// The file that should.
        path: PathBuf,
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

/// Where a kernel is that is no Debian package.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Own {
    /// Its source, as it was compiled, and clean (`make mrproper`).
    pub source: PathBuf,
    /// The folder that it was built in, or the headers that were made of it, as `/lib/modules/RELEASE/build`: with
    /// `Module.symvers` and `include/generated/utsrelease.h`.
    pub headers: PathBuf,
    /// Its configuration; else `.config` of those headers.
    pub config: Option<PathBuf>,
    /// The kernel: a bzImage or a `vmlinux`.
    pub image: PathBuf,
    /// The folder with its modules, `lib/modules/RELEASE`; only for patches of modules.
    pub modules: Option<PathBuf>,
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
        let kernel = KernelFiles::fetch(cache, name, version)?;
        let version = kernel.version.as_str();
        let headers = format!("linux-headers-{}", kernel.release);
        let headers = packages::fetch_into(cache, &headers, Some(version))?;
        let headers_tree = headers.unpacked()?.join("usr/src").join(headers.name());
        let series = series(version).ok_or_else(|| Error::NoSeries {
            package: name.to_owned(),
            version: version.to_owned(),
        })?;
        let source_name = format!("linux-source-{series}");
        progress(&format!("fetching {source_name}={version}"));
        let config = headers_tree.join(".config");
        let settings = fs::read_to_string(&config).map_err(cache::Error::io("read", &config))?;
        let source = package::whole(cache, &source_name, version, &Config::parse(&settings))?;
        let mut packages = kernel.packages;
        packages.extend([
            format!("{}={}", headers.name(), headers.version()),
            format!("{source_name}={version}"),
        ]);
        Ok(Self {
            config,
            symvers: headers_tree.join("Module.symvers"),
            image: kernel.vmlinuz,
            modules: Some(kernel.modules),
            packages,
            release: kernel.release,
            source,
        })
    }

    /// A kernel that is no Debian package.
    pub fn own(own: &Own) -> Result<Self, Error> {
        let path = own.headers.join("include/generated/utsrelease.h");
        let text = fs::read_to_string(&path).map_err(cache::Error::io("read", &path))?;
        let release = release(&text).ok_or(Error::NoRelease { path })?.to_owned();
        let folder = fs::canonicalize(&own.source).map_err(cache::Error::io("find", &own.source))?;
        Ok(Self {
            release,
            source: Source {
                id: folder.display().to_string(),
                folder,
                fixed: false,
            },
            config: own.config.clone().unwrap_or_else(|| own.headers.join(".config")),
            symvers: own.headers.join("Module.symvers"),
            image: own.image.clone(),
            modules: own.modules.clone(),
            packages: Vec::new(),
        })
    }
}

/// The release in a `utsrelease.h`.
fn release(text: &str) -> Option<&str> {
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("#define UTS_RELEASE "))?;
    line.trim().strip_prefix('"')?.strip_suffix('"')
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
    fn the_release_of_a_kernel_of_ones_own_is_in_its_headers() {
        assert_eq!(
            release("/* x */\n#define UTS_RELEASE \"6.1.0-own\"\n"),
            Some("6.1.0-own")
        );
        assert_eq!(release("#define UTS_RELEASE 6"), None);
    }

    #[test]
    fn the_series_is_what_a_source_package_is_named_after() {
        assert_eq!(series("6.1.170-3"), Some("6.1"));
        assert_eq!(series("6.12.117-1~deb12u1"), Some("6.12"));
        assert_eq!(series("7.2-1"), Some("7.2"));
        assert_eq!((series("7"), series("x.1")), (None, None));
    }
}
