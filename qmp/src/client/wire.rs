//! Lines and messages of the QMP wire format.

use serde_json::Value;
use std::io;
use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;

/// Longest message that is accepted, in bytes. The longest real ones are the replies to `query-qmp-schema` (0.3 MB) and to `info mtree` of a guest with
/// hundreds of devices (a few MB). A peer must not fill our memory.
const LINE_BYTES_MAX: usize = 16 << 20;

/// Bytes of one read from the socket. A reply to `info mtree -f` takes a few reads.
const READ_BYTES: usize = 64 << 10;

/// Most bytes of a message that an error quotes.
const EXCERPT_BYTES: usize = 120;

/// Why no message was read.
#[derive(Debug, thiserror::Error)]
pub enum LineError {
    /// The peer closed the connection.
    #[error("QEMU closed the connection")]
    Closed,
    /// The message is longer than the limit.
    #[error("a message is longer than {LINE_BYTES_MAX} bytes")]
    TooLong,
    /// The socket failed.
    #[error("the socket failed: {0}")]
    Io(#[from] io::Error),
}

/// Splits bytes into lines of at most `limit` bytes.
#[derive(Debug)]
struct LineBuffer {
    bytes: Vec<u8>,
    /// Number of bytes already searched for an end of line.
    searched: usize,
    limit: usize,
}

impl LineBuffer {
    fn new(limit: usize) -> Self {
        Self {
            bytes: Vec::new(),
            searched: 0,
            limit,
        }
    }

    /// The next complete line, without its end; `None` if more bytes are needed.
    fn take(&mut self) -> Result<Option<Vec<u8>>, LineError> {
        let unsearched = self.bytes.get(self.searched..).unwrap_or_default();
        let Some(found) = unsearched.iter().position(|&byte| byte == b'\n') else {
            self.searched = self.bytes.len();
            return if self.bytes.len() > self.limit {
                Err(LineError::TooLong)
            } else {
                Ok(None)
            };
        };
        let rest = self.bytes.split_off(self.searched + found + 1);
        let mut line = std::mem::replace(&mut self.bytes, rest);
        self.searched = 0;
        while matches!(line.last(), Some(b'\n' | b'\r')) {
            line.pop();
        }
        Ok(Some(line))
    }
}

/// Joins the lines of a pretty-printed message: with `pretty=on`, QEMU (qobject/json-writer.c, 7.2 to 11.1) writes
/// a message's first and last brace on lines of their own, and indents all between.
#[derive(Debug, Default)]
struct Pretty {
    message: Vec<u8>,
}

impl Pretty {
    /// Adds a line. Gives the message that ends with it; a line that is not pretty-printed is a message of its own.
    fn take(&mut self, line: Vec<u8>, limit: usize) -> Result<Option<Vec<u8>>, LineError> {
        if self.message.is_empty() && line != b"{" {
            return Ok(Some(line));
        }
        if self.message.len() + line.len() > limit {
            return Err(LineError::TooLong);
        }
        self.message.extend_from_slice(&line);
        Ok((line == b"}").then(|| std::mem::take(&mut self.message)))
    }
}

/// Reads a QMP socket message by message.
#[derive(Debug)]
pub struct LineReader {
    stream: UnixStream,
    buffer: LineBuffer,
    pretty: Pretty,
}

impl LineReader {
    pub fn new(stream: UnixStream) -> Self {
        Self {
            stream,
            buffer: LineBuffer::new(LINE_BYTES_MAX),
            pretty: Pretty::default(),
        }
    }

    pub fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// The next message. A cancelled call loses nothing: what was read is kept in the buffers.
    pub async fn next(&mut self) -> Result<Vec<u8>, LineError> {
        loop {
            while let Some(line) = self.buffer.take()? {
                if line.is_empty() {
                    continue;
                }
                if let Some(message) = self.pretty.take(line, LINE_BYTES_MAX)? {
                    return Ok(message);
                }
            }
            self.buffer.bytes.reserve(READ_BYTES);
            if self.stream.read_buf(&mut self.buffer.bytes).await? == 0 {
                return Err(LineError::Closed);
            }
        }
    }
}

/// QEMU's greeting, with its version.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Greeting {
    /// Major, minor and micro version, as in 10.0.2.
    pub version: (u64, u64, u64),
    /// The distribution's own version, or empty.
    pub package: String,
}

