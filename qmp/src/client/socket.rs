//! A QMP monitor at a Unix socket: one task owns the socket, any number of callers share it.

use super::actor::{self, Request};
use super::error::{CommandError, ConnectError};
use super::transport::{Answer, Command, Transport};
use super::wire::{self, Event, Greeting};
use std::io::ErrorKind;
use std::path::Path;
use std::pin::Pin;
use std::time::Duration;
use tokio::net::UnixStream;
use tokio::sync::{broadcast, mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio::time::sleep;

/// Most requests that wait for the task that owns the socket. QEMU itself queues eight commands.
const REQUEST_QUEUE_LEN: usize = 16;

/// Interval between two attempts to connect to a full listen queue, in milliseconds. The kernel gives no other sign that the queue has space again.
const QUEUE_RETRY_MS: u64 = 10;

/// Events that are kept for a receiver that does not read. QEMU limits the rate of frequent events: 256 are minutes of a busy guest.
const EVENT_QUEUE_LEN: usize = 256;

/// Most lines that are skipped before the greeting. QEMU executes one command at a time, so that there are only a few.
const STALE_LINES_MAX: usize = 16;

/// The reason in the error of a command after the end of the connection.
const GONE: &str = "it had ended before";

/// A connection to a QMP socket, after the greeting. When it is dropped, it closes the connection.
#[derive(Debug)]
pub struct Socket {
    peer_pid: Option<i32>,
    requests: mpsc::Sender<Request>,
    /// A receiver to subscribe with, which is never read. It is not a sender, because the last sender must be dropped with the connection: subscribers see its
    /// end by that.
    events: broadcast::Receiver<Event>,
    task: JoinHandle<()>,
}

impl Socket {
    /// Connects to the QMP socket at `path`, and waits for its greeting.
    pub async fn connect(path: &Path) -> Result<(Self, Greeting), ConnectError> {
        let stream = reach(path).await?;
        let peer_pid = stream.peer_cred().ok().and_then(|cred| cred.pid());
        let (requests, queue) = mpsc::channel(REQUEST_QUEUE_LEN);
        let (sender, events) = broadcast::channel(EVENT_QUEUE_LEN);
        let mut lines = wire::LineReader::new(stream);
        let greeting = greet(path, &mut lines).await?;
        let task = tokio::spawn(actor::run(lines, queue, sender));
        let socket = Self {
            peer_pid,
            requests,
            events,
            task,
        };
        Ok((socket, greeting))
    }

    async fn answer(&self, command: Command) -> Result<serde_json::Value, CommandError> {
        let (reply, answer) = oneshot::channel();
        let name = command.name.clone();
        let gone = || CommandError::Disconnected {
            command: name.clone(),
            cause: GONE.to_owned(),
        };
        let request = Request { command, reply };
        self.requests.send(request).await.map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }
}

impl Transport for Socket {
    fn call(&self, command: Command) -> Answer<'_> {
        Box::pin(self.answer(command))
    }

    fn events(&self) -> broadcast::Receiver<Event> {
        self.events.resubscribe()
    }

    /// The process that called `listen` on the socket, from the kernel. That is QEMU, unless a manager has opened the socket for QEMU.
    fn peer_pid(&self) -> Option<i32> {
        self.peer_pid
    }

    fn close(&mut self) -> Pin<Box<dyn Future<Output = ()> + Send + '_>> {
        self.task.abort();
        Box::pin(async {
            // The socket is closed when the task has ended.
            let _ = (&mut self.task).await;
        })
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Connects, and waits while the listen queue is full. QEMU's queue has one place: one client is served, and another one waits.
async fn reach(path: &Path) -> Result<UnixStream, ConnectError> {
    loop {
        match UnixStream::connect(path).await {
            Err(cause) if cause.kind() == ErrorKind::WouldBlock => sleep(Duration::from_millis(QUEUE_RETRY_MS)).await,
            result => return result.map_err(|cause| ConnectError::from_connect(path, cause)),
        }
    }
}

/// Reads the greeting. A reply to a client that was killed in the middle of a command may come before: QEMU sends it to the client that is connected by then
/// (seen with 10.0.2).
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
