//! What host and guest agent say to one another: frames of known length over a byte stream that loses nothing.
//!
//! A frame is a kind (u8), a command's number (u32), the payload's length (u32), both little-endian, and the payload.
//! This file is compiled into the library and into the guest agent, so it uses nothing but the standard library.

use std::io::{self, Read};

/// Bytes of the longest payload, so that a damaged length can't make the reader allocate without bound.
pub const MAX_PAYLOAD: usize = 1 << 20;
/// Bytes of a command's input or output that one frame carries: small, so that commands take turns on the channel.
pub const CHUNK: usize = 32 << 10;
/// Bytes before the payload.
const HEADER: usize = 9;

const PING: u8 = 1;
const START: u8 = 2;
const STDIN: u8 = 3;
const HELLO: u8 = 4;
const STARTED: u8 = 5;
const NOT_STARTED: u8 = 6;
const STDOUT: u8 = 7;
const STDERR: u8 = 8;
const EXITED: u8 = 9;

/// One message; `command` is the number that the host gave the command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Frame {
    /// Host: say [`Frame::Hello`].
    Ping,
    /// Host: run a program as this user (root is 0), in a process group of its own.
    Start {
        /// The command's number.
        command: u32,
        /// The user and group that it runs as.
        uid: u32,
        /// The program and its arguments, without NUL.
        args: Vec<String>,
    },
    /// Host: input for the command; none at all ends its input.
    Stdin {
        /// The command's number.
        command: u32,
        /// The bytes.
        bytes: Vec<u8>,
    },
    /// Guest: the agent is there. Said at its start, and after each [`Frame::Ping`].
    Hello {
        /// Different after each boot.
        boot_id: String,
    },
    /// Guest: the command runs.
    Started {
        /// The command's number.
        command: u32,
        /// Its process in the guest, also the number of its process group.
        pid: u32,
    },
    /// Guest: the command could not be started; nothing more comes for it.
    NotStarted {
        /// The command's number.
        command: u32,
        /// Why.
        reason: String,
    },
    /// Guest: the command wrote to its standard output.
    Stdout {
        /// The command's number.
        command: u32,
        /// The bytes.
        bytes: Vec<u8>,
    },
    /// Guest: the command wrote to its standard error.
    Stderr {
        /// The command's number.
        command: u32,
        /// The bytes.
        bytes: Vec<u8>,
    },
    /// Guest: the command has ended and all that it wrote has been sent; nothing more comes for it.
    Exited {
        /// The command's number.
        command: u32,
        /// What wait(2) says about it.
        wait_status: i32,
    },
}

impl Frame {
    /// The frame's bytes on the channel. A payload longer than [`MAX_PAYLOAD`] is an error.
    pub fn encode(&self) -> io::Result<Vec<u8>> {
        let (kind, command, payload): (u8, u32, Vec<u8>) = match self {
            Self::Ping => (PING, 0, Vec::new()),
            Self::Start { command, uid, args } => (
                START,
                *command,
                [&uid.to_le_bytes(), args.join("\0").as_bytes()].concat(),
            ),
            Self::Stdin { command, bytes } => (STDIN, *command, bytes.clone()),
            Self::Hello { boot_id } => (HELLO, 0, boot_id.clone().into_bytes()),
            Self::Started { command, pid } => (STARTED, *command, pid.to_le_bytes().to_vec()),
            Self::NotStarted { command, reason } => (NOT_STARTED, *command, reason.clone().into_bytes()),
            Self::Stdout { command, bytes } => (STDOUT, *command, bytes.clone()),
            Self::Stderr { command, bytes } => (STDERR, *command, bytes.clone()),
            Self::Exited { command, wait_status } => (EXITED, *command, wait_status.to_le_bytes().to_vec()),
        };
        let too_long = || {
            bad(format!(
                "a frame of {} bytes is longer than {MAX_PAYLOAD}",
                payload.len()
            ))
        };
        let length = u32::try_from(payload.len())
            .ok()
            .filter(|_| payload.len() <= MAX_PAYLOAD)
            .ok_or_else(too_long)?;
        Ok([&[kind][..], &command.to_le_bytes(), &length.to_le_bytes(), &payload].concat())
    }

    /// Reads one frame. A stream that ends before it gives `UnexpectedEof`.
    pub fn read(stream: &mut impl Read) -> io::Result<Self> {
        let mut header = [0; HEADER];
        stream.read_exact(&mut header)?;
        let [kind, c0, c1, c2, c3, l0, l1, l2, l3] = header;
        let command = u32::from_le_bytes([c0, c1, c2, c3]);
        let length = usize::try_from(u32::from_le_bytes([l0, l1, l2, l3])).unwrap_or(usize::MAX);
        if length > MAX_PAYLOAD {
            return Err(bad(format!(
                "a frame of kind {kind} claims {length} bytes, more than {MAX_PAYLOAD}"
            )));
        }
        let mut payload = vec![0; length];
        stream.read_exact(&mut payload)?;
        Self::decode(kind, command, payload)
    }

