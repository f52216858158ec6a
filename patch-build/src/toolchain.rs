//! The compiler, assembler and linker that made a kernel: the machine's own, or out of Debian's packages, unpacked and not
//! installed.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use crate::cache::{self, Cache};
use crate::facts::Config;
use crate::packages;
use crate::runtime::{self, Runtime};
use crate::{binutils, command, compiler};

/// What Debian puts before a program's name that works for this machine's architecture.
const TARGET: &str = "x86_64-linux-gnu";
/// Where packages keep programs.
const PROGRAMS: &str = "usr/bin";
/// Where our own scripts are that take a program's place.
const SCRIPTS: &str = "scripts";

/// Starts a compiler that knows the machine's assembler by an absolute path, and has it call another one.
const COMPILER_SCRIPT: &str = r#"#!/bin/sh
here=${0%/*}
exec "$here/../usr/bin/${0##*/}" -wrapper "$here/run" "$@"
"#;
/// Runs what the compiler would, but the assembler that `PATH` has.
const RUN_SCRIPT: &str = r#"#!/bin/sh
case $1 in
*-as) shift; exec as "$@" ;;
esac
exec "$@"
"#;

/// Why there is no compiler for a kernel.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A package could not be had.
    #[error(transparent)]
    Package(#[from] packages::Error),
    /// Its libraries could not be had.
    #[error(transparent)]
    Runtime(#[from] runtime::Error),
    /// The cache could not be used.
    #[error(transparent)]
    Cache(#[from] cache::Error),
    /// There is no assembler like the kernel's.
    #[error(transparent)]
    Binutils(#[from] binutils::Error),
    /// There is neither one on the machine nor in a package that apt knows.
    #[error(transparent)]
    Compiler(#[from] compiler::Error),
    /// What the package has is another one.
    #[error("kernel {release} was made with {expected:?}, but Debian's package of that version has {found:?}")]
    Wrong {
        /// The kernel's release.
        release: String,
        /// The kernel's compiler, from its configuration.
        expected: String,
        /// The one in the package, from its `--version`.
        found: String,
    },
}

/// The kernel's own compiler, with assembler and linker.
#[derive(Clone, Debug)]
pub(crate) struct Toolchain {
    version: String,
    /// Folders in which the compiler is found; none where it is the machine's own.
    compiler: Vec<PathBuf>,
    /// The folder in which the rest is found, unless it is the machine's own.
    binutils: Option<PathBuf>,
}

impl Toolchain {
    /// The compiler that a kernel's configuration names, and the assembler: the machine's own where they are the same, else out
    /// of packages.
    pub(crate) fn fetch(cache: &Cache, release: &str, config: &Path) -> Result<Self, Error> {
        let (version, compiler) = compiler(cache, release, config)?;
        let text = fs::read_to_string(config).map_err(cache::Error::io("read", config))?;
        Ok(Self {
            version,
            compiler,
            binutils: binutils::fetch(cache, release, &Config::parse(&text))?,
        })
    }

    /// The first line of its `--version`.
    pub(crate) fn version(&self) -> &str {
        &self.version
    }

    /// Whether the compiler is the machine's own.
    pub(crate) fn is_own(&self) -> bool {
        self.compiler.is_empty()
    }

    /// The folder of the machine's own assembler and linker, where others come first in [`Toolchain::search_path`].
    pub(crate) fn passed_over(&self) -> Option<PathBuf> {
        self.binutils.as_ref()?;
        let path = std::env::var_os("PATH")?;
        std::env::split_paths(&path).find(|folder| folder.join("as").is_file())
    }

    /// The program's name, as `PATH` finds it.
    pub(crate) fn program(&self) -> &str {
        self.version.split(' ').next().unwrap_or_default()
    }

    /// The value of `PATH` with which the kernel's build finds it, and the assembler and linker.
    pub(crate) fn search_path(&self) -> String {
        let own = std::env::var("PATH").unwrap_or_default();
        let folders = self
            .compiler
            .iter()
            .chain(&self.binutils)
            .map(|folder| folder.to_string_lossy().into_owned());
        folders.chain([own]).collect::<Vec<_>>().join(":")
    }
}

/// The first line of the `--version` of the compiler that a configuration names, and the folders in which it is found unless it is
/// the machine's own.
fn compiler(cache: &Cache, release: &str, config: &Path) -> Result<(String, Vec<PathBuf>), Error> {
    let missing = match compiler::check(release, config) {
        Ok(own) => return Ok((own.text, Vec::new())),
        Err(error) => error,
    };
    let (compiler::Error::NoCompiler { expected, .. } | compiler::Error::WrongCompiler { expected, .. }) = &missing
    else {
        return Err(missing.into());
    };
    let program = expected.split(' ').next().unwrap_or_default();
    let Some((major, version)) = package_of(expected) else {
        return Err(missing.into());
    };
    let root = unpacked(cache, program, major, version)?;
    let folders = [SCRIPTS, PROGRAMS].map(|folder| root.join(folder));
    let path = folders
        .iter()
        .map(|folder| folder.join(program))
        .find(|path| path.exists());
    let found = first_line(&path.unwrap_or_default().to_string_lossy());
    if found != *expected {
        return Err(Error::Wrong {
            release: release.to_owned(),
            expected: expected.clone(),
            found,
        });
    }
    Ok((found, folders.to_vec()))
}

/// The first line of what a program says to `--version`; nothing where there is no such program.
fn first_line(program: &str) -> String {
    let said = command::output(program, &["--version"], Path::new("/")).unwrap_or_default();
    let said = String::from_utf8_lossy(&said);
    said.lines().next().unwrap_or_default().to_owned()
}

/// GCC's major number and its Debian package's version, out of `gcc-10 (Debian 10.2.1-6) 10.2.1 20210110`.
fn package_of(text: &str) -> Option<(&str, &str)> {
    let (program, rest) = text.split_once(" (Debian ")?;
    let (_, major) = program.rsplit_once("gcc-")?;
    let (version, _) = rest.split_once(')')?;
    major
        .bytes()
        .all(|digit| digit.is_ascii_digit())
        .then_some((major, version))
}

/// The folder into which that compiler is unpacked.
fn unpacked(cache: &Cache, program: &str, major: &str, version: &str) -> Result<PathBuf, Error> {
    cache.folder(&format!("gcc/{major}_{version}"), |root| {
        let fetch = |name: &str| packages::fetch_into(cache, name, Some(version));
        // Since Debian 13 the program is in a package that names what it compiles for.
        let either = |name: &str| match fetch(&format!("{name}-{}", TARGET.replace('_', "-"))) {
            Err(packages::Error::Unknown { .. }) => fetch(name),
            found => found,
        };
        let compiler = [either(&format!("gcc-{major}"))?, either(&format!("cpp-{major}"))?];
        let headers = fetch(&format!("libgcc-{major}-dev"))?;
        for package in compiler.iter().chain([&headers]) {
            package.unpack_into(root)?;
        }
        if runtime::is_needed(&compiler)? {
            Runtime::fetch(cache, &compiler)?.give_to(root)?;
        }
        if !asks_for_assembler(&root.join(PROGRAMS).join(program)) {
            add_scripts(program, root)?;
        }
        Ok(())
    })
}

/// Whether a compiler asks `PATH` for its assembler; some know the machine's by an absolute path.
fn asks_for_assembler(compiler: &Path) -> bool {
    let said = command::output(&compiler.to_string_lossy(), &["-print-prog-name=as"], Path::new("/"));
    said.is_ok_and(|name| name.trim_ascii() == b"as")
}

/// Has a compiler call the assembler that `PATH` has.
fn add_scripts(program: &str, root: &Path) -> Result<(), Error> {
    let scripts = root.join(SCRIPTS);
    fs::create_dir(&scripts).map_err(cache::Error::io("make the folder", &scripts))?;
    for (name, text) in [(program, COMPILER_SCRIPT), ("run", RUN_SCRIPT)] {
        let path = scripts.join(name);
        fs::write(&path, text).map_err(cache::Error::io("write", &path))?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).map_err(cache::Error::io("write", &path))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_package_of_a_compiler_is_read_from_its_version() {
        assert_eq!(
            package_of("gcc-10 (Debian 10.2.1-6) 10.2.1 20210110"),
            Some(("10", "10.2.1-6"))
        );
        assert_eq!(
            package_of("x86_64-linux-gnu-gcc-16 (Debian 16.2.0-4) 16.2.0"),
            Some(("16", "16.2.0-4"))
        );
        assert_eq!(package_of("clang-19 (Debian 1) 1.0"), None);
        assert_eq!(package_of("gcc-12.1 (GCC) 12.1"), None);
    }
}
