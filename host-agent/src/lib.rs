//! The vmpatch host agent as a library: finds a running guest, reaches it through its hypervisor, and has the patch core change its kernel.
//!
//! In the order in which an operation passes through them:
//!
//! - [`domains`]: the QEMU processes of this host;
//! - [`target`], [`find`]: which guest is meant, and in which process it is;
//! - [`hypervisor`]: a VM that can be reached, whatever runs it;
//! - [`lock`]: one vmpatch at a time for each guest;
//! - [`session`]: a guest that was reached and understood: apply, check, revert, recover;
//! - [`sandbox`]: a process that gives up its rights before it reads what a guest wrote;
//! - [`supervisor`]: a process of its own that rolls back what a killed vmpatch has left half done;
//! - [`upgrade`]: moves a guest into another QEMU;
//! - [`outcome`], [`chain`]: what a failure means, and its causes;
//! - [`module_file`]: reads livepatch modules.
//!
//! Each operation has an error of its own. What it does meanwhile it tells as `tracing` events: warnings, `info` for what was found, `debug`
//! for each step; never in a pause. Nothing here parses a command line, or prints: that is the program `vmpatch`, in `program/`.
//!
//! Every call blocks. From an asynchronous runtime call it on a thread of its own; a [`session::Session`] may move between threads.

#![deny(clippy::print_stdout, clippy::print_stderr)]

mod broker;
pub mod chain;
pub mod domains;
pub mod find;
pub mod hypervisor;
pub mod lock;
pub mod module_file;
pub mod outcome;
pub mod sandbox;
pub mod session;
pub mod supervisor;
pub mod target;
pub mod upgrade;
