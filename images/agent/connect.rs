//! A Unix socket, joined to standard input and output.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::process;
use std::thread;

use super::frame::CHUNK;

/// Connects to `path`, says so, and hands on bytes in both directions until either side ends.
pub fn connect(path: &str) -> io::Result<()> {
    let named = |error: io::Error| io::Error::new(error.kind(), format!("{path}: {error}"));
    let mut socket = UnixStream::connect(path).map_err(named)?;
    // Not `Stdin` and `Stdout`, whose buffers would hold bytes back.
    let mut input = File::from(io::stdin().as_fd().try_clone_to_owned()?);
    let mut output = File::from(io::stdout().as_fd().try_clone_to_owned()?);
    output.write_all(b"connected\n")?;
    let mut from_socket = socket.try_clone()?;
    thread::spawn(move || {
        // Whatever ended it, nothing more comes.
        drop(hand_on(&mut from_socket, &mut output));
        process::exit(0);
    });
    hand_on(&mut input, &mut socket)
}

/// Not `io::copy`, which may use splice(2): on kernel 6.1 that holds the pipe's lock while it waits for the socket
/// (`splice_file_to_pipe`, fs/splice.c), and whoever reads the pipe waits with it.
fn hand_on(from: &mut impl Read, to: &mut impl Write) -> io::Result<()> {
    let mut buffer = vec![0; CHUNK];
    loop {
        match from.read(&mut buffer)? {
            0 => return Ok(()),
            length => to.write_all(buffer.get(..length).unwrap_or_default())?,
        }
    }
}
