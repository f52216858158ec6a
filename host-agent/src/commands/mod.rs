//! What each command does; each gives a report, or fails with [`Failure`].

mod apply;
mod build;
mod domains;
mod inspect;
mod revert;
pub(crate) mod status;
mod steps;
mod update;

pub use apply::{apply, check};
pub use build::build;
pub use domains::domains;
pub use inspect::inspect;
pub use revert::revert;
pub use status::status;
pub use update::update;
