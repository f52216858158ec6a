//! Divides this process.

use super::channel::Channel;
use super::serve::{Ended, Served, serve};
use super::worker::BrokeredVm;
use crate::chain::chain;
use crate::domains::process;
use crate::hypervisor::Hypervisor;
use crate::hypervisor::ram::GuestRam;
use crate::lock::DomainLock;
use crate::sandbox::{Missing, Sandbox, SandboxError, User, restrict, wait_for_children};
use caps::{CapSet, Capability};
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork, geteuid};
use std::error::Error;
use std::fs;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

/// Exit codes of a worker that a signal ended: nothing was begun; the guest may not be as before.
const EXIT_FAILED: i32 = 1;
const EXIT_NOT_AS_BEFORE: i32 = 6;

/// How long a worker that was killed may take to be dead where the supervisor waits for this process.
const DEAD_WITHIN: Duration = Duration::from_secs(2);
/// How long the last message may take then: standard error may be blocked.
const SPOKEN_WITHIN: Duration = Duration::from_millis(200);
/// Pause between two looks.
const WAIT: Duration = Duration::from_millis(1);

/// A VM, by this process's own means or by a broker's.
pub(crate) enum Divided {
    /// This is a new process, the worker.
    Worker(BrokeredVm),
    /// This process was not divided.
    Whole {
        /// The VM.
        vm: Box<dyn Hypervisor>,
        /// Its lock.
        lock: Option<DomainLock>,
    },
}

/// Divides this process, which must have one thread. What returns is the worker, a new process without rights; the process that called is
/// the broker, and ends when the worker does, with its exit code.
///
/// # Errors
///
/// The sandbox is required, and the host does not give it.
pub(crate) fn divide(
    vm: Box<dyn Hypervisor>,
    lock: Option<DomainLock>,
    may_change: bool,
    supervisor: &Path,
    sandbox: Sandbox,
) -> Result<Divided, SandboxError> {
    if sandbox == Sandbox::Off {
        return Ok(Divided::Whole { vm, lock });
    }
    let (ram, (ours, theirs), user) = match prepare(vm.as_ref()) {
        Ok(prepared) => prepared,
        Err(error) if sandbox == Sandbox::Require => return Err(SandboxError::Divide(error)),
        Err(error) => {
            tracing::debug!("without a sandbox: {error}");
            return Ok(Divided::Whole { vm, lock });
        }
    };
    wait_for_children().map_err(|error| SandboxError::Divide(error.into()))?;
    let broker = Pid::this();
    // SAFETY: this process has one thread, as `prepare` has made sure, so that the child has all that it needs: no lock is held by a thread
    // that the child does not have.
    match unsafe { fork() } {
        Err(error) if sandbox == Sandbox::Require => Err(SandboxError::Divide(error.into())),
        Err(error) => {
            tracing::debug!("without a sandbox: dividing vmpatch: {error}");
            Ok(Divided::Whole { vm, lock })
        }
        Ok(ForkResult::Parent { child }) => {
            drop((ram, theirs));
            let served = Served {
                vm: vm.as_ref(),
                lock: lock.as_ref(),
                may_change,
                supervisor,
            };
            let ended = serve(&served, &mut Channel::new(ours));
            end(vm, lock, &ended, child)
        }
        Ok(ForkResult::Child) => {
            let identity = vm.identity().clone();
            // The broker uses them. What they own here is closed by its descriptor.
            std::mem::forget((vm, lock, ours));
            let channel = Channel::new(theirs);
            let mut keep = ram.files();
            keep.push(channel.descriptor());
            tell(restrict(&keep, user, Some(broker)), sandbox)?;
            Ok(Divided::Worker(BrokeredVm::new(identity, ram, channel)))
        }
    }
}

/// What the worker gets, made while the host still shows it.
type Prepared = (GuestRam, (UnixStream, UnixStream), User);

