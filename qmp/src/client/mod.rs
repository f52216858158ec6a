//! A QMP client: typed commands over any [`Transport`] to the monitor.
//!
//! The `qapi` crate defines the types of the commands. Its stream is not used, because an unknown event, or a reply that comes after its caller gave up,
//! ends that stream. Here a line is first parsed to JSON, and dispatched on `id` or `event`, so that both are harmless.
//!
//! Protocol: QEMU's `docs/interop/qmp-spec.rst` (the same from 2.x to 10.0).

mod actor;
mod descriptor;
mod error;
mod libvirt;
mod socket;
mod transport;
mod wire;

pub use error::{CommandError, ConnectError};
pub(crate) use libvirt::read_all as read_libvirt;
pub use libvirt::{LibvirtError, LibvirtGuest};
pub use transport::{Answer, Command, Transport};
pub(crate) use wire::read_all;
pub use wire::{Event, Greeting};

use libvirt::LibvirtMonitor;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use socket::Socket;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;
use tokio::sync::broadcast;
use tokio::time::timeout;

/// Default timeout of a command, in seconds. `stop` drains the guest's disks on QEMU's main loop, which may take seconds with a slow disk. After ten
/// seconds, QEMU is considered to hang.
const COMMAND_TIMEOUT_S: u64 = 10;

/// A QMP monitor, ready for commands. When it is dropped, it releases the monitor.
///
/// It needs a running tokio runtime: its transport makes progress only while the runtime is driven.
#[derive(Debug)]
pub struct Client {
    transport: Box<dyn Transport>,
    greeting: Greeting,
    command_timeout: Duration,
}

impl Client {
    /// Connects to the QMP socket at `path` and negotiates, all within `within`.
    ///
    /// # Errors
    ///
    /// There is no connection. For a socket that another client holds, the error is [`ConnectError::Held`].
    pub async fn connect(path: &Path, within: Duration) -> Result<Self, ConnectError> {
        let held = || ConnectError::Held {
            path: path.to_owned(),
            within_ms: within.as_millis(),
        };
        timeout(within, Self::negotiate(path)).await.map_err(|_| held())?
    }

    async fn negotiate(path: &Path) -> Result<Self, ConnectError> {
        let (socket, greeting) = Socket::connect(path).await?;
        let client = Self::over(Box::new(socket), greeting);
        match client.execute(qapi::qmp::qmp_capabilities { enable: None }).await {
            Ok(_) => Ok(client),
            Err(cause) => Err(ConnectError::Capabilities {
                path: path.to_owned(),
                cause,
            }),
        }
    }

    /// Connects to the monitor of the QEMU `pid` through libvirt, which holds it, all within `within`. That `pid` is this guest's QEMU is for the caller to check.
    ///
    /// # Errors
    ///
    /// libvirt or the monitor is not reached.
    pub async fn connect_libvirt(guest: &LibvirtGuest, pid: i32, within: Duration) -> Result<Self, ConnectError> {
        let connecting = async {
            let monitor = LibvirtMonitor::connect(guest, pid).await?;
            let unknown = Greeting {
                version: (0, 0, 0),
                package: String::new(),
            };
            let mut client = Self::over(Box::new(monitor), unknown);
            let version: Value = client
                .execute_as("query-version", json!({}))
                .await
                .map_err(|cause| ConnectError::Version { cause })?;
            client.greeting = Greeting::of_version(&version).ok_or_else(|| ConnectError::NotQmp {
                path: guest.socket.clone(),
                found: wire::excerpt(version.to_string().as_bytes()),
            })?;
            Ok(client)
        };
        let late = || ConnectError::LibvirtLate {
            path: guest.socket.clone(),
            within_ms: within.as_millis(),
        };
        timeout(within, connecting).await.map_err(|_| late())?
    }

    /// A client of the QEMU that sent `greeting`, whose monitor executes commands through `transport`.
    pub fn over(transport: Box<dyn Transport>, greeting: Greeting) -> Self {
        Self {
            transport,
            greeting,
            command_timeout: Duration::from_secs(COMMAND_TIMEOUT_S),
        }
    }

    /// QEMU's greeting, with its version.
    pub fn greeting(&self) -> &Greeting {
        &self.greeting
    }

    /// The process at the other end: see [`Transport::peer_pid`].
    pub fn peer_pid(&self) -> Option<i32> {
        self.transport.peer_pid()
    }

    /// Sets the timeout of later commands.
    pub fn set_command_timeout(&mut self, within: Duration) {
        self.command_timeout = within;
    }

    /// Subscribes to the events from now on, including those unknown to the `qapi` crate. A receiver that falls behind by more than 256 events gets an error
    /// and loses the oldest. For a transport without events, the receiver is closed.
    pub fn events(&self) -> broadcast::Receiver<Event> {
        self.transport.events()
    }

