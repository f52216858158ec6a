//! What each command does; each gives a report, or fails with [`Failure`](super::failure::Failure).

mod apply;
mod describe;
mod domains;
mod finish;
mod inspect;
mod revert;
mod status;
mod steps;
mod target;
mod update;
mod upgrade;

pub use apply::{apply, check};
pub use domains::domains;
pub use finish::finish;
pub use inspect::inspect;
pub use revert::revert;
pub use status::status;
pub use update::update;
pub use upgrade::upgrade;
