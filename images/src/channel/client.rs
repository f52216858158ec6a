//! The host's end of the channel: one thread reads, and whoever waits for something is woken.

use std::collections::HashMap;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::process::ExitStatus;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use std::os::unix::process::ExitStatusExt;

use super::Error;
use super::frame::Frame;

/// A connection to the guest agent; clones are the same connection.
#[derive(Clone, Debug)]
pub struct Client {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    output: Mutex<UnixStream>,
    state: Mutex<State>,
    changed: Condvar,
}

/// All that the guest has said.
#[derive(Debug, Default)]
pub(super) struct State {
    /// The boots seen so far, the current one last.
    boots: Vec<String>,
    /// Why nothing more will come.
    lost: Option<String>,
    commands: HashMap<u32, Progress>,
    last_command: u32,
}

/// What is known about a command.
#[derive(Debug, Default)]
pub(super) struct Progress {
    pub(super) pid: Option<u32>,
    pub(super) stdout: Vec<u8>,
    pub(super) stderr: Vec<u8>,
    pub(super) end: Option<End>,
}

/// How a command ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum End {
    Exited(ExitStatus),
    NotStarted(String),
    Rebooted,
}

impl Client {
    /// Talks over `stream`, whose other end is the guest agent or will be once the guest has booted.
    pub fn new(stream: UnixStream) -> Result<Self, Error> {
        let socket = |action| move |source| Error::Socket { action, source };
        let mut input = stream.try_clone().map_err(socket("share"))?;
        let shared = Arc::new(Shared {
            output: Mutex::new(stream),
            state: Mutex::new(State::default()),
            changed: Condvar::new(),
        });
        let client = Self {
            shared: Arc::clone(&shared),
        };
        thread::spawn(move || {
            loop {
                let frame = Frame::read(&mut input);
                let mut state = lock(&shared.state);
                let lost = state.take_in(frame);
                drop(state);
                shared.changed.notify_all();
                if lost {
                    return;
                }
            }
        });
        client.send(&Frame::Ping)?;
        Ok(client)
    }

    /// How often the guest has been seen to boot.
    pub fn boots(&self) -> usize {
        lock(&self.shared.state).boots.len()
    }

    /// Waits until the guest has been seen to boot `boots` times.
    pub fn wait_for_boot(&self, boots: usize, limit: Duration) -> Result<(), Error> {
        self.wait("the guest's boot", limit, |state| {
            (state.boots.len() >= boots).then_some(())
        })
    }

    /// Ends the connection for all clones; whoever waits is told.
    pub fn close(&self) {
        // Where the other end has gone already there is nothing to end.
        drop(lock(&self.shared.output).shutdown(std::net::Shutdown::Both));
    }

    /// A number for a new command, known from now on.
    pub(super) fn register(&self) -> u32 {
        let mut state = lock(&self.shared.state);
        state.last_command = state.last_command.wrapping_add(1);
        let number = state.last_command;
        state.commands.insert(number, Progress::default());
        number
    }

    /// Forgets a command; what still comes for it is dropped.
    pub(super) fn forget(&self, command: u32) {
        lock(&self.shared.state).commands.remove(&command);
    }

    pub(super) fn send(&self, frame: &Frame) -> Result<(), Error> {
        let socket = |source| Error::Socket {
            action: "write to",
            source,
        };
        let bytes = frame.encode().map_err(socket)?;
        lock(&self.shared.output).write_all(&bytes).map_err(socket)
    }

    /// Waits until `found` finds something in a command's progress.
    pub(super) fn wait_on<T>(
        &self,
        command: u32,
        waiting_for: &str,
        limit: Duration,
        mut found: impl FnMut(&mut Progress) -> Option<T>,
    ) -> Result<T, Error> {
        self.wait(waiting_for, limit, |state| {
            found(state.commands.entry(command).or_default())
        })
    }

    fn wait<T>(
        &self,
        waiting_for: &str,
        limit: Duration,
        mut found: impl FnMut(&mut State) -> Option<T>,
    ) -> Result<T, Error> {
        let deadline = Instant::now() + limit;
        let mut state = lock(&self.shared.state);
        loop {
            if let Some(found) = found(&mut state) {
                return Ok(found);
            }
            if let Some(reason) = &state.lost {
                return Err(Error::Lost {
                    waiting_for: waiting_for.to_owned(),
                    reason: reason.clone(),
                });
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Error::Timeout {
                    waiting_for: waiting_for.to_owned(),
                    limit,
                });
            }
            state = self
                .shared
                .changed
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }
}

impl State {
    /// Takes in what was read; true if nothing more will come.
    fn take_in(&mut self, frame: std::io::Result<Frame>) -> bool {
        match frame {
            Ok(Frame::Hello { boot_id }) => self.booted(boot_id),
            Ok(Frame::Started { command, pid }) => self.with(command, |progress| progress.pid = Some(pid)),
            Ok(Frame::Stdout { command, bytes }) => self.with(command, |progress| progress.stdout.extend(bytes)),
            Ok(Frame::Stderr { command, bytes }) => self.with(command, |progress| progress.stderr.extend(bytes)),
            Ok(Frame::NotStarted { command, reason }) => {
                self.with(command, |progress| progress.end = Some(End::NotStarted(reason)));
            }
            Ok(Frame::Exited { command, wait_status }) => {
                self.with(command, |progress| {
                    progress.end = Some(End::Exited(ExitStatus::from_raw(wait_status)))
                });
            }
            Ok(frame @ (Frame::Ping | Frame::Start { .. } | Frame::Stdin { .. })) => {
                self.lost = Some(format!("the guest sent what only the host may send: {frame:?}"));
            }
            Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => {
                self.lost = Some("it was closed, as it is when QEMU ends".to_owned());
            }
            Err(error) => self.lost = Some(error.to_string()),
        }
        self.lost.is_some()
    }

    /// A boot that was not seen before ends all commands of the one before it.
    fn booted(&mut self, boot_id: String) {
        if self.boots.last() == Some(&boot_id) {
            return;
        }
        if !self.boots.is_empty() {
            for progress in self.commands.values_mut() {
                progress.end.get_or_insert(End::Rebooted);
            }
        }
        self.boots.push(boot_id);
    }

    fn with(&mut self, command: u32, change: impl FnOnce(&mut Progress)) {
        if let Some(progress) = self.commands.get_mut(&command) {
            change(progress);
        }
    }
}

/// A thread that panicked can't leave the state half-changed in a way that matters: each change is one assignment.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_boot_seen_twice_counts_once_and_a_new_one_ends_the_commands() {
        let mut state = State::default();
        state.commands.insert(1, Progress::default());
        for boot_id in ["a", "a", "b"] {
            assert!(!state.take_in(Ok(Frame::Hello {
                boot_id: boot_id.into()
            })));
        }
        assert_eq!(state.boots, ["a", "b"]);
        assert_eq!(state.commands.get(&1).unwrap().end, Some(End::Rebooted));
    }

    #[test]
    fn output_for_a_forgotten_command_is_dropped() {
        let mut state = State::default();
        assert!(!state.take_in(Ok(Frame::Stdout {
            command: 5,
            bytes: vec![1]
        })));
        assert!(state.commands.is_empty());
    }
}
