//! The task that owns the QMP socket.

use super::descriptor::send_line;
use super::error::CommandError;
use super::transport::Command;
use super::wire::{self, Event, LineError, LineReader, Message, Refusal};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::time::{SystemTime, UNIX_EPOCH};
use tokio::sync::{broadcast, mpsc, oneshot};

/// A command, with the channel for its reply.
#[derive(Debug)]
pub struct Request {
    pub command: Command,
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

/// Sends requests, and distributes replies and events, until the client is dropped or the connection ends. Then every waiting command gets the reason.
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
    while let Ok(Request { command, reply }) = queue.try_recv() {
        let name = command.name;
        Pending { name, reply }.fail(&cause);
    }
}

/// The first id: the time in nanoseconds, so that the result of an earlier client, which was killed in the middle of a command, is not taken for ours.
fn first_id() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    // QEMU's JSON integers have 63 bits.
    u64::try_from(since.as_nanos()).unwrap_or(0) & (u64::MAX >> 2)
}

/// Sends a command. Nothing is read meanwhile. This cannot deadlock, because QEMU buffers its replies and continues to read.
async fn submit(
    lines: &LineReader,
    request: Request,
    id: u64,
    pending: &mut HashMap<u64, Pending>,
) -> Result<(), LineError> {
    // Callers that gave up have dropped their end. They are removed, so that the table cannot grow.
    pending.retain(|_, waiting| !waiting.reply.is_closed());
    let Request { command, reply } = request;
    let Command { name, arguments, fd } = command;
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
        // It is no error if there is no receiver.
        Some(Message::Event(event)) => drop(events.send(event)),
        Some(Message::Reply { id, result }) => {
            // A reply whose caller gave up has no entry, or a closed channel, and is dropped.
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
