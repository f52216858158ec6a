//! A vmpatch divided into two processes: one that reads what a guest wrote, and has no rights; and one with rights that reads none of it.
//!
//! ```text
//!     broker: the vmpatch that was started             worker: its child
//!     has the monitor, the lock, the supervisor        has the guest's RAM (to read; mapped RAM to write)
//!     ptrace, the GDB stub, QEMU's memory              finds the kernel, parses, plans, walks stacks, reports
//!               ◄──────────── requests ─────────────
//! ```
//!
//! The [`Request`]s are few and are checked: the broker writes nothing but what the journal of the commit names, which it has given to the
//! supervisor before. It ends with the worker and with its exit code. A worker that dies within a commit is for the supervisor what a killed
//! vmpatch is: the broker ends at once.
//!
//! [`Request`]: message::Request

mod channel;
mod divide;
mod message;
mod serve;
mod worker;

pub(crate) use divide::{Divided, divide};
pub(crate) use worker::BrokeredVm;
