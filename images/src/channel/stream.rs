//! A socket in the guest, reached over the channel.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use super::frame::CHUNK;
use super::{Client, Error, Request, Running};

/// What the agent's `connect` writes when it is connected, before it hands on what comes from the socket.
const CONNECTED: &str = "connected\n";
/// How long connecting may take: a program starts in the guest.
const CONNECT_LIMIT: Duration = Duration::from_secs(30);
/// How long to wait for output before waiting again; there is no limit to how long a socket may be silent.
const SILENCE: Duration = Duration::from_secs(3600);

impl Client {
    /// Connects to a Unix socket in the guest. The stream ends when either side closes it, and when the channel is lost.
    pub fn connect(&self, socket: &str) -> Result<UnixStream, Error> {
        Request::new(self, &["guest-agent", "connect", socket]).stream()
    }
}

impl Request {
    /// Starts a command that says [`CONNECTED`], and gives a stream: what is written to it is the command's input, what is
    /// read from it its output.
    fn stream(self) -> Result<UnixStream, Error> {
        let running = self.spawn_open()?;
        if let Err(error) = running.wait_for_stdout(CONNECTED, CONNECT_LIMIT) {
            // It may hold the socket, which nobody else gets then.
            drop(running.kill());
            return Err(error);
        }
        let socket = |source| Error::Socket {
            action: "share",
            source,
        };
        let (ours, theirs) = UnixStream::pair().map_err(socket)?;
        let input = ours.try_clone().map_err(socket)?;
        let running = Arc::new(running);
        let fed = Arc::clone(&running);
        thread::spawn(move || feed(&fed, input));
        thread::spawn(move || hand_on(&running, ours));
        Ok(theirs)
    }
}

/// Gives the command what is written to the stream, until either of them ends.
fn feed(running: &Running, mut input: UnixStream) {
    let mut buffer = vec![0; CHUNK];
    loop {
        let bytes = match input.read(&mut buffer) {
            Ok(length) => buffer.get(..length).unwrap_or_default(),
            Err(_) => &[],
        };
        // No bytes end the command's input, and with it the command.
        if running.send(bytes).is_err() || bytes.is_empty() {
            return;
        }
    }
}

/// Writes to the stream what the command writes, until either of them ends.
fn hand_on(running: &Running, mut output: UnixStream) {
    let mut skipped = CONNECTED.len();
    loop {
        let (bytes, ended) = match running.take_stdout(SILENCE) {
            Ok(taken) => taken,
            Err(Error::Timeout { .. }) => continue,
            Err(_) => (Vec::new(), true),
        };
        let new = bytes.get(skipped.min(bytes.len())..).unwrap_or_default();
        skipped -= bytes.len() - new.len();
        if output.write_all(new).is_err() || ended {
            // Whoever reads sees the end, and the other direction ends, too.
            drop(output.shutdown(Shutdown::Both));
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::serve::Agent;
    use super::*;

    /// The real agent, on this machine instead of in a guest.
    fn client() -> Client {
        let (host, guest) = UnixStream::pair().unwrap();
        thread::spawn(move || {
            let mut input = guest.try_clone().unwrap();
            Agent::new("boot".into(), guest).serve(&mut input).unwrap();
        });
        Client::new(host).unwrap()
    }

    #[test]
    fn a_stream_carries_bytes_both_ways_and_ends_with_the_command() {
        let script = "echo connected; echo first; head -n 1; echo last";
        let mut stream = Request::new(&client(), &["sh", "-c", script]).stream().unwrap();
        stream.write_all(b"a line\n").unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        assert_eq!(text, "first\na line\nlast\n");
    }

    #[test]
    fn a_stream_that_is_dropped_ends_the_commands_input() {
        let client = client();
        let folder = std::env::temp_dir().join(format!("vmpatch-stream-{}", std::process::id()));
        let file = folder.display().to_string();
        let script = r#"echo connected; cat; echo ended >"$1""#;
        drop(
            Request::new(&client, &["sh", "-c", script, "sh", &file])
                .stream()
                .unwrap(),
        );
        let deadline = std::time::Instant::now() + Duration::from_secs(10);
        while !folder.exists() && std::time::Instant::now() < deadline {
            thread::sleep(Duration::from_millis(5));
        }
        std::fs::remove_file(folder).unwrap();
    }

    #[test]
    fn a_command_that_does_not_connect_is_an_error_with_its_own_words() {
        let error = Request::new(&client(), &["sh", "-c", "echo no socket >&2; exit 1"])
            .stream()
            .unwrap_err();
        assert!(error.to_string().contains("no socket"), "{error}");
    }
}
