//! What debug information tells of an object file: whose a static variable is, and how types are laid out.
//!
//! Format: DWARF 4 and 5, through the `gimli` crate.

mod layouts;
mod load;
mod rows;
mod statics;

pub use layouts::{Layouts, Shape};
pub use load::DebugInfo;
pub use rows::Rows;
pub use statics::{Order, Statics};

/// Debug information that could not be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the debug information of the object file: {0}")]
pub struct DebugError(pub(crate) String);

impl From<gimli::Error> for DebugError {
    fn from(cause: gimli::Error) -> Self {
        Self(cause.to_string())
    }
}