    /// Runs a typed command.
    ///
    /// # Errors
    ///
    /// The command failed. After a timeout, the connection stays usable.
    pub async fn execute<C: qapi::Command>(&self, command: C) -> Result<C::Ok, CommandError> {
        let arguments = encode(&command, C::NAME)?;
        decode(C::NAME, self.call(C::NAME, arguments, None).await?)
    }

    /// Runs a command by name, with a reply type of the caller. For replies whose `qapi` type is too strict: its enumerations refuse a word that a newer QEMU
    /// has added.
    pub async fn execute_as<T: DeserializeOwned>(&self, name: &str, arguments: Value) -> Result<T, CommandError> {
        decode(name, self.call(name, arguments, None).await?)
    }

    /// Runs a typed command that takes a descriptor (`getfd`, `add-fd`), and passes `fd` with it.
    pub async fn execute_with_fd<C: qapi::Command>(&self, command: C, fd: OwnedFd) -> Result<C::Ok, CommandError> {
        let arguments = encode(&command, C::NAME)?;
        decode(C::NAME, self.call(C::NAME, arguments, Some(fd)).await?)
    }

    /// Runs a line of the human monitor and gives its output. The human monitor has no errors: a refusal is part of the output.
    pub async fn hmp(&self, line: &str) -> Result<String, CommandError> {
        self.execute(qapi::qmp::human_monitor_command {
            cpu_index: None,
            command_line: line.to_owned(),
        })
        .await
    }

    /// Releases the monitor. Every later command fails with [`CommandError::Disconnected`].
    pub async fn disconnect(&mut self) {
        self.transport.close().await;
    }

    async fn call(&self, name: &str, arguments: Value, fd: Option<OwnedFd>) -> Result<Value, CommandError> {
        let command = Command {
            name: name.to_owned(),
            arguments,
            fd,
        };
        let answer = timeout(self.command_timeout, self.transport.call(command));
        answer.await.unwrap_or_else(|_| {
            Err(CommandError::Timeout {
                command: name.to_owned(),
                within_ms: self.command_timeout.as_millis(),
            })
        })
    }
}

fn encode<C: qapi::Command>(command: &C, name: &str) -> Result<Value, CommandError> {
    match serde_json::to_value(command) {
        Ok(Value::Null) => Ok(json!({})),
        Ok(arguments) => Ok(arguments),
        Err(cause) => Err(CommandError::Arguments {
            command: name.to_owned(),
            cause: cause.to_string(),
        }),
    }
}

fn decode<T: DeserializeOwned>(name: &str, value: Value) -> Result<T, CommandError> {
    let found = value.to_string();
    serde_json::from_value(value).map_err(|cause| CommandError::Reply {
        command: name.to_owned(),
        cause: cause.to_string(),
        found: wire::excerpt(found.as_bytes()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::pin::Pin;
    use std::sync::Mutex;
    use tokio::sync::broadcast::Receiver;

    /// One command, one answer, and no events, as libvirt passes them on.
    #[derive(Debug)]
    struct OneByOne {
        answers: Mutex<Vec<Value>>,
    }

    impl Transport for OneByOne {
        fn call(&self, command: Command) -> Answer<'_> {
            let answer = self.answers.lock().unwrap().pop();
            Box::pin(async move {
                match answer {
                    Some(answer) => Ok(answer),
                    None => std::future::pending().await,
                }
                .inspect(|_| assert_eq!(command.name, "query-name"))
            })
        }

        fn events(&self) -> Receiver<Event> {
            broadcast::channel(1).1
        }

        fn peer_pid(&self) -> Option<i32> {
            Some(7)
        }

        fn close(&mut self) -> Pin<Box<dyn Future<Output = ()> + Send + '_>> {
            Box::pin(async { self.answers.lock().unwrap().clear() })
        }
    }

    #[tokio::test]
    async fn commands_go_over_any_transport_and_each_has_its_time() {
        let answers = Mutex::new(vec![json!({"name": 1}), json!({"name": "vm42"})]);
        let greeting = Greeting {
            version: (10, 0, 2),
            package: String::new(),
        };
        let mut client = Client::over(Box::new(OneByOne { answers }), greeting);
        client.set_command_timeout(Duration::from_millis(20));
        let name = client.execute(qapi::qmp::query_name {}).await.unwrap().name;
        assert_eq!((name.as_deref(), client.peer_pid()), (Some("vm42"), Some(7)));
        assert!(client.events().recv().await.is_err());
        let other_form = client.execute(qapi::qmp::query_name {}).await.unwrap_err();
        assert!(matches!(other_form, CommandError::Reply { .. }), "{other_form}");
        client.disconnect().await;
        let late = client.execute(qapi::qmp::query_name {}).await.unwrap_err();
        assert!(matches!(late, CommandError::Timeout { within_ms: 20, .. }), "{late}");
    }
}
