//! A VM that can be reached, whatever hypervisor runs it.
//!
//! All other code of this crate that patches a guest knows [`Hypervisor`] alone. A further hypervisor is a further implementation, and one
//! more [`Route`] to it. Moving a guest into another QEMU ([`crate::upgrade`]) is QEMU's own business, and talks to QEMU.
//!
//! Every method blocks. One that is called from an asynchronous runtime belongs on a thread of its own
//! (`tokio::task::spawn_blocking`); a VM may move between threads.

mod error;
mod guard;
mod kvm;
mod monitorless;
pub mod qemu;
pub mod ram;
mod route;
pub(crate) mod stops;
mod threads;

pub use error::{Meaning, ReachError};
pub use guard::{ChangeGuard, GuardedMachine};
pub use kvm::KvmError;
pub use route::{PauseMethod, Route, RouteError};
pub use threads::{ThreadsError, VcpuThreads};

use guest_core::machine::{MachineError, Paused, WriteCode};
use guest_core::{PhysMemory, Registers};
use ram::GuestRam;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::io;

/// A VM that was reached. Reaching it does not pause it.
pub trait Hypervisor: Send {
    /// Who it is.
    fn identity(&self) -> &Identity;

    /// How another process reaches it again: the supervisor is given that.
    fn route(&self) -> Route;

    /// The guest's RAM.
    fn memory(&self) -> &dyn PhysMemory;

    /// The guest's RAM for a process that is about to give up its rights: what is not mapped can be read alone.
    ///
    /// # Errors
    ///
    /// The host does not show it that way.
    fn memory_without_rights(&self) -> io::Result<GuestRam>;

    /// Registers of all vCPUs while they run. Values that change all the time may be torn; those that do not change after boot are
    /// right.
    ///
    /// # Errors
    ///
    /// The hypervisor does not tell them.
    fn registers_running(&self) -> Result<Vec<Registers>, ReachError>;

    /// What the hypervisor does with the guest's memory now.
    ///
    /// # Errors
    ///
    /// It was asked and did not answer. One that nobody can ask is [`Activity::Unknown`].
    fn activity(&self) -> Result<Activity, ReachError>;

    /// The guest's vCPUs, to pause them. One at a time.
    fn vcpus(&self) -> Box<dyn Vcpus + '_>;

    /// Removes from the hypervisor what a vmpatch that was killed has left there, unless this process uses it.
    ///
    /// # Errors
    ///
    /// It may still be there.
    fn remove_leftovers(&self) -> Result<(), ReachError>;

    /// Lets go of the VM, so that another process can reach it. What needs the hypervisor fails from then on.
    fn disconnect(&self);

    /// Takes over from a killed vmpatch, which may have left the guest paused.
    ///
    /// # Errors
    ///
    /// It was not reached.
    fn take_over(&self) -> Result<Box<dyn TakenOver + '_>, ReachError>;
}

/// The vCPUs of a guest.
pub trait Vcpus {
    /// Makes all ready that a pause needs, so that the pause is short. Does not pause the guest.
    ///
    /// # Errors
    ///
    /// The guest can't be paused.
    fn prepare(&mut self) -> Result<Prepared, MachineError>;

    /// Pauses them all: see [`guest_core::machine::Machine::pause`].
    ///
    /// # Errors
    ///
    /// They run as before, unless [`MachineError::left_paused`].
    fn pause(&mut self) -> Result<Box<dyn Paused + '_>, MachineError>;
}

/// A guest that is ready to be paused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prepared {
    /// It runs, and is to run again.
    pub running: bool,
    /// Where its vCPUs are paused by their threads, and so run by themselves should this process die: those threads.
    pub threads: Option<VcpuThreads>,
}

/// A guest that a killed vmpatch may have left paused. It may run: each write pauses it where it does.
pub trait TakenOver: WriteCode {
    /// True where the guest may have run since the killed vmpatch paused it.
    fn has_run(&self) -> bool;

    /// Lets the guest run, where it is paused.
    ///
    /// # Errors
    ///
    /// It is not known to run.
    fn resume(self: Box<Self>) -> Result<(), MachineError>;
}

/// Who a VM is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// The process that runs it.
    pub pid: i32,
    /// The guest's name, where the process was given one.
    pub name: Option<String>,
    /// How its vCPUs run.
    pub accelerator: Accelerator,
    /// The version of the program that runs it: major, minor, micro. None where it does not tell.
    pub version: Option<(u64, u64, u64)>,
}

impl Identity {
    /// The version as text, `10.0.2`; empty where there is none.
    pub fn version_text(&self) -> String {
        match self.version {
            Some((major, minor, micro)) => format!("{major}.{minor}.{micro}"),
            None => String::new(),
        }
    }
}

/// How vCPUs run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accelerator {
    /// QEMU translates the guest's code.
    Tcg,
    /// The host's kernel runs it.
    Kvm,
}

impl Accelerator {
    /// `tcg` or `kvm`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Tcg => "tcg",
            Self::Kvm => "kvm",
        }
    }
}

impl fmt::Display for Accelerator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What a hypervisor does with the guest's whole memory. A write from outside is in no dirty log, so what it makes meanwhile could
/// hold half a patch.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Activity {
    /// Nothing.
    Idle,
    /// A migration, a snapshot or a dump, in words.
    Busy(String),
    /// There is no monitor to ask: the operator has to know.
    Unknown,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reached_vm_may_move_to_another_thread() {
        fn is_send<T: Send + ?Sized>() {}
        is_send::<Box<dyn Hypervisor>>();
        is_send::<crate::session::Session>();
    }
}
