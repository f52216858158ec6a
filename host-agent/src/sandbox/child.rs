//! Work in a process of its own.

use nix::sys::signal::{SigHandler, Signal, signal};
use nix::sys::wait::waitpid;
use nix::unistd::{ForkResult, dup2_stdout, fork, pipe};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::fs::{self, File};
use std::io::{self, Read, Write};

/// Most bytes of an answer.
const ANSWER_BYTES_MAX: u64 = 1 << 20;

/// Does `work` in a new process, and gives what it gave. There the process may be divided ([`crate::session::Session::open_divided`]), as often
/// as there is work: each time it is another one. Its standard output is where the answer goes. For a program with one thread.
///
/// # Errors
///
/// The process was not started, or has ended without an answer.
pub fn in_own_process<T: Serialize + DeserializeOwned>(work: impl FnOnce() -> T) -> io::Result<T> {
    if fs::read_dir("/proc/self/task")?.count() != 1 {
        return Err(io::Error::other("this process has more than one thread"));
    }
    wait_for_children()?;
    let (answer, answers) = pipe()?;
    // SAFETY: this process has one thread, so that the child has all that it needs: no lock is held by a thread that the child does not have.
    match unsafe { fork() }? {
        ForkResult::Child => {
            drop(answer);
            let is_told = dup2_stdout(&answers).is_ok() && {
                drop(answers);
                tell(&work()).is_ok()
            };
            std::process::exit(i32::from(!is_told))
        }
        ForkResult::Parent { child } => {
            drop(answers);
            let mut bytes = Vec::new();
            let read = File::from(answer).take(ANSWER_BYTES_MAX).read_to_end(&mut bytes);
            // It has said all that it had to say.
            let _ = waitpid(child, None);
            read?;
            Ok(serde_json::from_slice(&bytes)?)
        }
    }
}

/// Has the kernel keep what becomes of this process's children: who started it may have told it not to (`SIGCHLD` ignored).
pub(crate) fn wait_for_children() -> nix::Result<()> {
    // SAFETY: the default action is no code of this process.
    unsafe { signal(Signal::SIGCHLD, SigHandler::SigDfl) }.map(drop)
}

fn tell<T: Serialize>(answer: &T) -> io::Result<()> {
    let mut output = io::stdout().lock();
    serde_json::to_writer(&mut output, answer)?;
    output.flush()
}
