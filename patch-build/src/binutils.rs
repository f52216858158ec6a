//! The assembler and linker that made a kernel: the machine's own, or out of Debian's package of that release, unpacked and
//! not installed. Another release may write other code, and the kernel's configuration asks for what it can do.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use crate::cache::{self, Cache};
use crate::command;
use crate::facts::Config;
use crate::packages;
use crate::runtime::{self, Runtime};

/// Debian's package of the programs, whose names begin with [`PREFIX`].
const PACKAGE: &str = "binutils-x86-64-linux-gnu";
const PREFIX: &str = "x86_64-linux-gnu-";
/// Where packages keep programs.
const PROGRAMS: &str = "usr/bin";
/// Where links to them are, by the plain names that compilers and make ask `PATH` for.
const PLAIN: &str = "plain";

/// Why there is no assembler for a kernel.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The package could not be had.
    #[error(transparent)]
    Package(#[from] packages::Error),
    /// Its libraries could not be had.
    #[error(transparent)]
    Runtime(#[from] runtime::Error),
    /// The cache could not be used.
    #[error(transparent)]
    Cache(#[from] cache::Error),
    /// Neither the machine nor apt has that release.
    #[error(
        "kernel {release} was made with GNU as {wanted}, but this machine has {own}, and of package {PACKAGE} apt has {known} \
         (is the package source of the kernel's Debian release among apt's?)"
    )]
    Unknown {
        /// The kernel's release.
        release: String,
        /// The release of binutils, from the kernel's configuration.
        wanted: String,
        /// The machine's.
        own: String,
        /// All versions that apt knows, newest first.
        known: String,
    },
}

/// The folder with the programs that made a kernel, by their plain names; none where the machine's own are of the release
/// that the kernel's configuration names, or it names none.
pub(crate) fn fetch(cache: &Cache, release: &str, config: &Config) -> Result<Option<PathBuf>, Error> {
    let Some(wanted) = config.value("AS_VERSION").and_then(|value| value.parse().ok()) else {
        return Ok(None);
    };
    let own = own();
    if own.as_deref().and_then(canonical) == Some(wanted) {
        return Ok(None);
    }
    let key = format!("binutils/{}", spelled(wanted));
    let root = cache.folder(&key, |root| {
        let versions = packages::versions(PACKAGE)?;
        let is_wanted = |version: &&String| canonical(version) == Some(wanted);
        let version = versions.iter().find(is_wanted).ok_or_else(|| Error::Unknown {
            release: release.to_owned(),
            wanted: spelled(wanted),
            own: own.unwrap_or_else(|| "none".to_owned()),
            known: match versions.join(", ") {
                none if none.is_empty() => "none".to_owned(),
                some => some,
            },
        })?;
        let package = packages::fetch_into(cache, PACKAGE, Some(version))?;
        package.unpack_into(root)?;
        Runtime::fetch(cache, &[package])?.give_to(root)?;
        Ok::<(), Error>(link_plain(root)?)
    })?;
    Ok(Some(root.join(PLAIN)))
}

/// The release of the machine's own assembler.
fn own() -> Option<String> {
    let said = command::output("as", &["--version"], Path::new("/")).ok()?;
    let said = String::from_utf8_lossy(&said);
    Some(said.lines().next()?.split_whitespace().last()?.to_owned())
}

/// `CONFIG_AS_VERSION` of a release (scripts/as-version.sh of 6.1): `24400` of `2.44-3`, `24750` of `2.47.50.20261021-1`.
fn canonical(version: &str) -> Option<u64> {
    let upstream = version.split('-').next()?;
    let mut parts = upstream.split('.').map(str::parse);
    let mut part = || parts.next().unwrap_or(Ok(0)).ok().filter(|part| *part < 100);
    Some(part()? * 10_000 + part()? * 100 + part()?)
}

/// A release as people spell it.
fn spelled(canonical: u64) -> String {
    let (major, minor, patch) = (canonical / 10_000, canonical / 100 % 100, canonical % 100);
    match patch {
        0 => format!("{major}.{minor}"),
        _ => format!("{major}.{minor}.{patch}"),
    }
}

/// Gives the programs below `root` their plain names, in a folder of its own.
fn link_plain(root: &Path) -> Result<(), cache::Error> {
    let (programs, plain) = (root.join(PROGRAMS), root.join(PLAIN));
    fs::create_dir(&plain).map_err(cache::Error::io("make the folder", &plain))?;
    let entries = fs::read_dir(&programs).map_err(cache::Error::io("list", &programs))?;
    for entry in entries {
        let name = entry.map_err(cache::Error::io("list", &programs))?.file_name();
        let Some(name) = name.to_str() else { continue };
        if let Some(short) = name.strip_prefix(PREFIX) {
            let link = plain.join(short);
            let target = format!("../{PROGRAMS}/{name}");
            symlink(target, &link).map_err(cache::Error::io("make the link", &link))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_release_that_a_configuration_names_is_that_of_a_packages_version() {
        assert_eq!(canonical("2.44-3"), Some(24400));
        assert_eq!(canonical("2.35.2-2"), Some(23502));
        assert_eq!(canonical("2.47.50.20261021-1"), Some(24750));
        assert_eq!(canonical("2.40"), Some(24000));
        assert_eq!(canonical("x"), None);
        assert_eq!(
            (spelled(24400), spelled(23502)),
            ("2.44".to_owned(), "2.35.2".to_owned())
        );
    }

    #[test]
    fn an_assembler_that_nobody_has_is_refused_with_those_that_there_are() {
        let folder = std::env::temp_dir().join(format!("vmpatch-no-binutils-{}", std::process::id()));
        let nowhere = Cache::at(&folder);
        let error = fetch(&nowhere, "9.9.9-x", &Config::parse("CONFIG_AS_VERSION=19901\n")).unwrap_err();
        let text = error.to_string();
        assert!(
            text.starts_with("kernel 9.9.9-x was made with GNU as 1.99.1, but"),
            "{text}"
        );
        assert!(fetch(&nowhere, "9.9.9-x", &Config::parse("")).unwrap().is_none());
        fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn programs_are_found_by_their_plain_names() {
        let root = std::env::temp_dir().join(format!("vmpatch-binutils-{}", std::process::id()));
        fs::create_dir_all(root.join(PROGRAMS)).unwrap();
        fs::write(root.join(PROGRAMS).join("x86_64-linux-gnu-as"), "as").unwrap();
        link_plain(&root).unwrap();
        assert_eq!(fs::read_to_string(root.join(PLAIN).join("as")).unwrap(), "as");
        fs::remove_dir_all(&root).unwrap();
    }
}