fn prepare(vm: &dyn Hypervisor) -> Result<Prepared, Box<dyn Error + Send + Sync>> {
    let threads = fs::read_dir("/proc/self/task")?.count();
    if threads != 1 {
        return Err(format!("this process has {threads} threads").into());
    }
    // Another user's process is not root's to end without that.
    if geteuid().is_root() && !caps::has_cap(None, CapSet::Effective, Capability::CAP_KILL)? {
        return Err("this process has not the capability CAP_KILL".into());
    }
    let pid = vm.identity().pid;
    let user = User {
        user: process::user(pid).ok_or("the host does not tell the user of the guest's process")?,
        group: process::group(pid).ok_or("the host does not tell the group of the guest's process")?,
    };
    Ok((vm.memory_without_rights()?, UnixStream::pair()?, user.or_nobody()))
}

/// Tells which layers are missing.
fn tell(missing: Vec<Missing>, sandbox: Sandbox) -> Result<(), SandboxError> {
    for missing in missing {
        if sandbox == Sandbox::Require {
            return Err(missing.into());
        }
        tracing::debug!("without a part of the sandbox: {}", chain(&missing).join(": "));
    }
    Ok(())
}

/// Ends with the worker.
fn end(vm: Box<dyn Hypervisor>, lock: Option<DomainLock>, ended: &Ended, worker: Pid) -> ! {
    if ended.cut_off.is_some() || ended.in_commit {
        // It asks for nothing more.
        let _ = kill(worker, Signal::SIGKILL);
    }
    if ended.in_commit {
        // The VM is not dropped: the supervisor takes over when this process has ended, and nothing must keep it from that.
        let status = wait_for(worker, Some(DEAD_WITHIN));
        let said = last_words(ended, status);
        let speaker = std::thread::spawn(move || tracing::error!("{said}"));
        let began = Instant::now();
        while !speaker.is_finished() && began.elapsed() < SPOKEN_WITHIN {
            std::thread::sleep(WAIT);
        }
        drop(lock);
        std::process::exit(EXIT_NOT_AS_BEFORE)
    }
    drop(vm);
    let status = wait_for(worker, None);
    let code = match status {
        Some(WaitStatus::Exited(_, code)) if ended.cut_off.is_none() => code,
        other => {
            tracing::error!("{}", last_words(ended, other));
            if ended.has_changed {
                EXIT_NOT_AS_BEFORE
            } else {
                EXIT_FAILED
            }
        }
    };
    drop(lock);
    std::process::exit(code)
}

fn last_words(ended: &Ended, status: Option<WaitStatus>) -> String {
    let cut_off = ended
        .cut_off
        .as_ref()
        .map_or(String::new(), |why| format!(" (it was answered no more: {why})"));
    format!("the process that reads the guest has ended: {}{cut_off}", said(status))
}

/// Waits until the worker is dead, or no longer than `limit`.
fn wait_for(worker: Pid, limit: Option<Duration>) -> Option<WaitStatus> {
    let began = Instant::now();
    let flags = limit.map(|_| WaitPidFlag::WNOHANG);
    loop {
        match waitpid(worker, flags) {
            Err(Errno::EINTR) => {}
            Ok(WaitStatus::StillAlive) if limit.is_some_and(|limit| began.elapsed() < limit) => {
                std::thread::sleep(WAIT)
            }
            status => return status.ok(),
        }
    }
}

fn said(status: Option<WaitStatus>) -> String {
    match status {
        Some(WaitStatus::Signaled(_, signal, _)) => signal.to_string(),
        Some(WaitStatus::Exited(_, code)) => format!("exit code {code}"),
        _ => "nobody knows why".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sandbox::Layer;

    #[test]
    fn a_missing_layer_is_an_error_only_where_all_are_required() {
        let missing = || {
            let layer = Layer::Landlock;
            let cause = "this kernel has none".into();
            vec![Missing { layer, cause }]
        };
        tell(missing(), Sandbox::Auto).unwrap();
        tell(Vec::new(), Sandbox::Require).unwrap();
        let error = tell(missing(), Sandbox::Require).unwrap_err();
        assert_eq!(
            chain(&error).join(": "),
            "this host does not give a part of the sandbox (--sandbox require): landlock: this kernel has none"
        );
    }
}
