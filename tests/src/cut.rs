//! A program stopped at a system call of its own choosing of moments: between two steps that a kill at a time would seldom hit.

use std::process::Child;

use nix::libc::user_regs_struct;
use nix::sys::ptrace::{self, Options};
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;

use crate::processes::as_pid;

/// System calls of x86-64 (`arch/x86/entry/syscalls/syscall_64.tbl`).
const WRITE: u64 = 1;
const CONNECT: u64 = 42;
const SENDTO: u64 = 44;
const KILL: u64 = 62;
const RENAME: u64 = 82;
const SENDMSG: u64 = 46;
const SHUTDOWN: u64 = 48;
const PTRACE: u64 = 101;
const PROCESS_VM_READV: u64 = 310;
const PROCESS_VM_WRITEV: u64 = 311;
/// `include/uapi/linux/ptrace.h`.
const PTRACE_GETREGSET: u64 = 0x4204;
/// How the way to the stub's socket, which has no name any more, begins.
const STUB: &[u8] = b"/proc/self/fd/";
/// How a message begins between the two processes of a vmpatch.
const BETWEEN_OWN: &[u8] = b"part";
/// What the kernel takes as no system call at all.
const NONE: u64 = u64::MAX;
/// Standard error: descriptors above it are sockets and files of the program's own.
const STDERR: u64 = 2;
/// The result register before a system call has returned: -ENOSYS.
const NO_RESULT: u64 = (-38_i64).cast_unsigned();

/// A system call of the program's first thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    /// It tells somebody this one byte.
    Tell(u8),
    /// It tells its supervisor what it is about to change.
    Watch,
    /// It tells its supervisor that nothing is left to roll back.
    Release,
    /// It connects to QEMU's GDB stub, which pauses the guest.
    Pause,
    /// It has QEMU's GDB stub write memory.
    WriteMemory,
    /// It becomes the tracer of a thread.
    Seize,
    /// It asks a thread that it traces to stop.
    Interrupt,
    /// It reads the registers of a thread that it has stopped.
    ThreadRegisters,
    /// It lets a thread go on.
    Detach,
    /// It reads the memory of another process.
    ReadProcess,
    /// It writes the memory of another process that has stopped threads: one that it traces.
    WriteProcess,
    /// It has QEMU's GDB stub let the guest run: it leaves physical memory mode and detaches.
    Resume,
    /// It renames a file.
    Rename,
    /// It kills a process.
    Kill,
}

/// Before or behind a system call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// It has not been done.
    Before,
    /// It has been done.
    Behind,
}

