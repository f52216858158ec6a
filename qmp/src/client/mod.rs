//! A QMP client: one task owns the socket, any number of callers share it.
//!
//! The commands' types come from the `qapi` crate; its own stream is not used, because an event that the crate does
//! not know, or a reply that comes after its caller gave up, ends it. Here a line is parsed to JSON first and
//! dispatched on `id` or `event`, so both are harmless.
//!
//! Protocol: QEMU's `docs/interop/qmp-spec.rst` (the same from 2.x to 10.0).

mod actor;
mod descriptor;
mod error;
mod wire;

pub use error::{CommandError, ConnectError};
pub(crate) use wire::read_all;
pub use wire::{Event, Greeting};

use actor::Request;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use std::io::ErrorKind;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::net::UnixStream;
use tokio::sync::{broadcast, mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};

/// How long one command may take, in seconds, unless the caller says otherwise: `stop` drains the guest's disks on
/// QEMU's main loop, which a slow disk can hold for seconds; beyond ten, QEMU is as good as hung.
const COMMAND_TIMEOUT_S: u64 = 10;

/// Requests that may wait for the task that owns the socket. QEMU itself queues eight commands; more only wait here.
const REQUEST_QUEUE_LEN: usize = 16;

/// Between two tries at a full listen queue, in milliseconds: the kernel gives no other sign that it has room again.
const QUEUE_RETRY_MS: u64 = 10;

/// Events kept for a receiver that is not reading. QEMU rate-limits its chatty events; 256 is minutes of a busy guest.
const EVENT_QUEUE_LEN: usize = 256;

/// Lines skipped before the greeting. QEMU carries out one command at a time, so there are a few at most.
const STALE_LINES_MAX: usize = 16;

/// What a command is told that comes after the connection's end.
const GONE: &str = "it had ended before";

/// A QMP connection, past its greeting and ready for commands. Dropping it closes the connection.
///
/// Needs a running tokio runtime: its task makes progress only while the runtime is driven.
#[derive(Debug)]
pub struct Client {
    path: PathBuf,
    greeting: Greeting,
    peer_pid: Option<i32>,
    command_timeout: Duration,
    requests: mpsc::Sender<Request>,
    /// To subscribe by. Never read, and no sender: the last one must go with the connection, whose end the others are to see.
    events: broadcast::Receiver<Event>,
    task: JoinHandle<()>,
}

impl Client {
    /// Connects to the QMP socket at `path` and negotiates, all within `within`.
    ///
    /// Errors: see [`ConnectError`]; a socket held by another client shows as [`ConnectError::Held`].
    pub async fn connect(path: &Path, within: Duration) -> Result<Self, ConnectError> {
        let held = || ConnectError::Held {
            path: path.to_owned(),
            within_ms: within.as_millis(),
        };
        timeout(within, Self::negotiate(path)).await.map_err(|_| held())?
    }

    async fn negotiate(path: &Path) -> Result<Self, ConnectError> {
        let stream = reach(path).await?;
        let peer_pid = stream.peer_cred().ok().and_then(|cred| cred.pid());
        let (requests, queue) = mpsc::channel(REQUEST_QUEUE_LEN);
        let (sender, events) = broadcast::channel(EVENT_QUEUE_LEN);
        let mut lines = wire::LineReader::new(stream);
        let greeting = greet(path, &mut lines).await?;
        let task = tokio::spawn(actor::run(lines, queue, sender));
        let client = Self {
            path: path.to_owned(),
            greeting,
            peer_pid,
            command_timeout: Duration::from_secs(COMMAND_TIMEOUT_S),
            requests,
            events,
            task,
        };
        match client.execute(qapi::qmp::qmp_capabilities { enable: None }).await {
            Ok(_) => Ok(client),
            Err(cause) => Err(ConnectError::Capabilities {
                path: path.to_owned(),
                cause,
            }),
        }
    }

    /// The socket's path, as given to [`Client::connect`].
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What QEMU said of itself on connecting.
    pub fn greeting(&self) -> &Greeting {
        &self.greeting
    }

    /// The process at the other end, as the kernel remembers it: the one that called `listen` on the socket. That is
    /// QEMU, unless a manager opened the socket and handed it down.
    pub fn peer_pid(&self) -> Option<i32> {
        self.peer_pid
    }

