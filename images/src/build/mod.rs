//! Builds what the tests put into a guest or patch it with: static programs, kernel modules, and livepatch modules that
//! carry a distribution's own fix. No kernel code is kept here; it comes from Debian's packages when it is needed.
//!
//! - [`KernelTree`]: all that a kernel's modules are built with, unpacked from its headers packages, not installed;
//! - [`Module`]: C sources to a `.ko`, made once and kept;
//! - [`Cve`]: a published fix as a livepatch module, its functions taken out of the fixed `linux-source` package;
//! - [`hand_written`]: modules of our own, each for one thing that patching must do or refuse;
//! - [`programs`]: programs that run in the guest and see a flaw, a fix or a counter.

mod c_text;
mod cve;
mod fix;
pub mod hand_written;
mod klp_rela;
mod module;
pub mod programs;
mod source;
mod tree;

use std::path::PathBuf;

use sha2::{Digest, Sha256};

pub use cve::Cve;
pub use fix::FixedFunctions;
pub use module::Module;
pub use tree::KernelTree;

use crate::{cache, command, packages};

/// Why something could not be built.
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
    /// The fix of a flaw is not made for a kernel of that series.
    #[error("{id} has a fix for kernels {series}* here, not for {release}")]
    OtherSeries {
        /// The flaw.
        id: &'static str,
        /// The kernel's release.
        release: String,
        /// What the releases begin with that the fix is made for.
        series: &'static str,
    },
    /// A source file does not define a function exactly once.
    #[error("{file} has {found} definitions of {function}, not one")]
    NotOneDefinition {
        /// The source file.
        file: String,
        /// The function.
        function: String,
        /// How many definitions of it the file has.
        found: usize,
    },
    /// A linked module is not the ELF file that the build makes.
    #[error("can't mark the livepatch relocations of {}: {what}", path.display())]
    Relocations {
        /// The module.
        path: PathBuf,
        /// What does not fit.
        what: String,
    },
    /// A source file is not text.
    #[error("{} is not UTF-8", path.display())]
    NotText {
        /// The source file.
        path: PathBuf,
    },
}

/// The first 16 hexadecimal digits of the SHA-256 over all parts and their lengths: the name of what was made of them.
fn digest(parts: &[&str]) -> String {
    let mut hasher = Sha256::new();
    for part in parts {
        hasher.update(part.len().to_le_bytes());
        hasher.update(part);
    }
    hasher
        .finalize()
        .iter()
        .take(8)
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_digest_depends_on_where_one_part_ends() {
        assert_ne!(digest(&["ab", "c"]), digest(&["a", "bc"]));
        assert_eq!(digest(&["ab", "c"]).len(), 16);
    }
}
