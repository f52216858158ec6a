//! The vmpatch host agent: finds a running guest, reaches it through QEMU, and has the patch core change its kernel.
//!
//! The way of a command: [`cli`] → [`domains`] → [`session`] ([`attach`], then the kernel) → [`commands`] → [`report`].
//! [`upgrade`] moves a guest into another QEMU.
//!
//! While something is changed, a [`supervisor`] in a process of its own stands ready to take it back.

#![deny(clippy::print_stdout, clippy::print_stderr)]

pub mod attach;
pub mod cli;
pub mod commands;
pub mod domains;
pub mod error;
pub mod lock;
mod module_file;
pub mod output;
pub mod progress;
pub mod report;
mod retry;
pub mod session;
pub mod state;
pub mod supervisor;
pub mod text;
pub mod upgrade;
