//! The system calls of `ptrace(2)` that a stop takes, each for one thread. All of them must come from one thread of this process: the tracer
//! is a thread, not a process.

use nix::errno::Errno;
use nix::libc::{self, c_int, c_long, c_uint, siginfo_t, user_regs_struct};
use std::mem::MaybeUninit;

/// A traced thread's registers, x86-64: those of the program, not of a guest that the thread runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ThreadRegisters {
    /// The system call that the thread was stopped in; None where it was in none.
    pub call: Option<u64>,
    /// The call's first three arguments: rdi, rsi, rdx.
    pub args: [u64; 3],
    /// What the call returns: rax.
    pub result: i64,
}

/// What a traced thread tells its tracer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Event {
    /// It is stopped as it was asked to.
    Interrupted,
    /// It is stopped by a signal that stops its whole process.
    GroupStopped(c_int),
    /// It is stopped in front of this signal, which it gets when the tracer lets it go on with it.
    Signal(c_int),
    /// It has ended.
    Ended,
}

/// Becomes the tracer of a thread. Does not stop it. Without an option: should this process be killed, the kernel lets the thread go on.
pub(crate) fn seize(tid: i32) -> nix::Result<()> {
    request(libc::PTRACE_SEIZE, tid, 0, 0)
}

/// Asks a thread to stop.
pub(crate) fn interrupt(tid: i32) -> nix::Result<()> {
    request(libc::PTRACE_INTERRUPT, tid, 0, 0)
}

/// Lets a stopped thread go on, with a signal where that is not 0, and is its tracer no more.
pub(crate) fn detach(tid: i32, signal: c_int) -> nix::Result<()> {
    request(libc::PTRACE_DETACH, tid, 0, signal.into())
}

fn request(request: c_uint, tid: i32, addr: c_long, data: c_long) -> nix::Result<()> {
    // SAFETY: these requests take numbers and touch no memory of this process. What they do to the other process is their
    // purpose: it stops and goes on.
    Errno::result(unsafe { libc::ptrace(request, tid, addr, data) }).map(drop)
}

/// The registers of a stopped thread.
pub(crate) fn registers(tid: i32) -> nix::Result<ThreadRegisters> {
    let mut registers = MaybeUninit::<user_regs_struct>::zeroed();
    let mut buffer = libc::iovec {
        iov_base: registers.as_mut_ptr().cast(),
        iov_len: size_of::<user_regs_struct>(),
    };
    // SAFETY: the kernel writes at most `iov_len` bytes at `iov_base`, which are those of `registers`, and the length into `buffer`;
    // both outlive the call.
    let done = unsafe { libc::ptrace(libc::PTRACE_GETREGSET, tid, NT_PRSTATUS, &raw mut buffer) };
    Errno::result(done)?;
    if buffer.iov_len != size_of::<user_regs_struct>() {
        // A thread of a 32-bit program.
        return Err(Errno::ENOTSUP);
    }
    // SAFETY: a structure of integers, all of whose bytes were set: first zeroed, then by the kernel.
    let registers = unsafe { registers.assume_init() };
    Ok(ThreadRegisters {
        // −1: none (arch/x86/include/asm/syscall.h).
        call: (registers.orig_rax != u64::MAX).then_some(registers.orig_rax),
        args: [registers.rdi, registers.rsi, registers.rdx],
        result: registers.rax.cast_signed(),
    })
}

/// The register set of PTRACE_GETREGSET: include/uapi/linux/elf.h.
const NT_PRSTATUS: c_long = 1;

/// What a traced thread tells, None where it runs. It is left to be told again, with a signal in it: should this process be killed, the
/// thread gets that signal. (Taking it clears the thread's exit code, which is what the kernel delivers when a tracer is gone:
/// kernel/exit.c and kernel/signal.c, Linux 6.12.)
pub(crate) fn look(tid: i32) -> nix::Result<Option<Event>> {
    Ok(
        wait(tid, libc::WSTOPPED | libc::WEXITED | libc::WNOHANG | libc::WNOWAIT)?.map(|(code, status)| {
            if code != libc::CLD_TRAPPED && code != libc::CLD_STOPPED {
                return Event::Ended;
            }
            let signal = status & 0xff;
            match status >> 8 {
                libc::PTRACE_EVENT_STOP if signal == libc::SIGTRAP => Event::Interrupted,
                libc::PTRACE_EVENT_STOP => Event::GroupStopped(signal),
                _ => Event::Signal(signal),
            }
        }),
    )
}

/// Takes note of a traced thread's end, so that nothing is left of it.
pub(crate) fn reap(tid: i32) {
    // Whatever fails here, the kernel does it at the tracer's own end.
    let _ = wait(tid, libc::WEXITED | libc::WNOHANG);
}

/// `si_code` and `si_status` of a thread; None where it has nothing to tell.
fn wait(tid: i32, options: c_int) -> nix::Result<Option<(c_int, c_int)>> {
    let Ok(id) = libc::id_t::try_from(tid) else {
        return Err(Errno::ESRCH);
    };
    let mut info = MaybeUninit::<siginfo_t>::zeroed();
    // SAFETY: the kernel writes one siginfo_t, which `info` has room for.
    let done = unsafe { libc::waitid(libc::P_PID, id, info.as_mut_ptr(), options | libc::__WALL) };
    Errno::result(done)?;
    // SAFETY: a structure of integers that was zeroed before the kernel wrote it.
    let info = unsafe { info.assume_init() };
    // SAFETY: the fields of SIGCHLD, which are what waitid gives; all zero where there was nothing to tell.
    let (pid, status) = unsafe { (info.si_pid(), info.si_status()) };
    Ok((pid != 0).then_some((info.si_code, status)))
}

/// The thread's slack of timers in nanoseconds, and sets it: a sleep of some microseconds takes that much longer.
pub(crate) fn set_timer_slack(nanoseconds: c_long) -> Option<c_long> {
    // SAFETY: both take numbers, and change nothing but when this thread's own sleeps end.
    let before = unsafe { libc::prctl(libc::PR_GET_TIMERSLACK, 0, 0, 0, 0) };
    // SAFETY: as above.
    let done = unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, nanoseconds, 0, 0, 0) };
    (before > 0 && done == 0).then_some(before.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;
    use std::time::{Duration, Instant};

    #[test]
    fn a_signal_that_was_looked_at_is_still_the_threads() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let tid = child.id().cast_signed();
        seize(tid).unwrap();
        // SAFETY: takes numbers; the child is this test's own.
        assert_eq!(unsafe { libc::kill(tid, libc::SIGWINCH) }, 0);
        let end = Instant::now() + Duration::from_secs(20);
        while look(tid).unwrap().is_none() {
            assert!(Instant::now() < end);
            std::thread::sleep(Duration::from_millis(1));
        }
        // One that was taken would be told, and delivered, to nobody.
        for _ in 0..3 {
            assert_eq!(look(tid).unwrap(), Some(Event::Signal(libc::SIGWINCH)));
        }
        detach(tid, 0).unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
