//! Builds what the tests put into a guest or patch it with: static programs, kernel modules, and livepatch modules that
//! carry a distribution's own fix. No kernel code is kept here; it comes from Debian's packages when it is needed.
//!
//! - [`KernelTree`]: all that a kernel's modules are built with, unpacked from its headers packages, not installed;
//! - [`Module`]: C sources to a `.ko`, made once and kept;
//! - [`Cve`]: a published fix as a livepatch module, its functions taken out of the fixed `linux-source` package;
//! - [`hand_written`]: modules of our own, each for one thing that patching must do or refuse;
//! - [`programs`]: programs that run in the guest and see a flaw, a fix or a counter.

mod cve;
mod fix;
pub mod hand_written;
mod klp_rela;
mod module;
pub mod programs;

use std::path::PathBuf;

pub use cve::Cve;
pub use fix::FixedFunctions;
pub use module::Module;
pub use patch_build::headers::Headers as KernelTree;

use patch_build::{digest, headers};

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
    /// What a kernel's modules are built with could not be had.
    #[error(transparent)]
    Headers(#[from] headers::Error),
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
}
