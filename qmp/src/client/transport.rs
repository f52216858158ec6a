//! Transports of QMP commands to a monitor.
//!
//! A monitor is reached by QEMU's own socket ([`super::socket`]), or through the program that holds this socket: libvirt passes on one command, gives back its
//! reply, and reports no events.

use super::error::CommandError;
use super::wire::Event;
use serde_json::Value;
use std::fmt::Debug;
use std::os::fd::OwnedFd;
use std::pin::Pin;
use tokio::sync::broadcast::Receiver;

/// A command on its way to QEMU.
#[derive(Debug)]
pub struct Command {
    /// Name of the command, such as `query-status`.
    pub name: String,
    /// Arguments, a JSON object.
    pub arguments: Value,
    /// A descriptor that is passed with the command (`getfd`, `add-fd`).
    pub fd: Option<OwnedFd>,
}

/// The future reply to a command.
pub type Answer<'a> = Pin<Box<dyn Future<Output = Result<Value, CommandError>> + Send + 'a>>;

/// A connection to a QMP monitor that executes commands.
pub trait Transport: Debug + Send + Sync {
    /// Sends a command, and gives the value that QEMU returns.
    ///
    /// The caller may give up: a reply that comes later must do no harm, and must not be taken for the reply to another command.
    ///
    /// # Errors
    ///
    /// The command failed, or this transport cannot pass its descriptor.
    fn call(&self, command: Command) -> Answer<'_>;

    /// Subscribes to the events from now on. A transport without events gives a closed receiver.
    fn events(&self) -> Receiver<Event>;

    /// The QEMU process, if the transport can tell.
    fn peer_pid(&self) -> Option<i32>;

    /// Releases the monitor for another client. Later commands fail.
    fn close(&mut self) -> Pin<Box<dyn Future<Output = ()> + Send + '_>>;
}
