//! Debian packages by name: fetched through the machine's own apt, checked by SHA-256, kept in the [`Cache`], unpacked.
//!
//! apt's signed lists say which bytes a package has; that digest is kept beside the package, so that a package which is in
//! the cache already needs neither network nor apt.

mod apt;

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use crate::cache::{self, Cache};
use crate::command;

/// Why a package could not be had.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The name or the version has characters that no Debian package has.
    #[error("{wanted:?} can't be the {what} of a Debian package")]
    Malformed {
        /// "name" or "version".
        what: &'static str,
        /// What was asked for.
        wanted: String,
    },
    /// apt's lists do not name the package.
    #[error(
        "apt knows no package {wanted} (is its package source among apt's, and `apt-get update` done? apt has: {known})"
    )]
    Unknown {
        /// The name, with `=version` if one was asked for.
        wanted: String,
        /// The versions of that name which apt knows, newest first.
        known: String,
    },
    /// apt's entry for a package lacks a field.
    #[error("apt's entry for {wanted} has no {field}")]
    NoField {
        /// The name, with `=version` if one was asked for.
        wanted: String,
        /// The missing field.
        field: &'static str,
    },
    /// The downloaded file is not the one that apt's lists describe.
    #[error("{} has SHA-256 {found}, but apt's lists say {expected}", path.display())]
    WrongDigest {
        /// The downloaded file.
        path: PathBuf,
        /// The digest from apt's lists, in hexadecimal.
        expected: String,
        /// The digest of the file, in hexadecimal.
        found: String,
    },
    /// apt reported success and left no package.
    #[error("apt-get download left {found} files instead of one in {}", folder.display())]
    NotOneFile {
        /// Where it was to download to.
        folder: PathBuf,
        /// How many files are there.
        found: usize,
    },
    /// A program of the host failed.
    #[error(transparent)]
    Command(#[from] command::Error),
    /// The cache could not be used.
    #[error(transparent)]
    Cache(#[from] cache::Error),
}

/// A package whose file is in the cache and has the right digest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Package {
    name: String,
    version: String,
    cache: Cache,
}

/// Fetches the package `name` into the user's cache (see [`Cache::from_env`]): that `version` if one is given, else the
/// one that apt would install.
pub fn fetch(name: &str, version: Option<&str>) -> Result<Package, Error> {
    fetch_into(&Cache::from_env()?, name, version)
}

/// Like [`fetch`], into a cache of the caller's choice.
pub fn fetch_into(cache: &Cache, name: &str, version: Option<&str>) -> Result<Package, Error> {
    check_characters("name", name)?;
    let version = match version {
        Some(version) => version.to_owned(),
        None => apt::lookup(name, None)?.version,
    };
    check_characters("version", &version)?;
    let package = Package {
        name: name.to_owned(),
        version,
        cache: cache.clone(),
    };
    let _lock = cache.lock(&package.key("file"))?;
    if !package.is_cached()? {
        package.download()?;
    }
    Ok(package)
}

/// All versions of a package that apt knows, of all releases whose lists it has, the newest first.
pub fn versions(name: &str) -> Result<Vec<String>, Error> {
    check_characters("name", name)?;
    Ok(apt::versions(name))
}

impl Package {
    /// The package's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The package's version, as apt spells it.
    pub fn version(&self) -> &str {
        &self.version
    }

    /// The package file in the cache.
    pub fn deb(&self) -> PathBuf {
        self.cache.root().join(self.key("package.deb"))
    }

    /// The folder with the package's files, unpacked at the first call: `unpacked()?.join("boot")` is what the package
    /// would install as `/boot`. It is shared: nobody may write to it.
    pub fn unpacked(&self) -> Result<PathBuf, Error> {
        self.cache.folder(&self.key("tree"), |folder| self.unpack_into(folder))
    }

    /// Unpacks the package's files into a folder, beside what is there.
    pub fn unpack_into(&self, folder: &Path) -> Result<(), Error> {
        let deb = self.deb();
        let args = ["-x", &deb.to_string_lossy(), &folder.to_string_lossy()];
        command::output("dpkg-deb", &args, Path::new("/"))?;
        Ok(())
    }

    /// The package's `Depends` field.
    pub fn depends(&self) -> Result<String, Error> {
        let deb = self.deb();
        let args = ["-f", &deb.to_string_lossy(), "Depends"];
        let depends = command::output("dpkg-deb", &args, Path::new("/"))?;
        Ok(String::from_utf8_lossy(&depends).trim().to_owned())
    }

    /// The key of one of the package's cache entries; a version's colon is spelled as apt spells it in file names.
    fn key(&self, entry: &str) -> String {
        format!("packages/{}_{}/{entry}", self.name, self.version.replace(':', "%3a"))
    }

    fn digest_record(&self) -> PathBuf {
        self.cache.root().join(self.key("sha256"))
    }

    /// Whether file and digest are in the cache and agree; a damaged file counts as absent.
    fn is_cached(&self) -> Result<bool, Error> {
        let (deb, record) = (self.deb(), self.digest_record());
        if !deb.exists() || !record.exists() {
            return Ok(false);
        }
        let expected = fs::read_to_string(&record).map_err(cache::Error::io("read", &record))?;
        Ok(sha256(&deb)? == expected)
    }

