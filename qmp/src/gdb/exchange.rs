//! Packets out in a row, replies back in order.

use super::error::StubError;
use super::packet::{self, Receiver};
use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recv};
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

/// Bytes of packets sent before their replies are read. QEMU stops reading while a reply finds our socket full, so what
/// we send must fit into the socket whole (208 KiB by default), or both would wait for each other.
const BATCH_BYTES: usize = 64 << 10;

/// From so many packets on, their replies are waited for awake.
const MANY_PACKETS: usize = 32;

/// How often they are looked for then.
const LOOK: Duration = Duration::from_micros(20);

/// After so long without a reply, waiting asleep costs nothing more.
const AWAKE: Duration = Duration::from_micros(200);

/// The socket of a stub.
#[derive(Debug)]
pub struct Exchange {
    socket: UnixStream,
    received: Receiver,
    reply_timeout: Duration,
    /// False once an exchange failed: replies to it may still come, and must not be taken for those to later packets.
    in_step: bool,
}

/// The replies to what was sent, in its order.
#[derive(Debug)]
pub struct Replies {
    pub bodies: Vec<Vec<u8>>,
    /// When the first one came.
    pub first_at: Instant,
}

impl Exchange {
    pub fn open(path: &Path, reply_timeout: Duration) -> io::Result<Self> {
        let socket = UnixStream::connect(path)?;
        socket.set_write_timeout(Some(reply_timeout))?;
        Ok(Self {
            socket,
            received: Receiver::default(),
            reply_timeout,
            in_step: true,
        })
    }

    /// Sends packets, and waits for the replies to all of them.
    pub fn send(&mut self, bodies: &[String]) -> Result<Replies, StubError> {
        if !std::mem::replace(&mut self.in_step, false) {
            return Err(StubError::OutOfStep);
        }
        let deadline = Instant::now() + self.reply_timeout;
        let is_awake = bodies.len() >= MANY_PACKETS;
        let mut replies = Vec::with_capacity(bodies.len());
        let mut first_at = None;
        let mut packets = Vec::new();
        for (sent, body) in bodies.iter().enumerate() {
            packet::frame(body, &mut packets);
            if packets.len() < BATCH_BYTES - packet::PACKET_BYTES_MAX && sent + 1 < bodies.len() {
                continue;
            }
            self.socket.write_all(&packets)?;
            packets.clear();
            while replies.len() <= sent {
                replies.push(self.reply(deadline, is_awake)?);
                first_at.get_or_insert_with(Instant::now);
            }
        }
        self.in_step = true;
        Ok(Replies {
            bodies: replies,
            first_at: first_at.unwrap_or_else(Instant::now),
        })
    }

    /// The next reply that answers something. Stop replies come unasked, and start as no answer to us does.
    fn reply(&mut self, deadline: Instant, is_awake: bool) -> Result<Vec<u8>, StubError> {
        let mut bytes = [0; packet::PACKET_BYTES_MAX];
        loop {
            while let Some(body) = self.received.next()? {
                if !matches!(body.first(), Some(b'T' | b'S')) {
                    return Ok(body);
                }
            }
            if Instant::now() >= deadline {
                return Err(io::Error::from(io::ErrorKind::TimedOut).into());
            }
            let at_once = if is_awake {
                self.receive_awake(&mut bytes)?
            } else {
                None
            };
            let count = match at_once {
                Some(count) => count,
                None => self.receive(&mut bytes, deadline)?,
            };
            if count == 0 {
                return Err(StubError::Closed);
            }
            self.received.push(bytes.get(..count).unwrap_or_default());
        }
    }

    /// Bytes received by the deadline.
    fn receive(&mut self, bytes: &mut [u8], deadline: Instant) -> io::Result<usize> {
        // A zero time-out would mean none.
        let left = deadline
            .saturating_duration_since(Instant::now())
            .max(Duration::from_millis(1));
        self.socket.set_read_timeout(Some(left))?;
        loop {
            match self.socket.read(bytes) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                done => return done,
            }
        }
    }

    /// Bytes received within [`AWAKE`], or none. QEMU writes each reply by itself, and waking who sleeps for it would take it as long
    /// as the packet did.
    fn receive_awake(&self, bytes: &mut [u8]) -> io::Result<Option<usize>> {
        let start = Instant::now();
        loop {
            match recv(self.socket.as_raw_fd(), bytes, MsgFlags::MSG_DONTWAIT) {
                Ok(count) => return Ok(Some(count)),
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) if start.elapsed() < AWAKE => {
                    let look = Instant::now() + LOOK;
                    while Instant::now() < look {
                        std::hint::spin_loop();
                    }
                }
                Err(Errno::EAGAIN) => return Ok(None),
                Err(error) => return Err(error.into()),
            }
        }
    }
}
