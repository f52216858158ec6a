//! The kernel's source, and a change to it.

mod archive;
pub(crate) mod both;
pub mod c_text;
pub mod change;
pub mod functions;
pub mod hunks;
pub mod included_c;
pub mod includers;
pub mod package;
pub mod patch;
pub mod slice;
mod tokens;

use std::path::PathBuf;

/// A kernel's source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    /// Where it is.
    pub folder: PathBuf,
    /// Names what is in it: the package and its version, or the folder.
    pub id: String,
    /// Whether nobody changes it: it is the cache's own.
    pub fixed: bool,
}