    fn download(&self) -> Result<(), Error> {
        let listed = apt::lookup(&self.name, Some(&self.version))?;
        let folder = self.cache.root().join(self.key("download"));
        let io = |action| cache::Error::io(action, &folder);
        if folder.exists() {
            fs::remove_dir_all(&folder).map_err(io("remove what an interrupted run left in"))?;
        }
        fs::create_dir_all(&folder).map_err(io("make the folder"))?;
        apt::download(&self.name, &self.version, &folder)?;
        let file = only_file(&folder)?;
        let found = sha256(&file)?;
        if found != listed.sha256 {
            return Err(Error::WrongDigest {
                path: file,
                expected: listed.sha256,
                found,
            });
        }
        // The digest goes last: a file without one counts as absent.
        let (deb, record) = (self.deb(), self.digest_record());
        fs::rename(&file, &deb).map_err(cache::Error::io("rename into its place", &file))?;
        fs::write(&record, found).map_err(cache::Error::io("write", &record))?;
        fs::remove_dir_all(&folder).map_err(io("remove"))?;
        Ok(())
    }
}

/// The first package in a `Depends` field whose name begins with `prefix`, and its version where only one will do.
pub fn dependency<'a>(depends: &'a str, prefix: &str) -> Option<(&'a str, Option<&'a str>)> {
    let entry = depends
        .split([',', '|'])
        .map(str::trim)
        .find(|entry| entry.starts_with(prefix))?;
    let (name, relation) = entry.split_once(' ').unwrap_or((entry, ""));
    let version = relation.strip_prefix("(= ").and_then(|rest| rest.strip_suffix(')'));
    Some((name, version))
}

/// The one file of a folder that apt downloaded into.
fn only_file(folder: &Path) -> Result<PathBuf, Error> {
    let entries = fs::read_dir(folder).map_err(cache::Error::io("list", folder))?;
    let files: Vec<PathBuf> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
    match files.as_slice() {
        [file] => Ok(file.clone()),
        files => Err(Error::NotOneFile {
            folder: folder.to_owned(),
            found: files.len(),
        }),
    }
}

/// The SHA-256 of a file, in hexadecimal.
fn sha256(path: &Path) -> Result<String, Error> {
    let mut file = File::open(path).map_err(cache::Error::io("open", path))?;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        let length = file.read(&mut buffer).map_err(cache::Error::io("read", path))?;
        match buffer.get(..length) {
            None | Some([]) => break,
            Some(bytes) => hasher.update(bytes),
        }
    }
    Ok(hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

/// Names and versions become file names and apt's arguments: only what Debian policy (5.6.1, 5.6.12) allows in them.
fn check_characters(what: &'static str, wanted: &str) -> Result<(), Error> {
    let first = wanted.chars().next().is_some_and(|c| c.is_ascii_alphanumeric());
    let rest = wanted.chars().all(|c| c.is_ascii_alphanumeric() || ".+-:~".contains(c));
    if first && rest {
        Ok(())
    } else {
        Err(Error::Malformed {
            what,
            wanted: wanted.to_owned(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scratch(name: &str) -> Cache {
        let root = std::env::temp_dir().join(format!("vmpatch-packages-{}-{name}", std::process::id()));
        drop(fs::remove_dir_all(&root));
        Cache::at(root)
    }

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
    fn a_name_that_is_an_option_or_a_path_is_refused() {
        let cache = scratch("names");
        for name in ["-o", "../x", "", "a b"] {
            let refused = fetch_into(&cache, name, Some("1"));
            assert!(
                matches!(refused, Err(Error::Malformed { what: "name", .. })),
                "{name:?}: {refused:?}"
            );
        }
        assert!(matches!(
            fetch_into(&cache, "a", Some("1/2")),
            Err(Error::Malformed { what: "version", .. })
        ));
    }

    /// apt takes a dot in what is no name for any character, and would download all that fits.
    #[test]
    fn a_pattern_of_packages_names_is_no_package() {
        let refused = fetch_into(&scratch("pattern"), "base.files", None);
        assert!(matches!(refused, Err(Error::Unknown { .. })), "{refused:?}");
    }

    #[test]
    fn a_package_in_the_cache_needs_no_apt() {
        let cache = scratch("cached");
        let package = Package {
            name: "vmpatch-no-such-package".into(),
            version: "1:2".into(),
            cache: cache.clone(),
        };
        fs::create_dir_all(package.deb().parent().unwrap()).unwrap();
        fs::write(package.deb(), "abc").unwrap();
        let abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        fs::write(package.digest_record(), abc).unwrap();
        assert_eq!(
            fetch_into(&cache, "vmpatch-no-such-package", Some("1:2")).unwrap(),
            package
        );
        fs::remove_dir_all(cache.root()).unwrap();
    }

    #[test]
    fn a_damaged_package_counts_as_absent() {
        let cache = scratch("damaged");
        let package = Package {
            name: "vmpatch-no-such-package".into(),
            version: "1".into(),
            cache: cache.clone(),
        };
        fs::create_dir_all(package.deb().parent().unwrap()).unwrap();
        fs::write(package.deb(), "abd").unwrap();
        let abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        fs::write(package.digest_record(), abc).unwrap();
        assert!(!package.is_cached().unwrap());
        fs::remove_dir_all(cache.root()).unwrap();
    }
}