    fn decode(kind: u8, command: u32, payload: Vec<u8>) -> io::Result<Self> {
        Ok(match kind {
            PING => Self::Ping,
            START => {
                let (uid, args) = payload
                    .split_first_chunk()
                    .ok_or_else(|| bad("a start frame without uid".into()))?;
                let args = text(args.to_vec()).split('\0').map(str::to_owned).collect();
                Self::Start {
                    command,
                    uid: u32::from_le_bytes(*uid),
                    args,
                }
            }
            STDIN => Self::Stdin {
                command,
                bytes: payload,
            },
            HELLO => Self::Hello { boot_id: text(payload) },
            STARTED => Self::Started {
                command,
                pid: u32::from_le_bytes(number(&payload)?),
            },
            NOT_STARTED => Self::NotStarted {
                command,
                reason: text(payload),
            },
            STDOUT => Self::Stdout {
                command,
                bytes: payload,
            },
            STDERR => Self::Stderr {
                command,
                bytes: payload,
            },
            EXITED => Self::Exited {
                command,
                wait_status: i32::from_le_bytes(number(&payload)?),
            },
            other => return Err(bad(format!("a frame of unknown kind {other}"))),
        })
    }
}

fn number(payload: &[u8]) -> io::Result<[u8; 4]> {
    payload
        .try_into()
        .map_err(|_| bad(format!("a number of {} bytes instead of 4", payload.len())))
}

fn text(payload: Vec<u8>) -> String {
    String::from_utf8_lossy(&payload).into_owned()
}

fn bad(what: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_of_frame_is_read_as_it_was_written() {
        let bytes = vec![0, 255, b'\n'];
        let frames = [
            Frame::Ping,
            Frame::Start {
                command: 7,
                uid: 1000,
                args: vec!["echo".into(), String::new(), "a b".into()],
            },
            Frame::Stdin {
                command: 8,
                bytes: bytes.clone(),
            },
            Frame::Hello { boot_id: "id".into() },
            Frame::Started {
                command: 9,
                pid: 70_000,
            },
            Frame::NotStarted {
                command: 10,
                reason: "no such file".into(),
            },
            Frame::Stdout {
                command: 11,
                bytes: bytes.clone(),
            },
            Frame::Stderr { command: 12, bytes },
            Frame::Exited {
                command: u32::MAX,
                wait_status: -1,
            },
        ];
        let stream: Vec<u8> = frames.iter().flat_map(|frame| frame.encode().unwrap()).collect();
        let mut stream = stream.as_slice();
        for frame in frames {
            assert_eq!(Frame::read(&mut stream).unwrap(), frame);
        }
        assert!(stream.is_empty());
    }

    #[test]
    fn the_bytes_on_the_channel_are_kind_command_length_and_payload() {
        let frame = Frame::Started { command: 2, pid: 258 };
        assert_eq!(frame.encode().unwrap(), [STARTED, 2, 0, 0, 0, 4, 0, 0, 0, 2, 1, 0, 0]);
    }

    #[test]
    fn a_frame_that_is_cut_short_gives_unexpected_eof() {
        let whole = Frame::Hello { boot_id: "id".into() }.encode().unwrap();
        for length in 0..whole.len() {
            let error = Frame::read(&mut whole.get(..length).unwrap()).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof, "cut to {length}");
        }
    }

    #[test]
    fn damaged_frames_are_refused() {
        let damaged: [&[u8]; 4] = [
            &[77, 0, 0, 0, 0, 0, 0, 0, 0],               // unknown kind
            &[STDOUT, 0, 0, 0, 0, 255, 255, 255, 255],   // absurd length
            &[STARTED, 0, 0, 0, 0, 3, 0, 0, 0, 1, 2, 3], // number too short
            &[START, 0, 0, 0, 0, 2, 0, 0, 0, 1, 2],      // no uid
        ];
        for mut bytes in damaged {
            assert_eq!(Frame::read(&mut bytes).unwrap_err().kind(), io::ErrorKind::InvalidData);
        }
    }

    #[test]
    fn a_payload_that_is_too_long_is_not_sent() {
        let frame = Frame::Stdin {
            command: 1,
            bytes: vec![0; MAX_PAYLOAD + 1],
        };
        assert!(frame.encode().is_err());
    }
}
