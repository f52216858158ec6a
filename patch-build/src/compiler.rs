//! The compiler that made a kernel, and this machine's.

use std::fs;
use std::path::{Path, PathBuf};

use crate::facts::Config;
use crate::{cache, command};

/// Why the kernel can't be compiled for on this machine.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The configuration could not be read.
    #[error(transparent)]
    Files(#[from] cache::Error),
    /// The kernel's configuration does not say which compiler made the kernel.
    #[error("{} has no CONFIG_CC_VERSION_TEXT", path.display())]
    NoCompilerText {
        /// The configuration.
        path: PathBuf,
    },
    /// There is no compiler of that name.
    #[error("kernel {release} was made with {expected:?}, which this machine does not have: {install}")]
    NoCompiler {
        /// The kernel's release.
        release: String,
        /// The kernel's compiler, from its configuration.
        expected: String,
        /// How to get it.
        install: String,
        /// What happened instead.
        source: command::Error,
    },
    /// The machine's compiler is not the one that made the kernel.
    #[error(
        "kernel {release} was made with {expected:?}, but this machine has {found:?}: no code of it would be like the kernel's own; {install}"
    )]
    WrongCompiler {
        /// The kernel's release.
        release: String,
        /// The kernel's compiler, from its configuration.
        expected: String,
        /// The machine's, from its `--version`.
        found: String,
        /// How to get the right one.
        install: String,
    },
}

/// A compiler that is the kernel's own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Compiler {
    /// The program to run.
    pub program: String,
    /// The first line of its `--version`, which is the kernel's `CONFIG_CC_VERSION_TEXT`.
    pub text: String,
}

/// Compares the compiler that a kernel's configuration names with the machine's own of that name.
pub fn check(release: &str, config: &Path) -> Result<Compiler, Error> {
    let text = fs::read_to_string(config).map_err(cache::Error::io("read", config))?;
    let config_file = Config::parse(&text);
    let expected = config_file
        .value("CC_VERSION_TEXT")
        .ok_or_else(|| Error::NoCompilerText {
            path: config.to_owned(),
        })?;
    let program = expected.split(' ').next().unwrap_or_default();
    let answer = command::output(program, &["--version"], Path::new("/")).map_err(|source| Error::NoCompiler {
        release: release.to_owned(),
        expected: expected.to_owned(),
        install: install(expected),
        source,
    })?;
    let answer = String::from_utf8_lossy(&answer);
    let found = answer.lines().next().unwrap_or_default();
    if found == expected {
        return Ok(Compiler {
            program: program.to_owned(),
            text: found.to_owned(),
        });
    }
    Err(Error::WrongCompiler {
        release: release.to_owned(),
        expected: expected.to_owned(),
        found: found.to_owned(),
        install: install(expected),
    })
}

/// How to install the compiler of that version text. Debian's names package and version: `gcc-12 (Debian 12.2.0-14) 12.2.0`,
/// and `x86_64-linux-gnu-gcc-14` for what package `gcc-14` has.
fn install(expected: &str) -> String {
    let program = expected.split(' ').next().unwrap_or_default();
    let package = program.strip_prefix("x86_64-linux-gnu-").unwrap_or(program);
    let version = expected
        .split_once("(Debian ")
        .and_then(|(_, rest)| Some(rest.split_once(')')?.0));
    match version {
        Some(version) => format!("install it: apt-get install {package}={version}"),
        None => format!("install {package}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(name: &str, text: &str) -> String {
        let folder = std::env::temp_dir().join(format!("vmpatch-compiler-{}-{name}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let config = folder.join(".config");
        fs::write(&config, format!("CONFIG_A=y\nCONFIG_CC_VERSION_TEXT=\"{text}\"\n")).unwrap();
        let message = check("6.1.0-x", &config).unwrap_err().to_string();
        fs::remove_dir_all(&folder).unwrap();
        message
    }

    #[test]
    fn another_compiler_than_the_kernels_is_refused_with_both_names() {
        let message = error("wrong", "true (Debian 1-2) 1.0");
        assert!(
            message.contains("6.1.0-x was made with \"true (Debian 1-2) 1.0\""),
            "{message}"
        );
        assert!(message.contains("this machine has \"true (GNU"), "{message}");
        assert!(message.ends_with("apt-get install true=1-2"), "{message}");
    }

    #[test]
    fn a_missing_compiler_is_named_with_the_package_that_has_it() {
        let message = error("none", "x86_64-linux-gnu-gcc-99 (Debian 99.1.0-1) 99.1.0");
        assert!(
            message.ends_with("does not have: install it: apt-get install gcc-99=99.1.0-1"),
            "{message}"
        );
    }
}