impl Greeting {
    pub(super) fn parse(line: &[u8]) -> Option<Self> {
        let message: Value = serde_json::from_slice(line).ok()?;
        Self::of_version(message.get("QMP")?.get("version")?)
    }

    /// From a `VersionInfo`: of the greeting, or what `query-version` gives.
    pub(super) fn of_version(version: &Value) -> Option<Self> {
        let qemu = version.get("qemu")?;
        let number = |name: &str| qemu.get(name).and_then(Value::as_u64);
        Some(Self {
            version: (number("major")?, number("minor")?, number("micro")?),
            package: version
                .get("package")
                .and_then(Value::as_str)
                .unwrap_or_default()
                .to_owned(),
        })
    }
}

/// An event from QEMU.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    /// Name of the event, such as `STOP`.
    pub name: String,
    /// Data of the event; `Null` if there are none.
    pub data: Value,
    /// Time of the event in microseconds since 1970, by the host's clock; `None` if QEMU could not tell.
    pub at_us: Option<u64>,
}

/// The kind of a message from QEMU.
#[derive(Debug, PartialEq)]
pub enum Message {
    Event(Event),
    /// The result of a command, with the command's id.
    Reply {
        id: u64,
        result: Result<Value, Refusal>,
    },
    /// Valid JSON that is no reply to us.
    Other,
}

/// A QMP `error` member.
#[derive(Debug, PartialEq)]
pub struct Refusal {
    pub class: String,
    pub description: String,
}

/// Parses a message. `None` if it is not JSON: the connection cannot be used any more.
pub fn parse_message(line: &[u8]) -> Option<Message> {
    let Value::Object(mut message) = serde_json::from_slice(line).ok()? else {
        return Some(Message::Other);
    };
    if let Some(Value::String(name)) = message.get("event") {
        let stamp = |unit: &str| {
            message
                .get("timestamp")
                .and_then(|stamp| stamp.get(unit))
                .and_then(Value::as_u64)
        };
        let at_us = stamp("seconds")
            .and_then(|seconds| seconds.checked_mul(1_000_000))
            .and_then(|us| us.checked_add(stamp("microseconds")?));
        let name = name.clone();
        let data = message.remove("data").unwrap_or(Value::Null);
        return Some(Message::Event(Event { name, data, at_us }));
    }
    let Some(id) = message.get("id").and_then(Value::as_u64) else {
        return Some(Message::Other);
    };
    if let Some(error) = message.get("error") {
        let word = |name: &str| error.get(name).and_then(Value::as_str).unwrap_or_default().to_owned();
        let refusal = Refusal {
            class: word("class"),
            description: word("desc"),
        };
        return Some(Message::Reply {
            id,
            result: Err(refusal),
        });
    }
    Some(match message.remove("return") {
        Some(value) => Message::Reply { id, result: Ok(value) },
        None => Message::Other,
    })
}

/// Parses bytes as they come from a socket, up to the first that are no message, and counts the messages.
pub fn read_all(bytes: &[u8]) -> usize {
    let (mut buffer, mut pretty) = (LineBuffer::new(LINE_BYTES_MAX), Pretty::default());
    let mut count = 0;
    for piece in bytes.chunks(READ_BYTES) {
        buffer.bytes.extend_from_slice(piece);
        while let Ok(Some(line)) = buffer.take() {
            let Ok(message) = pretty.take(line, LINE_BYTES_MAX) else {
                return count;
            };
            let Some(message) = message else { continue };
            let _ = (Greeting::parse(&message), excerpt(&message));
            if parse_message(&message).is_none() {
                return count;
            }
            count += 1;
        }
    }
    count
}

