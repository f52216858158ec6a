//! Moving a running guest into another QEMU of the same host, patches intact.
//!
//! The way of a move: [`prepare`] finds out whether it can be done and how, and changes nothing ([`files`] and [`named`] see that
//! names still lead to what the old process has); [`line`] makes the new process's command line; [`successor`] starts it, [`launch`] being what it is until it becomes QEMU; [`compare`] demands that both make
//! the same machine; QEMU moves the guest, which then stands in both; [`identity`] demands that what arrived is what was sent.
//! Only then is it let run in the new process, which takes over the old one's [`names`](crate::domains::names), and the old one is
//! ended. Until then every failure leaves the guest in the old process; [`watch`] and [`settle`] see to it where vmpatch itself
//! is killed.

mod arrived;
pub mod binary;
mod compare;
mod descriptor;
pub mod due;
mod error;
mod files;
mod fit;
mod folder;
mod identity;
pub mod launch;
mod line;
mod named;
mod origin;
mod owner;
mod prepare;
mod rights;
mod run;
mod settle;
mod signals;
mod successor;
mod tap;
pub mod watch;
mod way;

pub use binary::BinaryError;
pub use error::UpgradeError;
pub use identity::IdentityError;
pub use line::Refused;
pub use origin::OriginError;
pub use run::run;
pub use settle::{Settled, resume_cut_off, settle};
