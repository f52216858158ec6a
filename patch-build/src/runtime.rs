//! Libraries for programs of a newer Debian than this machine's: a kernel's build tools and compiler, which are unpacked
//! and not installed, are linked against the C library of the release that they come from.

use std::collections::BTreeSet;
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

use crate::cache::{self, Cache};
use crate::packages::{self, Package};
use crate::{command, digest};

/// Where Debian's packages keep libraries.
const LIBRARIES: &str = "usr/lib/x86_64-linux-gnu";
/// The C library's loader, among them.
const LOADER: &str = "ld-linux-x86-64.so.2";
/// The package of the C library.
const C_LIBRARY: &str = "libc6";
/// Packages of libraries that a compiler and its kin need at the most; more is a cycle of our own making.
const PACKAGES_MAX: usize = 100;

/// Why libraries could not be had, or a program not be made to use them.
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
    /// The dependencies do not come to an end.
    #[error("more than {PACKAGES_MAX} packages of libraries for {of}")]
    TooMany {
        /// The programs' packages.
        of: String,
    },
}

/// A folder of libraries with their own loader.
#[derive(Clone, Debug)]
pub(crate) struct Runtime {
    libraries: PathBuf,
}

impl Runtime {
    /// The libraries for the programs in these packages.
    pub(crate) fn fetch(cache: &Cache, programs: &[Package]) -> Result<Self, Error> {
        let key = format!("runtimes/{}", digest(&spelled(programs)));
        let root = cache.folder(&key, |root| unpack_all(cache, programs, root))?;
        Ok(Self {
            libraries: root.join(LIBRARIES),
        })
    }

    /// Makes all programs below `root` use these libraries.
    pub(crate) fn give_to(&self, root: &Path) -> Result<(), Error> {
        let (loader, libraries) = (self.libraries.join(LOADER), self.libraries.to_string_lossy());
        for path in programs_below(root)? {
            let path = path.to_string_lossy();
            // What has no loader is no program, but a library or an object file.
            if command::output("patchelf", &["--print-interpreter", &path], Path::new("/")).is_err() {
                continue;
            }
            let loader = loader.to_string_lossy();
            // By force: the older kind of path, which holds for the libraries of libraries, too.
            let args = [
                "--set-interpreter",
                &loader,
                "--force-rpath",
                "--set-rpath",
                &libraries,
                &path,
            ];
            command::output("patchelf", &args, Path::new("/"))?;
        }
        Ok(())
    }
}

/// Whether the programs in these packages want a newer C library than the machine's own.
pub(crate) fn is_needed(programs: &[Package]) -> Result<bool, Error> {
    let wanted = dependencies(programs)?;
    let mut wanted = wanted.iter().filter(|library| library.name == C_LIBRARY);
    Ok(!wanted.all(is_fulfilled))
}

/// What a package needs beside it (Debian policy 7.1).
#[derive(Clone, Debug, PartialEq, Eq)]
struct Dependency {
    name: String,
    version: Wanted,
}

/// Which version of it.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Wanted {
    Any,
    AtLeast(String),
    Exactly(String),
}

fn dependencies(programs: &[Package]) -> Result<Vec<Dependency>, Error> {
    let mut all = Vec::new();
    for package in programs {
        all.extend(parse(&package.depends()?));
    }
    Ok(all)
}

/// Reads a `Depends` field; of alternatives the first counts.
fn parse(field: &str) -> Vec<Dependency> {
    let entries = field.split(',').filter_map(|entry| entry.split('|').next());
    let entries = entries.map(str::trim).filter(|entry| !entry.is_empty());
    entries
        .map(|entry| {
            let (name, relation) = entry.split_once(' ').unwrap_or((entry, ""));
            let version = |sign| Some(relation.strip_prefix(sign)?.strip_suffix(')')?.to_owned());
            let at_least = version("(>= ").map(Wanted::AtLeast);
            Dependency {
                // "libc6:any" is libc6 of whatever architecture.
                name: name.split(':').next().unwrap_or(name).to_owned(),
                version: at_least
                    .or_else(|| version("(= ").map(Wanted::Exactly))
                    .unwrap_or(Wanted::Any),
            }
        })
        .collect()
}

/// Whether the machine's own package is recent enough.
fn is_fulfilled(wanted: &Dependency) -> bool {
    let (sign, version) = match &wanted.version {
        Wanted::Any => return true,
        Wanted::AtLeast(version) => ("ge", version),
        Wanted::Exactly(version) => ("eq", version),
    };
    let query = format!("{}:amd64", wanted.name);
    let Ok(own) = command::output("dpkg-query", &["-W", "-f", "${Version}", &query], Path::new("/")) else {
        return false;
    };
    let own = String::from_utf8_lossy(&own).into_owned();
    command::output("dpkg", &["--compare-versions", &own, sign, version], Path::new("/")).is_ok()
}

/// Unpacks the libraries that are wanted, and theirs. Those that were made together with the programs are of the programs' own
/// version; all others of the newest that apt knows: the C library, whose loader starts the programs, runs whatever was
/// linked against an older one.
fn unpack_all(cache: &Cache, programs: &[Package], root: &Path) -> Result<(), Error> {
    let own: Vec<&str> = programs.iter().map(Package::version).collect();
    let mut wanted = dependencies(programs)?;
    let mut seen = BTreeSet::new();
    while let Some(library) = wanted.pop() {
        if !is_library(&library.name) || !seen.insert(library.name.clone()) {
            continue;
        }
        if seen.len() > PACKAGES_MAX {
            return Err(Error::TooMany {
                of: spelled(programs).join(", "),
            });
        }
        let version = choose(&library, &packages::versions(&library.name)?, &own);
        let package = packages::fetch_into(cache, &library.name, version.as_deref())?;
        package.unpack_into(root)?;
        wanted.extend(dependencies(&[package])?);
    }
    Ok(())
}

