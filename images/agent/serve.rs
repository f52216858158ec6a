//! Runs commands for the other end of a byte stream, any number at a time.

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use super::frame::{CHUNK, Frame};

/// The agent's end of the channel, with the input of every command that it has started.
pub struct Agent<W> {
    boot_id: String,
    output: Arc<Mutex<W>>,
    inputs: HashMap<u32, Sender<Vec<u8>>>,
}

impl<W: Write + Send + 'static> Agent<W> {
    /// An agent that answers on `output`.
    pub fn new(boot_id: String, output: W) -> Self {
        Self {
            boot_id,
            output: Arc::new(Mutex::new(output)),
            inputs: HashMap::new(),
        }
    }

    /// Tells the host that the agent is there.
    pub fn hello(&self) -> io::Result<()> {
        send(
            &self.output,
            &Frame::Hello {
                boot_id: self.boot_id.clone(),
            },
        )
    }

    /// Does what `input` says until it ends.
    pub fn serve(&mut self, input: &mut impl Read) -> io::Result<()> {
        loop {
            match Frame::read(input) {
                Ok(Frame::Ping) => self.hello()?,
                Ok(Frame::Start { command, uid, args }) => self.start(command, uid, &args)?,
                Ok(Frame::Stdin { command, bytes }) if bytes.is_empty() => drop(self.inputs.remove(&command)),
                Ok(Frame::Stdin { command, bytes }) => {
                    // A command that has closed its input, or has ended, gets no more of it.
                    if let Some(input) = self.inputs.get(&command)
                        && input.send(bytes).is_err()
                    {
                        self.inputs.remove(&command);
                    }
                }
                Ok(other) => return Err(io::Error::other(format!("the host sent {other:?}"))),
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
                Err(error) => return Err(error),
            }
        }
    }

    fn start(&mut self, number: u32, uid: u32, args: &[String]) -> io::Result<()> {
        let (program, rest) = args
            .split_first()
            .ok_or_else(|| io::Error::other("a command without program"))?;
        let mut command = Command::new(program);
        command
            .args(rest)
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        if uid != 0 {
            command.uid(uid).gid(uid);
        }
        let mut child = match command.spawn() {
            Ok(child) => child,
            Err(error) => {
                let reason = format!("{program}: {error}");
                return send(
                    &self.output,
                    &Frame::NotStarted {
                        command: number,
                        reason,
                    },
                );
            }
        };
        send(
            &self.output,
            &Frame::Started {
                command: number,
                pid: child.id(),
            },
        )?;
        if let Some(stdin) = child.stdin.take() {
            let (sender, receiver) = mpsc::channel();
            self.inputs.insert(number, sender);
            thread::spawn(move || feed(stdin, &receiver));
        }
        let output = Arc::clone(&self.output);
        thread::spawn(move || {
            // A channel that is gone ends the agent's own loop; there is nobody left to tell.
            drop(see_through(number, child, &output));
        });
        Ok(())
    }
}

/// Writes a command's input until the host ends it or the command closes it.
fn feed(mut stdin: ChildStdin, bytes: &Receiver<Vec<u8>>) {
    while let Ok(bytes) = bytes.recv() {
        if stdin.write_all(&bytes).is_err() {
            return;
        }
    }
}

/// Sends all that a command writes and then how it ended.
fn see_through<W: Write + Send + 'static>(number: u32, mut child: Child, output: &Arc<Mutex<W>>) -> io::Result<()> {
    let stderr = child.stderr.take().map(|stderr| {
        let output = Arc::clone(output);
        thread::spawn(move || forward(stderr, &output, |bytes| Frame::Stderr { command: number, bytes }))
    });
    if let Some(stdout) = child.stdout.take() {
        forward(stdout, output, |bytes| Frame::Stdout { command: number, bytes })?;
    }
    if let Some(stderr) = stderr {
        stderr
            .join()
            .map_err(|_| io::Error::other("the reader of standard error has panicked"))??;
    }
    let wait_status = child.wait()?.into_raw();
    send(
        output,
        &Frame::Exited {
            command: number,
            wait_status,
        },
    )
}

fn forward<W: Write>(mut from: impl Read, output: &Mutex<W>, frame: impl Fn(Vec<u8>) -> Frame) -> io::Result<()> {
    let mut buffer = vec![0; CHUNK];
    loop {
        let length = from.read(&mut buffer)?;
        match buffer.get(..length) {
            None | Some([]) => return Ok(()),
            Some(bytes) => send(output, &frame(bytes.to_vec()))?,
        }
    }
}

/// Frames are written whole: the lock is held from a frame's first byte to its last.
fn send<W: Write>(output: &Mutex<W>, frame: &Frame) -> io::Result<()> {
    let bytes = frame.encode()?;
    output.lock().unwrap_or_else(PoisonError::into_inner).write_all(&bytes)
}
