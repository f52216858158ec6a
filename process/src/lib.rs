//! Another process's threads and memory.
//!
//! [`threads`] finds its threads and what each does, without stopping any. [`Stopped`] is a set of threads that ptrace holds; dropped, they
//! run. [`Memory`] reads and writes the process, whether it is stopped or not.
//!
//! **A thread that need not stop must not be stopped, not even once.** A ptrace stop makes `epoll_wait` and some other system calls return
//! `EINTR` (`signal(7)`), and a program that takes that for an error may end its thread.

mod memory;
mod ptrace;
mod stat;
mod stop;
mod thread;

pub use memory::{Memory, Span};
pub use ptrace::ThreadRegisters;
pub use stat::Stat;
pub use stop::{StopError, Stopped};
pub use thread::{Doing, Thread, ThreadError, threads};