    /// Changes how long each later command may take.
    pub fn set_command_timeout(&mut self, within: Duration) {
        self.command_timeout = within;
    }

    /// Every event from now on, those unknown to the `qapi` crate included. A receiver that falls behind by more than
    /// 256 events is told so and loses the oldest.
    pub fn events(&self) -> broadcast::Receiver<Event> {
        self.events.resubscribe()
    }

    /// Runs a typed command. Errors: [`CommandError`]; after a time-out the connection stays usable.
    pub async fn execute<C: qapi::Command>(&self, command: C) -> Result<C::Ok, CommandError> {
        let arguments = encode(&command, C::NAME)?;
        decode(C::NAME, self.call(C::NAME, arguments, None).await?)
    }

    /// Runs a command by name, with a reply type of the caller's own. For replies whose `qapi` type is stricter than
    /// QEMU is: its enumerations refuse a word that a newer QEMU added.
    pub async fn execute_as<T: DeserializeOwned>(&self, name: &str, arguments: Value) -> Result<T, CommandError> {
        decode(name, self.call(name, arguments, None).await?)
    }

    /// Runs a typed command that takes a descriptor (`getfd`, `add-fd`), passing `fd` along as SCM_RIGHTS.
    pub async fn execute_with_fd<C: qapi::Command>(&self, command: C, fd: OwnedFd) -> Result<C::Ok, CommandError> {
        let arguments = encode(&command, C::NAME)?;
        decode(C::NAME, self.call(C::NAME, arguments, Some(fd)).await?)
    }

    /// Runs a line of the human monitor and returns what it printed. The human monitor has no errors: a refusal is
    /// part of the text.
    pub async fn hmp(&self, line: &str) -> Result<String, CommandError> {
        self.execute(qapi::qmp::human_monitor_command {
            cpu_index: None,
            command_line: line.to_owned(),
        })
        .await
    }

    /// Closes the connection. Every later command fails with [`CommandError::Disconnected`].
    pub async fn disconnect(&mut self) {
        self.task.abort();
        // It has dropped the socket when it has ended.
        let _ = (&mut self.task).await;
    }

    async fn call(&self, name: &str, arguments: Value, fd: Option<OwnedFd>) -> Result<Value, CommandError> {
        let (reply, answer) = oneshot::channel();
        let gone = || CommandError::Disconnected {
            command: name.to_owned(),
            cause: GONE.to_owned(),
        };
        let request = Request {
            name: name.to_owned(),
            arguments,
            fd,
            reply,
        };
        let exchange = async {
            self.requests.send(request).await.map_err(|_| gone())?;
            answer.await.map_err(|_| gone())?
        };
        timeout(self.command_timeout, exchange).await.unwrap_or_else(|_| {
            Err(CommandError::Timeout {
                command: name.to_owned(),
                within_ms: self.command_timeout.as_millis(),
            })
        })
    }
}

/// Connects, waiting while the listen queue is full: QEMU's is one long, so somebody is served and somebody else waits.
async fn reach(path: &Path) -> Result<UnixStream, ConnectError> {
    loop {
        match UnixStream::connect(path).await {
            Err(cause) if cause.kind() == ErrorKind::WouldBlock => sleep(Duration::from_millis(QUEUE_RETRY_MS)).await,
            result => return result.map_err(|cause| ConnectError::from_connect(path, cause)),
        }
    }
}

/// Reads the greeting. Before it may come what answers a client that was killed in the middle of a command: QEMU sends
/// a result to whoever is connected by then (seen with 10.0.2).
async fn greet(path: &Path, lines: &mut wire::LineReader) -> Result<Greeting, ConnectError> {
    let path = path.to_owned();
    let mut found = String::new();
    for _ in 0..STALE_LINES_MAX {
        let line = match lines.next().await {
            Ok(line) => line,
            Err(cause) => return Err(ConnectError::Lost { path, cause }),
        };
        if let Some(greeting) = Greeting::parse(&line) {
            return Ok(greeting);
        }
        found = wire::excerpt(&line);
        if wire::parse_message(&line).is_none() {
            break;
        }
    }
    Err(ConnectError::NotQmp { path, found })
}

impl Drop for Client {
    fn drop(&mut self) {
        self.task.abort();
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