impl Call {
    /// Whether a process that is stopped there does it.
    fn is(self, process: Pid, registers: &user_regs_struct) -> bool {
        let number = registers.orig_rax;
        match self {
            Self::Tell(byte) => {
                let is_one = (number == WRITE || number == SENDTO) && registers.rdx == 1;
                is_one && word(process, registers.rsi).to_ne_bytes().first() == Some(&byte)
            }
            Self::Watch => sends(process, registers, br#"{"journa"#),
            Self::Release => sends(process, registers, b"null"),
            // Behind the two bytes of the address family.
            Self::Pause => number == CONNECT && starts_with(process, registers.rsi.wrapping_add(2), STUB),
            Self::Seize => is_ptrace(registers, ptrace::Request::PTRACE_SEIZE),
            Self::Interrupt => is_ptrace(registers, ptrace::Request::PTRACE_INTERRUPT),
            Self::ThreadRegisters => number == PTRACE && registers.rdi == PTRACE_GETREGSET,
            Self::Detach => is_ptrace(registers, ptrace::Request::PTRACE_DETACH),
            Self::ReadProcess => number == PROCESS_VM_READV,
            Self::WriteProcess => number == PROCESS_VM_WRITEV,
            Self::WriteMemory => sends(process, registers, b"$M"),
            Self::Resume => sends(process, registers, b"$Qqemu.PhyMemMode:0#"),
            Self::Rename => number == RENAME,
            Self::Kill => number == KILL,
        }
    }
}

fn is_ptrace(registers: &user_regs_struct, request: ptrace::Request) -> bool {
    registers.orig_rax == PTRACE && registers.rdi == u64::from(request as u32)
}

fn sends(process: Pid, registers: &user_regs_struct, what: &[u8]) -> bool {
    [WRITE, SENDTO].contains(&registers.orig_rax) && starts_with(process, registers.rsi, what)
}

/// True where the process has these bytes at that address.
fn starts_with(process: Pid, at: u64, what: &[u8]) -> bool {
    let mut pieces = (at..).step_by(8).zip(what.chunks(8));
    pieces.all(|(at, piece)| word(process, at).to_ne_bytes().starts_with(piece))
}

fn word(process: Pid, address: u64) -> i64 {
    ptrace::read(
        process,
        std::ptr::with_exposed_provenance_mut(address.try_into().unwrap_or(0)),
    )
    .unwrap_or(0)
}

/// Lets a program that was just started run to that side of its `nth` such call, the first being 1, where it stays until it is killed.
/// By this thread alone, as the kernel has it.
///
/// # Panics
///
/// If it ends before.
pub fn run_to(child: &Child, call: Call, nth: usize, side: Side) {
    let ended = try_run_to(child, call, nth, side).err();
    assert_eq!(ended, None, "it never did {call:?} {nth} times");
}

/// The same. What it reads or writes of another process counts only while it has a thread of that stopped.
///
/// # Errors
///
/// How it ended before.
///
/// # Panics
///
/// If it can't be traced.
pub fn try_run_to(child: &Child, call: Call, nth: usize, side: Side) -> Result<(), WaitStatus> {
    let pid = as_pid(child.id());
    ptrace::seize(pid, Options::PTRACE_O_TRACESYSGOOD).expect("a child can be traced");
    ptrace::interrupt(pid).expect("it is traced");
    let mut left = nth;
    let mut is_in_pause = false;
    loop {
        let signal = match waitpid(pid, None).expect("it is this program's child") {
            WaitStatus::PtraceSyscall(_) => {
                let registers = ptrace::getregs(pid).expect("it is stopped");
                let begins = registers.rax == NO_RESULT;
                if Call::Interrupt.is(pid, &registers) {
                    is_in_pause = true;
                } else if Call::Detach.is(pid, &registers) && !begins {
                    is_in_pause = false;
                }
                let counts = is_in_pause || ![Call::ReadProcess, Call::WriteProcess].contains(&call);
                if counts && call.is(pid, &registers) && begins == (side == Side::Before) {
                    left -= 1;
                    if left == 0 {
                        return Ok(());
                    }
                }
                None
            }
            WaitStatus::Stopped(_, signal) if signal != Signal::SIGTRAP => Some(signal),
            WaitStatus::Stopped(..) | WaitStatus::PtraceEvent(..) => None,
            ended => return Err(ended),
        };
        ptrace::syscall(pid, signal).expect("it is stopped");
    }
}

/// Lets a program that [`run_to`] has stopped before a system call go on, unable to send anything to anybody, until it shuts a socket down;
/// from then on it goes on by itself.
///
/// # Panics
///
/// If it ends before.
pub fn let_go_unheard(child: &Child) {
    let pid = as_pid(child.id());
    loop {
        let mut registers = ptrace::getregs(pid).expect("it is stopped");
        let begins = registers.rax == NO_RESULT;
        let number = registers.orig_rax;
        if begins && number == SHUTDOWN {
            return let_go(child);
        }
        let is_heard = [WRITE, SENDTO, SENDMSG].contains(&number) && registers.rdi > STDERR;
        // Between the two processes of one vmpatch everything is heard.
        if begins && is_heard && !sends(pid, &registers, BETWEEN_OWN) {
            registers.orig_rax = NONE;
            ptrace::setregs(pid, registers).expect("it is stopped");
        }
        ptrace::syscall(pid, None).expect("it is stopped");
        loop {
            match waitpid(pid, None).expect("it is this program's child") {
                WaitStatus::PtraceSyscall(_) => break,
                WaitStatus::Stopped(..) | WaitStatus::PtraceEvent(..) => {
                    ptrace::syscall(pid, None).expect("it is stopped");
                }
                ended => panic!("it never shut a socket down: {ended:?}"),
            }
        }
    }
}

/// Lets a program that [`run_to`] has stopped go on by itself.
///
/// # Panics
///
/// If it is not stopped.
pub fn let_go(child: &Child) {
    let pid = as_pid(child.id());
    ptrace::detach(pid, None).expect("it is stopped");
}
