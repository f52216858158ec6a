//! Messages between the two processes: a mark, a length, and JSON.

use serde::Serialize;
use serde::de::DeserializeOwned;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

/// What each message begins with.
const MARK: [u8; 4] = *b"part";
/// Bytes of mark and length.
const HEAD_LEN: usize = 8;
/// Most bytes of one message: a journal of the largest patch.
const MESSAGE_BYTES_MAX: u32 = 64 << 20;

/// One end.
#[derive(Debug)]
pub(super) struct Channel {
    stream: BufReader<UnixStream>,
}

impl Channel {
    pub(super) fn new(stream: UnixStream) -> Self {
        Self {
            stream: BufReader::new(stream),
        }
    }

    pub(super) fn descriptor(&self) -> RawFd {
        self.stream.get_ref().as_raw_fd()
    }

    /// The longest wait for a message from now on.
    pub(super) fn set_patience(&self, within: Option<Duration>) -> io::Result<()> {
        self.stream.get_ref().set_read_timeout(within)
    }

    /// Sends a message, by one system call where it is short.
    pub(super) fn send<T: Serialize>(&mut self, message: &T) -> io::Result<()> {
        let mut bytes = vec![0; HEAD_LEN];
        serde_json::to_writer(&mut bytes, message)?;
        let len = bytes.len() - HEAD_LEN;
        let len = u32::try_from(len).ok().filter(|len| *len <= MESSAGE_BYTES_MAX);
        let len = len.ok_or_else(|| io::Error::other("a message is too long"))?;
        let head = [MARK, len.to_le_bytes()].concat();
        bytes.splice(..HEAD_LEN, head);
        self.stream.get_mut().write_all(&bytes)
    }

    /// The next message; None where the other process has ended.
    pub(super) fn receive<T: DeserializeOwned>(&mut self) -> io::Result<Option<T>> {
        // A wait that a signal ends, also one that stops the process and lets it go on, goes on.
        let is_over = loop {
            match self.stream.fill_buf() {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                bytes => break bytes?.is_empty(),
            }
        };
        if is_over {
            return Ok(None);
        }
        let mut head = [0; HEAD_LEN];
        self.stream.read_exact(&mut head)?;
        let [mark, len] = [head.first_chunk::<4>(), head.last_chunk::<4>()];
        let len = len.copied().map_or(u32::MAX, u32::from_le_bytes);
        if mark != Some(&MARK) || len > MESSAGE_BYTES_MAX {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let mut bytes = Vec::new();
        (&mut self.stream).take(len.into()).read_to_end(&mut bytes)?;
        if u32::try_from(bytes.len()) != Ok(len) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(Some(serde_json::from_slice(&bytes)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_come_whole_and_in_order_and_the_end_is_no_error() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (mut ours, mut theirs) = (Channel::new(ours), Channel::new(theirs));
        ours.send(&"one").unwrap();
        ours.send(&vec![2; 1000]).unwrap();
        drop(ours);
        assert_eq!(theirs.receive::<String>().unwrap().as_deref(), Some("one"));
        assert_eq!(theirs.receive::<Vec<u8>>().unwrap(), Some(vec![2; 1000]));
        assert!(theirs.receive::<String>().unwrap().is_none());
    }

    #[test]
    fn what_is_no_message_is_an_error_and_nothing_is_reserved_for_a_false_length() {
        for bytes in [
            &b"par"[..],
            b"part\0\0",
            b"past\x02\0\0\0\"\"",
            b"part\xff\xff\xff\xff",
            b"part\xff\xff\0\0\"\"",
            b"part\x01\0\0\0{",
        ] {
            let (mut ours, theirs) = UnixStream::pair().unwrap();
            ours.write_all(bytes).unwrap();
            drop(ours);
            assert!(Channel::new(theirs).receive::<String>().is_err(), "{bytes:?}");
        }
    }
}
