//! A process that gives up its rights for good: what reads a guest's memory needs none once its descriptors are open.
//!
//! The layers do not depend on one another: one that the host lacks, or that has a flaw, leaves the others:
//!
//! - **descriptors**: all are closed that are not named;
//! - **user**: another user and group, no further groups, no capability, and none by a program that is started (`no_new_privs`); no core dump,
//!   which would hold the guest's memory, and last where the guest is paused;
//! - **landlock**: no file, no port, no process outside ([`landlock(7)`](https://docs.kernel.org/userspace-api/landlock.html), Linux 5.13);
//! - **seccomp**: a list of the system calls that are needed; all others fail with EPERM, which ends no process and keeps no guest paused.

mod calls;
mod child;
mod layers;

pub use child::in_own_process;
pub(crate) use child::wait_for_children;
pub use layers::{Layer, Missing, SandboxError, User, restrict};

/// Whether the process that reads a guest gives up its rights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Sandbox {
    /// As far as the host lets it.
    #[default]
    Auto,
    /// All of them, or the guest is not opened.
    Require,
    /// No.
    Off,
}
