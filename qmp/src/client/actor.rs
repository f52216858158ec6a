//! The task that owns the QMP socket.

use super::descriptor::send_line;
use super::error::CommandError;
use super::wire::{self, Event, LineError, LineReader, Message, Refusal};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::time::{SystemTime, UNIX_EPOCH};
use tokio::sync::{broadcast, mpsc, oneshot};

/// A command on its way to QEMU.
#[derive(Debug)]
pub struct Request {
    pub name: String,
    pub arguments: Value,
    pub fd: Option<OwnedFd>,
    pub reply: oneshot::Sender<Result<Value, CommandError>>,
}

/// A command that QEMU has not answered yet.
struct Pending {
    name: String,
    reply: oneshot::Sender<Result<Value, CommandError>>,
}

impl Pending {
    fn fail(self, cause: &str) {
        drop(self.reply.send(Err(CommandError::Disconnected {
            command: self.name,
            cause: cause.to_owned(),
        })));
    }
}

/// Moves requests out and replies and events in, until the client is dropped or the connection ends.
/// Then every command still waiting is told why.
pub async fn run(mut lines: LineReader, mut queue: mpsc::Receiver<Request>, events: broadcast::Sender<Event>) {
    let mut pending = HashMap::new();
    let mut next_id = first_id();
    let cause = loop {
        tokio::select! {
            request = queue.recv() => {
                let Some(request) = request else { return };
                next_id += 1;
                if let Err(cause) = submit(&lines, request, next_id, &mut pending).await {
                    break cause.to_string();
                }
            }
            line = lines.next() => match receive(line, &mut pending, &events) {
                Ok(()) => {}
                Err(cause) => break cause,
            },
        }
    };
    queue.close();
    for (_, waiting) in pending.drain() {
        waiting.fail(&cause);
    }
    while let Ok(Request { name, reply, .. }) = queue.try_recv() {
        Pending { name, reply }.fail(&cause);
    }
}

/// Where ids begin: at the time in nanoseconds, so that a result meant for an earlier client, killed in the middle of a
/// command, is not taken for one of ours.
fn first_id() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    // QEMU's JSON integers have 63 bits.
    u64::try_from(since.as_nanos()).unwrap_or(0) & (u64::MAX >> 2)
}

/// Sends a command. Reading waits meanwhile, which cannot lock up: QEMU buffers its replies and goes on reading.
async fn submit(
    lines: &LineReader,
    request: Request,
    id: u64,
    pending: &mut HashMap<u64, Pending>,
) -> Result<(), LineError> {
    // Callers that gave up have dropped their end: forget them, so that the table cannot grow.
    pending.retain(|_, waiting| !waiting.reply.is_closed());
    let Request {
        name,
        arguments,
        fd,
        reply,
    } = request;
    let mut line = json!({ "execute": name, "arguments": arguments, "id": id }).to_string();
    line.push('\n');
    pending.insert(id, Pending { name, reply });
    send_line(lines.stream(), line.as_bytes(), fd)
        .await
        .map_err(LineError::Io)
}

fn receive(
    line: Result<Vec<u8>, LineError>,
    pending: &mut HashMap<u64, Pending>,
    events: &broadcast::Sender<Event>,
) -> Result<(), String> {
    let line = line.map_err(|cause| cause.to_string())?;
    match wire::parse_message(&line) {
        None => return Err(format!("QEMU sent what is not JSON: {}", wire::excerpt(&line))),
        // Nobody listening is no error.
        Some(Message::Event(event)) => drop(events.send(event)),
        Some(Message::Reply { id, result }) => {
            // A reply whose caller timed out finds no entry, or a closed one: dropped, as it should be.
            if let Some(Pending { name, reply }) = pending.remove(&id) {
                let result = result.map_err(|Refusal { class, description }| CommandError::Refused {
                    command: name,
                    class,
                    description,
                });
                drop(reply.send(result));
            }
        }
        Some(Message::Other) => {}
    }
    Ok(())
}
