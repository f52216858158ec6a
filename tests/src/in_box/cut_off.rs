//! vmpatch, or its supervisor, killed at a system call of its pause.

use super::{Result, held_threads};
use crate::cut::{self, Call, Side};
use crate::processes;
use nix::sys::signal::Signal;
use nix::sys::wait::WaitStatus;
use serde_json::{Value, json};
use std::io::Read;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

/// How long all of it may take: longer than a vmpatch takes that tries for a minute.
const LIMIT: Duration = Duration::from_secs(150);

/// Who is killed, and where.
#[derive(Clone, Copy, Debug)]
pub struct Cut {
    /// The system call.
    pub call: Call,
    /// Which of them, the first being 1.
    pub nth: usize,
    /// On which side of it.
    pub side: Side,
    /// Its supervisor is killed, not vmpatch.
    pub supervisor: bool,
}

/// Starts a program of that command line, kills it there, waits for its end and its supervisor's, and tells of it as JSON: whether it was
/// killed, or ended before; its exit code, its standard error, and the threads of process `pid` that are held then.
///
/// # Errors
///
/// It can't be started, or does not end in time: then what each thread of it was at, and it is killed.
pub fn run(program: &Path, args: &[String], cut: Cut, pid: u32) -> Result<Value> {
    let (done, is_done) = mpsc::channel::<()>();
    thread::scope(|scope| {
        let watch = scope.spawn(move || match is_done.recv_timeout(LIMIT) {
            Err(RecvTimeoutError::Timeout) => Some(end_all_of(program)),
            _ => None,
        });
        let told = run_to_the_end(program, args, cut, pid);
        drop(done);
        match watch.join() {
            Ok(None) => told,
            Ok(Some(hung)) => Err(format!("it did not end within {LIMIT:?}: {hung:#?}; {told:?}").into()),
            Err(_) => Err("the watch over it panicked".into()),
        }
    })
}

/// Kills all processes of a program, and tells what each of their threads was at.
fn end_all_of(program: &Path) -> Vec<String> {
    let mut told = Vec::new();
    for pid in processes::of_program(program) {
        told.extend(processes::threads_at(pid));
        processes::kill(pid, Signal::SIGKILL);
    }
    told
}

fn run_to_the_end(program: &Path, args: &[String], cut: Cut, pid: u32) -> Result<Value> {
    let mut child = Command::new(program)
        .args(args)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()?;
    let stderr = child.stderr.take();
    let ended = cut::try_run_to(&child, cut.call, cut.nth, cut.side).err();
    let killed = Instant::now();
    let code = match ended {
        Some(WaitStatus::Exited(_, code)) => Some(code),
        Some(_) => None,
        None => {
            let victims = match cut.supervisor {
                true => processes::with_arguments(&["supervise"]),
                false => vec![child.id()],
            };
            victims
                .iter()
                .for_each(|victim| processes::kill(*victim, Signal::SIGKILL));
            if cut.supervisor {
                cut::let_go(&child);
            }
            child.wait()?.code()
        }
    };
    let mut said = String::new();
    // The supervisor has the same standard error, so this waits for its end, too.
    if let Some(mut stderr) = stderr {
        stderr.read_to_string(&mut said)?;
    }
    Ok(json!({
        "reached": ended.is_none(),
        "code": code,
        "stderr": said,
        "held": held_threads(pid)?,
        "ended_us": u64::try_from(killed.elapsed().as_micros())?,
    }))
}
