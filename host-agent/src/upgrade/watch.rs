//! The watcher, which recovers a move whose vmpatch was killed: `vmpatch watch-move` runs in a process group of its own, holds the domain's lock,
//! and recovers the move if its worker ends without doing so.

use super::error::UpgradeError;
use super::launch::Spec;
use super::recovery::{self, Recovered};
use crate::domains;
use crate::lock::DomainLock;
use crate::supervisor;
use qmp::RunState;
use qmp::migrate::{Pair, Status};
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// The message that the guest is about to be resumed in the new process.
const COMMITTING: u8 = b'c';
/// The message that the move has ended, either way.
const OVER: u8 = b'o';
/// How long the old QEMU has to greet.
const CONNECT_TIME_MAX: Duration = Duration::from_secs(5);

/// The worker's side.
#[derive(Debug)]
pub(super) struct Watcher {
    child: Child,
    socket: UnixStream,
}

impl Watcher {
    /// Starts `vmpatch` as watcher over the move for which that process was started.
    pub(super) fn start(
        vmpatch: &Path,
        spec: &Spec,
        socket: &Path,
        was_running: bool,
        lock: &DomainLock,
    ) -> io::Result<Self> {
        let (ours, theirs) = UnixStream::pair()?;
        let mut command = Command::new(vmpatch);
        lock.bequeath(&mut command)?;
        let child = command
            .arg("watch-move")
            .args([spec.old.to_string(), was_running.to_string()])
            .arg(socket)
            .arg(&spec.taps)
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            // The lock is held for as long as any descriptor of it is open.
            .stdout(Stdio::from(lock.descriptor()?))
            .stderr(Stdio::inherit())
            .process_group(0)
            .spawn()?;
        Ok(Self { child, socket: ours })
    }

    /// Tells the watcher that from now on the guest may have run in the new process.
    pub(super) fn committing(&mut self) -> io::Result<()> {
        self.socket.write_all(&[COMMITTING])
    }

    /// Tells the watcher that the move has ended, and waits for the watcher's end.
    pub(super) fn over(mut self) {
        // A watcher that has ended already is not needed.
        let _ = self.socket.write_all(&[OVER]);
        let _ = self.socket.shutdown(Shutdown::Both);
        let _ = self.child.wait();
    }
}

/// The watcher's side: `vmpatch watch-move OLD RUNNING SOCKET TAPS`, with the worker's socket as standard input. Gives the guest's process if
/// the move had to be recovered.
///
/// # Errors
///
/// The move could not be recovered.
pub fn watch(old: i32, was_running: bool, socket: &Path, taps: &str) -> Result<Option<Recovered>, UpgradeError> {
    supervisor::ignore_requests_to_end();
    let mut told = Vec::new();
    // Ends where the worker does.
    io::stdin()
        .read_to_end(&mut told)
        .map_err(UpgradeError::host("reading what vmpatch says of the move"))?;
    if told.contains(&OVER) {
        return Ok(None);
    }
    let domains = domains::all()?;
    let found = domains.iter().find(|domain| domain.pid == old);
    let recovered = match (found, domains.successor_of(old)) {
        (Some(domain), Some(new)) => recovery::recover(domain, &new.domain, was_running)?,
        // The new process is gone, too. If the guest has not run there, it can go on in the old one.
        (Some(_), None) if !told.contains(&COMMITTING) => go_on(old, socket, was_running, taps)?,
        _ => return Ok(None),
    };
    Ok(Some(recovered))
}

/// Resumes the guest in the old process, where the new one is gone.
fn go_on(old: i32, socket: &Path, was_running: bool, taps: &str) -> Result<Recovered, UpgradeError> {
    recovery::set_back(old, taps);
    let mut pair = Pair::new(socket, CONNECT_TIME_MAX)?;
    let sent = pair.cancel(CONNECT_TIME_MAX)?;
    if was_running && (sent == Status::Completed || pair.source_state()? == RunState::Paused) {
        pair.resume_source(recovery::RESUME_TIME_MAX)?;
    }
    Ok(Recovered::InOld)
}