/// The version to take of those that apt knows, newest first; `own` are those of the programs. None where apt knows none.
fn choose(library: &Dependency, known: &[String], own: &[&str]) -> Option<String> {
    if let Wanted::Exactly(version) = &library.version {
        return Some(version.clone());
    }
    let made_together = known.iter().find(|version| own.contains(&version.as_str()));
    made_together.or(known.first()).cloned()
}

fn spelled(packages: &[Package]) -> Vec<String> {
    let spelled = |package: &Package| format!("{}={}", package.name(), package.version());
    packages.iter().map(spelled).collect()
}

/// Whether a package is one of libraries that programs are linked against at run time (Debian policy 8.1).
fn is_library(name: &str) -> bool {
    (name.starts_with("lib") || name == "zlib1g") && !name.ends_with("-dev")
}

/// All ELF files below a folder.
fn programs_below(root: &Path) -> Result<Vec<PathBuf>, cache::Error> {
    let mut found = Vec::new();
    let mut folders = vec![root.to_owned()];
    while let Some(folder) = folders.pop() {
        let entries = fs::read_dir(&folder).map_err(cache::Error::io("list", &folder))?;
        for entry in entries {
            let entry = entry.map_err(cache::Error::io("list", &folder))?;
            let path = entry.path();
            // Links are left alone: what they lead to is below the root, too.
            let kind = entry.file_type().map_err(cache::Error::io("look at", &path))?;
            if kind.is_dir() {
                folders.push(path);
            } else if kind.is_file() && is_elf(&path)? {
                found.push(path);
            }
        }
    }
    Ok(found)
}

fn is_elf(path: &Path) -> Result<bool, cache::Error> {
    let mut file = fs::File::open(path).map_err(cache::Error::io("open", path))?;
    let mut magic = [0; 4];
    Ok(file.read_exact(&mut magic).is_ok() && &magic == b"\x7fELF")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dependency(at_least: &str) -> Dependency {
        Dependency {
            name: C_LIBRARY.to_owned(),
            version: Wanted::AtLeast(at_least.to_owned()),
        }
    }

    #[test]
    fn the_machines_own_library_will_do_only_where_it_is_recent_enough() {
        assert!(is_fulfilled(&dependency("2.14")));
        assert!(!is_fulfilled(&dependency("999")));
    }

    #[test]
    fn of_alternatives_the_first_is_wanted_and_of_versions_the_least_or_the_very_one() {
        let found = parse("libc6:any (>= 2.38) | libc6.1, gcc-16-base (= 16.2.0-4), pahole\n");
        let named = |name: &str, version: Wanted| Dependency {
            name: name.to_owned(),
            version,
        };
        let expected = [
            named("libc6", Wanted::AtLeast("2.38".to_owned())),
            named("gcc-16-base", Wanted::Exactly("16.2.0-4".to_owned())),
            named("pahole", Wanted::Any),
        ];
        assert_eq!(found, expected);
        assert_eq!(parse("\n"), []);
    }

    /// binutils 2.44 with the libctf of 2.47 would have two versions of libbfd in one process.
    #[test]
    fn libraries_that_were_made_with_the_program_are_of_its_version_and_others_the_newest() {
        let known = ["2.47-1", "2.44-3", "2.40-2"].map(str::to_owned);
        let chosen = |version: Wanted, own: &str| {
            let library = Dependency {
                name: "libctf0".to_owned(),
                version,
            };
            choose(&library, &known, &[own])
        };
        let at_least = || Wanted::AtLeast("2.36".to_owned());
        assert_eq!(chosen(at_least(), "2.44-3").as_deref(), Some("2.44-3"));
        assert_eq!(chosen(at_least(), "14.2.0-19").as_deref(), Some("2.47-1"));
        let exactly = Wanted::Exactly("2.40-2".to_owned());
        assert_eq!(chosen(exactly, "2.44-3").as_deref(), Some("2.40-2"));
    }

    #[test]
    fn only_packages_of_libraries_are_unpacked() {
        let libraries: Vec<&str> = ["libc6", "zlib1g", "libgcc-16-dev", "pahole", "gcc-16-base"]
            .into_iter()
            .filter(|name| is_library(name))
            .collect();
        assert_eq!(libraries, ["libc6", "zlib1g"]);
    }

    #[test]
    fn programs_are_found_in_folders_within_folders_and_other_files_are_not() {
        let root = std::env::temp_dir().join(format!("vmpatch-runtime-{}", std::process::id()));
        fs::create_dir_all(root.join("a/b")).unwrap();
        fs::write(root.join("a/b/program"), b"\x7fELF rest").unwrap();
        fs::write(root.join("a/text"), b"#!/bin/sh\n").unwrap();
        fs::write(root.join("a/short"), b"\x7fE").unwrap();
        assert_eq!(programs_below(&root).unwrap(), [root.join("a/b/program")]);
        fs::remove_dir_all(&root).unwrap();
    }
}
