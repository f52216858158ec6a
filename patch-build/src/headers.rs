//! What a kernel's modules are built with, out of Debian's headers packages.

use std::fs;
use std::path::{Path, PathBuf};

use crate::cache::{self, Cache};
use crate::packages::{self, Package};
use crate::{command, digest};

/// Why a kernel's build files could not be had.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A package could not be had.
    #[error(transparent)]
    Package(#[from] packages::Error),
    /// The cache could not be used.
    #[error(transparent)]
    Cache(#[from] cache::Error),
    /// A program of the host failed.
    #[error(transparent)]
    Command(#[from] command::Error),
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
    /// The kernel's configuration does not say which compiler made the kernel.
    #[error("{} has no CONFIG_CC_VERSION_TEXT", path.display())]
    NoCompilerText {
        /// The configuration.
        path: PathBuf,
    },
    /// The machine's compiler is not the one that made the kernel.
    #[error(
        "kernel {release} was made with {expected:?}, but this machine has {found:?}: no module of it would be like the kernel's own code"
    )]
    WrongCompiler {
        /// The kernel's release.
        release: String,
        /// The kernel's compiler, from its configuration.
        expected: String,
        /// The machine's, from its `--version`.
        found: String,
    },
}

/// The build files of one kernel: its configuration and generated headers, the headers that all flavours share, and the
/// build's own scripts and tools. In the cache; nothing is installed.
#[derive(Clone, Debug)]
pub struct Headers {
    release: String,
    compiler: String,
    id: String,
    folder: PathBuf,
    cache: Cache,
}

impl Headers {
    /// The build files for the kernel `release` (as `uname -r` says it), of that package version if one is given, else of
    /// the one that apt would install. Refused where the machine's compiler is not the one that made the kernel.
    pub fn fetch(cache: &Cache, release: &str, version: Option<&str>) -> Result<Self, Error> {
        let name = format!("linux-headers-{release}");
        let headers = packages::fetch_into(cache, &name, version)?;
        let parts = parts(cache, &headers)?;
        let versions: Vec<&str> = parts.iter().map(Package::version).collect();
        let id = digest(&versions);
        let root = cache.folder(&format!("kernel-trees/{release}_{id}"), |root| {
            for part in &parts {
                let deb = part.deb();
                let args = ["-x", &deb.to_string_lossy(), &root.to_string_lossy()];
                command::output("dpkg-deb", &args, Path::new("/"))?;
            }
            make_movable(&root.join("usr/src").join(&name))
        })?;
        let folder = root.join("usr/src").join(&name);
        let compiler = check_compiler(release, &folder.join(".config"))?;
        Ok(Self {
            release: release.to_owned(),
            compiler,
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

    /// The kernel's compiler and this machine's, which are the same: the first line of its `--version`.
    pub fn compiler(&self) -> &str {
        &self.compiler
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
    let deb = headers.deb();
    let args = ["-f", &deb.to_string_lossy(), "Depends"];
    let depends = command::output("dpkg-deb", &args, Path::new("/"))?;
    let depends = String::from_utf8_lossy(&depends);
    let part = |prefix| {
        let (name, version) = dependency(&depends, prefix).ok_or_else(|| Error::NoDependency {
            package: headers.name().to_owned(),
            prefix,
            found: depends.trim().to_owned(),
        })?;
        packages::fetch_into(cache, name, version).map_err(Error::from)
    };
    Ok([headers.clone(), part("linux-headers-")?, part("linux-kbuild-")?])
}

/// The first package in a `Depends` field whose name begins with `prefix`, and its version where only one will do.
fn dependency<'a>(depends: &'a str, prefix: &str) -> Option<(&'a str, Option<&'a str>)> {
    let entry = depends
        .split([',', '|'])
        .map(str::trim)
        .find(|entry| entry.starts_with(prefix))?;
    let (name, relation) = entry.split_once(' ').unwrap_or((entry, ""));
    let version = relation.strip_prefix("(= ").and_then(|rest| rest.strip_suffix(')'));
    Some((name, version))
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

/// Compares the compiler that a kernel's configuration names with the machine's own of that name.
fn check_compiler(release: &str, config: &Path) -> Result<String, Error> {
    let text = fs::read_to_string(config).map_err(cache::Error::io("read", config))?;
    let expected = compiler_text(&text).ok_or_else(|| Error::NoCompilerText {
        path: config.to_owned(),
    })?;
    let program = expected.split(' ').next().unwrap_or_default();
    let found = command::output(program, &["--version"], Path::new("/"))?;
    let found = String::from_utf8_lossy(&found)
        .lines()
        .next()
        .unwrap_or_default()
        .to_owned();
    if found == expected {
        return Ok(found);
    }
    Err(Error::WrongCompiler {
        release: release.to_owned(),
        expected: expected.to_owned(),
        found,
    })
}

fn compiler_text(config: &str) -> Option<&str> {
    let value = config
        .lines()
        .find_map(|line| line.strip_prefix("CONFIG_CC_VERSION_TEXT="))?;
    Some(value.trim_matches('"'))
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEPENDS: &str =
        "linux-base (>= 4.12~), linux-headers-6.1.0-47-common (= 6.1.170-3), linux-kbuild-6.1 (>= 6.1.170-3), gcc-12";

    #[test]
    fn a_dependency_on_one_version_is_told_from_one_on_any_later() {
        let common = dependency(DEPENDS, "linux-headers-");
        assert_eq!(common, Some(("linux-headers-6.1.0-47-common", Some("6.1.170-3"))));
        assert_eq!(dependency(DEPENDS, "linux-kbuild-"), Some(("linux-kbuild-6.1", None)));
        assert_eq!(dependency(DEPENDS, "gcc-12"), Some(("gcc-12", None)));
        assert_eq!(dependency(DEPENDS, "linux-image-"), None);
    }

    #[test]
    fn another_compiler_than_the_kernels_is_refused_with_both_names() {
        let folder = std::env::temp_dir().join(format!("vmpatch-tree-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let config = folder.join(".config");
        fs::write(&config, "CONFIG_A=y\nCONFIG_CC_VERSION_TEXT=\"true (Debian 1) 1.0\"\n").unwrap();
        let message = check_compiler("6.1.0-x", &config).unwrap_err().to_string();
        assert!(
            message.contains("6.1.0-x was made with \"true (Debian 1) 1.0\""),
            "{message}"
        );
        assert!(message.contains("this machine has \"true (GNU"), "{message}");
        fs::remove_dir_all(&folder).unwrap();
    }
}
