//! Builds and boots real guests from Debian packages, for the demo and the tests.
//!
//! The way from a package's name to a running guest:
//!
//! - [`packages`] fetches a Debian package by name, checks it and unpacks it;
//! - [`build`] makes programs and livepatch modules for a guest;
//! - [`cache`] keeps what was fetched and made, so that a second start needs no network;
//! - [`command`] runs the host's programs and says what went wrong.
//!
//! `setup.sh` in this room makes a machine ready for all of it.

pub mod build;
pub mod cache;
pub mod command;
pub mod packages;
