//! Builds and boots real guests from Debian packages, for the demo and the tests.
//!
//! The way from a package's name to a command in a running guest:
//!
//! - [`packages`] fetches a Debian package by name, checks it and unpacks it;
//! - [`kernel`] names the kernels that guests run, and [`modules`] takes kernel modules out of their packages;
//! - [`initramfs`] makes the guest's root file system: busybox, the guest agent, programs of the caller;
//! - [`build`] makes programs and livepatch modules for a guest;
//! - [`guest`] boots it all with QEMU: [`guest::GuestConfig`] says what a guest is like, [`guest::Guest`] is a running one;
//! - [`host`] is the machine that a guest's QEMU runs on: this one, or a [`host_box`], an emulated machine with KVM of its own;
//! - [`qemu`] has other versions of QEMU than the installed one;
//! - [`channel`] runs commands in the guest and brings back their output and exit status.
//!
//! Packages, the cache that spares a second start the network, and the host's programs are `patch_build`'s.
//!
//! `setup.sh` in this room makes a machine ready for all of it; the binary `vmpatch-images` boots a guest by hand.

pub mod build;
pub mod channel;
pub mod guest;
pub mod host;
pub mod host_box;
pub mod initramfs;
pub mod kernel;
pub mod modules;
pub mod qemu;

pub use patch_build::{cache, command, packages};
