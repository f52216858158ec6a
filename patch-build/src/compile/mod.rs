//! Compiles source files of the kernel as the kernel's own build does, before and after a change.

mod after;
mod before;
pub(crate) mod command;
mod complaint;
mod old_numbers;
mod overlay;
mod pace;
mod same;

use std::path::PathBuf;

use crate::cache;
use crate::command as host;
pub use after::after;
pub use before::{as_shipped, before, make, make_inputs, planned};
use command::SavedCommand;
pub use complaint::Complaint;
pub use same::changed_code;

/// Why a file could not be compiled.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The cache could not be used.
    #[error(transparent)]
    Cache(#[from] cache::Error),
    /// The source as it was does not compile.
    #[error("can't compile {} as the kernel's source has it", files.join(", "))]
    Before {
        /// The files.
        files: Vec<String>,
        /// The cause.
        source: host::Error,
    },
    /// The changed source does not compile.
    #[error("the changed {file} does not compile")]
    After {
        /// The file.
        file: String,
        /// The cause.
        source: Complaint,
    },
    /// Only C files have functions of which the compiler tells enough.
    #[error("{file} is no C file: only those can be compiled and compared")]
    NotC {
        /// The file.
        file: String,
    },
    /// The kernel's build left no note of how it compiled a file.
    #[error("{} has no command that makes {object}", note.display())]
    NoCommand {
        /// Where it should be.
        note: PathBuf,
        /// The object file.
        object: String,
    },
    /// The file asks for a setting that is another one here.
    #[error(
        "{file} asks for CONFIG_{setting}, which this machine's tools have set otherwise than those that made the kernel"
    )]
    OtherSetting {
        /// The file.
        file: String,
        /// The setting, without `CONFIG_`.
        setting: String,
    },
    /// A header reaches a changed one on a way that the change does not reach.
    #[error("the changed {file} was compiled with the old {header}: some header includes it by a path with `..`")]
    OldHeader {
        /// The file that was compiled.
        file: String,
        /// The changed header.
        header: String,
    },
}

/// A C file of the kernel as it is, compiled.
#[derive(Clone, Debug)]
pub struct Unit {
    /// The file, relative to the source.
    pub source: String,
    /// The module that it is linked into; `None` for the kernel itself.
    pub module: Option<String>,
    /// The object file.
    pub object: Vec<u8>,
    command: SavedCommand,
}

impl Unit {
    /// Whether its code is the running kernel's, see [`crate::plan::Planned::is_of_running_kernel`].
    pub fn is_of_running_kernel(&self) -> bool {
        self.command.is_of_running_kernel()
    }
}
