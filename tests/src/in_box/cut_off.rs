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
use std::time::Instant;

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
/// It can't be started.
pub fn run(program: &Path, args: &[String], cut: Cut, pid: u32) -> Result<Value> {
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