/// The beginning of a message as printable text, for an error.
pub fn excerpt(bytes: &[u8]) -> String {
    let head = bytes.get(..EXCERPT_BYTES).unwrap_or(bytes);
    let dots = if head.len() < bytes.len() { "…" } else { "" };
    format!("{:?}{dots}", String::from_utf8_lossy(head))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn lines_are_cut_wherever_the_reads_fall() {
        let mut buffer = LineBuffer::new(16);
        buffer.bytes.extend_from_slice(b"{\"a\":1}\r\n{\"b");
        assert_eq!(buffer.take().unwrap().unwrap(), b"{\"a\":1}");
        assert!(buffer.take().unwrap().is_none());
        buffer.bytes.extend_from_slice(b"\":2}\n");
        assert_eq!(buffer.take().unwrap().unwrap(), b"{\"b\":2}");
        assert!(buffer.take().unwrap().is_none());
    }

    #[test]
    fn a_line_without_end_is_refused_at_the_limit() {
        let mut buffer = LineBuffer::new(16);
        buffer.bytes.extend_from_slice(&[b'x'; 17]);
        assert!(matches!(buffer.take(), Err(LineError::TooLong)));
    }

    #[test]
    fn a_pretty_printed_message_is_put_together_and_a_plain_one_is_itself() {
        let mut pretty = Pretty::default();
        let mut take = |line: &[u8]| pretty.take(line.to_vec(), 32).unwrap();
        assert_eq!(take(br#"{"a": 1}"#).unwrap(), br#"{"a": 1}"#);
        assert_eq!(take(b"{"), None);
        assert_eq!(take(br#"    "return": {"#), None);
        assert_eq!(take(b"    }"), None);
        assert_eq!(take(b"}").unwrap(), br#"{    "return": {    }}"#);
        assert_eq!(take(b"{}").unwrap(), b"{}");
    }

    #[test]
    fn a_pretty_printed_message_without_end_is_refused_at_the_limit() {
        let mut pretty = Pretty::default();
        assert!(pretty.take(b"{".to_vec(), 4).unwrap().is_none());
        assert!(matches!(pretty.take(b"    ".to_vec(), 4), Err(LineError::TooLong)));
    }

    #[test]
    fn the_greetings_of_two_qemus_are_read() {
        // Debian's QEMU 10.0.2 and 7.2.22.
        let new = br#"{"QMP": {"version": {"qemu": {"micro": 2, "minor": 0, "major": 10}, "package": "Debian 1:10.0.2+ds-2+deb13u1~bpo12+1"}, "capabilities": ["oob"]}}"#;
        let old = br#"{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": ""}, "capabilities": ["oob"]}}"#;
        assert_eq!(Greeting::parse(new).unwrap().version, (10, 0, 2));
        assert_eq!(
            Greeting::parse(old).unwrap(),
            Greeting {
                version: (7, 2, 22),
                package: String::new()
            }
        );
        assert_eq!(Greeting::parse(b"SSH-2.0-OpenSSH_9.2"), None);
        assert_eq!(Greeting::parse(br#"{"QMP": {"version": 3}}"#), None);
    }

    #[test]
    fn an_event_of_any_name_keeps_its_data_and_time() {
        let line = br#"{"timestamp": {"seconds": 1795335746, "microseconds": 259866}, "event": "NOT_YET_INVENTED", "data": {"x": [1]}}"#;
        let expected = Event {
            name: "NOT_YET_INVENTED".into(),
            data: json!({"x": [1]}),
            at_us: Some(1_795_335_746_259_866),
        };
        assert_eq!(parse_message(line), Some(Message::Event(expected)));
    }

    #[test]
    fn an_event_whose_time_is_unknown_is_kept() {
        // QEMU writes -1 if it cannot tell the time.
        let line = br#"{"timestamp": {"seconds": -1, "microseconds": -1}, "event": "STOP"}"#;
        let expected = Event {
            name: "STOP".into(),
            data: Value::Null,
            at_us: None,
        };
        assert_eq!(parse_message(line), Some(Message::Event(expected)));
    }

    #[test]
    fn replies_and_refusals_carry_their_id() {
        let ok = br#"{"return": {}, "id": 7}"#;
        assert_eq!(
            parse_message(ok),
            Some(Message::Reply {
                id: 7,
                result: Ok(json!({}))
            })
        );
        let refused =
            br#"{"id": 8, "error": {"class": "CommandNotFound", "desc": "The command x has not been found"}}"#;
        let refusal = Refusal {
            class: "CommandNotFound".into(),
            description: "The command x has not been found".into(),
        };
        assert_eq!(
            parse_message(refused),
            Some(Message::Reply {
                id: 8,
                result: Err(refusal)
            })
        );
    }

    #[test]
    fn foreign_json_is_ignored_and_other_text_is_not_qmp() {
        assert_eq!(parse_message(b"[]"), Some(Message::Other));
        assert_eq!(parse_message(br#"{"return": {}}"#), Some(Message::Other));
        assert_eq!(parse_message(br#"{"return": {}, "id": "text"}"#), Some(Message::Other));
        assert_eq!(parse_message(b"(qemu) "), None);
    }
}
