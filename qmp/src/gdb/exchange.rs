//! Sends packets in a row, and receives their replies in order.

use super::error::StubError;
use super::packet::{self, Receiver};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, recv};
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

/// Most bytes of packets that are sent before their replies are read. QEMU stops reading while our socket has no space for a reply. So the
/// packets must fit into the socket (208 KiB by default), or both sides would wait for each other.
const BATCH_BYTES: usize = 64 << 10;

/// Number of packets from which their replies are busy-polled.
const MANY_PACKETS: usize = 32;

/// Interval of the busy-poll.
const LOOK: Duration = Duration::from_micros(20);

/// Longest busy-poll for a reply. After that, sleeping costs nothing more.
const AWAKE: Duration = Duration::from_micros(200);

/// The socket of a stub.
#[derive(Debug)]
pub struct Exchange {
    socket: UnixStream,
    received: Receiver,
    reply_timeout: Duration,
    /// True after a failed exchange: its replies may still come, and must not be taken for replies to later packets.
    in_step: bool,
}

/// The replies, in the order of the packets.
#[derive(Debug)]
pub struct Replies {
    pub bodies: Vec<Vec<u8>>,
    /// Time of the first reply.
    pub first_at: Instant,
}

impl Exchange {
    pub fn open(path: &Path, reply_timeout: Duration) -> io::Result<Self> {
        let socket = UnixStream::connect(path)?;
        socket.set_write_timeout(Some(reply_timeout))?;
        Ok(Self::over(socket, reply_timeout))
    }

    fn over(socket: UnixStream, reply_timeout: Duration) -> Self {
        Self {
            socket,
            received: Receiver::default(),
            reply_timeout,
            in_step: true,
        }
    }

    /// False after a failed exchange.
    pub fn is_in_step(&self) -> bool {
        self.in_step
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

    /// The next reply to a packet. Stop replies are unsolicited, and begin with a letter that no reply to us begins with.
    fn reply(&mut self, deadline: Instant, is_awake: bool) -> Result<Vec<u8>, StubError> {
        let mut bytes = [0; packet::PACKET_BYTES_MAX];
        loop {
            while let Some(body) = self.received.next()? {
                if !matches!(body.first(), Some(b'T' | b'S')) {
                    return Ok(body);
                }
            }
            let count = self.receive(&mut bytes, deadline, is_awake)?;
            if count == 0 {
                return Err(StubError::Closed);
            }
            self.received.push(bytes.get(..count).unwrap_or_default());
        }
    }

    /// Receives bytes until the deadline. Bytes that are already there are taken even after it: this process may have been stopped meanwhile.
    ///
    /// QEMU writes each reply on its own, and to wake a sleeping reader would take QEMU as long as the packet did. So the replies to many packets
    /// are busy-polled first.
    fn receive(&self, bytes: &mut [u8], deadline: Instant, is_awake: bool) -> io::Result<usize> {
        let awake_until = is_awake.then(|| Instant::now() + AWAKE);
        loop {
            match recv(self.socket.as_raw_fd(), bytes, MsgFlags::MSG_DONTWAIT) {
                Ok(count) => return Ok(count),
                Err(Errno::EINTR) => continue,
                Err(Errno::EAGAIN) => {}
                Err(error) => return Err(error.into()),
            }
            let now = Instant::now();
            if now >= deadline {
                return Err(io::ErrorKind::TimedOut.into());
            }
            match awake_until {
                Some(until) if now < until => wait_awake(),
                _ => self.wait_asleep(deadline - now)?,
            }
        }
    }

    /// Sleeps until there is something to receive, a signal comes, or the time is over.
    fn wait_asleep(&self, within: Duration) -> io::Result<()> {
        let mut sockets = [PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)];
        // The time is rounded up: the last part of a millisecond would be busy-polled otherwise.
        let timeout = PollTimeout::try_from(within + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX);
        match poll(&mut sockets, timeout) {
            Ok(_) | Err(Errno::EINTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

/// Lets [`LOOK`] pass. QEMU may need this CPU.
fn wait_awake() {
    let look = Instant::now() + LOOK;
    while Instant::now() < look {
        std::thread::yield_now();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exchange(reply_timeout: Duration) -> (Exchange, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (Exchange::over(ours, reply_timeout), theirs)
    }

    fn packets(count: usize) -> Vec<String> {
        vec![String::from("X"); count]
    }

    /// As after this process was stopped for longer than a reply may take.
    #[test]
    fn replies_that_are_there_are_taken_past_the_deadline_too() {
        for count in [1, MANY_PACKETS] {
            let (mut exchange, mut stub) = exchange(Duration::ZERO);
            stub.write_all("+$OK#9a".repeat(count).as_bytes()).unwrap();
            assert_eq!(exchange.send(&packets(count)).unwrap().bodies.len(), count);
        }
    }

    #[test]
    fn a_stub_that_stays_silent_is_given_up_at_the_deadline_and_for_good() {
        for count in [2, MANY_PACKETS] {
            let (mut exchange, mut stub) = exchange(Duration::from_millis(20));
            stub.write_all(b"+$OK#9a").unwrap();
            let start = Instant::now();
            let error = exchange.send(&packets(count)).unwrap_err();
            assert!(
                matches!(&error, StubError::Io(error) if error.kind() == io::ErrorKind::TimedOut),
                "{error}"
            );
            assert!(start.elapsed() >= Duration::from_millis(20));
            assert!(matches!(exchange.send(&[]), Err(StubError::OutOfStep)));
        }
    }

    #[test]
    fn a_reply_in_two_pieces_is_one_and_a_closed_socket_is_told() {
        let (mut exchange, mut stub) = exchange(Duration::from_secs(60));
        let rest = std::thread::spawn(move || {
            stub.write_all(b"+$O").unwrap();
            std::thread::sleep(Duration::from_millis(5));
            stub.write_all(b"K#9a").unwrap();
            stub
        });
        assert_eq!(exchange.send(&packets(1)).unwrap().bodies, [b"OK"]);
        drop(rest.join().unwrap());
        assert!(exchange.send(&packets(1)).is_err());
    }
}
