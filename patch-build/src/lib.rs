//! Builds a livepatch module from a source change, by compiling only the files that the change touches, before and after.
//!
//! In the order in which a patch passes through:
//!
//! - [`packages`] fetches a Debian package by name, checks it and unpacks it;
//! - [`kernel_files`] are what a kernel's packages have: image, configuration, modules;
//! - [`target`] is the kernel that a patch is made for: those files, its exports and its [`source`],
//!   with the change to it: a diff, or functions of a newer version;
//! - [`tree`] is that source made ready to compile single files of it, with the kernel's own [`compiler`] and [`binutils`], which
//!   [`toolchain`] takes out of packages where the machine has them not;
//! - [`facts`] is what is known of the kernel: its image, symbols, exports, configuration;
//! - [`plan`] is what the kernel's own build would compile, and how;
//! - [`touched`] says which of the kernel's files the change gets into;
//! - [`compile`] makes a [`pair`] of a source file: its object file before and after the change;
//! - [`mod@compare`] finds what differs between the two, function by function, with what debug information tells ([`types`]);
//! - [`running`] finds where that is in the kernel, and the very code there;
//! - [`mod@select`] decides what goes into the module, and what speaks against it;
//! - [`mod@write`] lays it out, [`sheet`] says what is in it, and [`mod@build`] does all this in turn.
//!
//! [`headers`] is what a kernel's modules are built with, for those who have a module's source already; its [`toolchain`] is the
//! kernel's compiler out of a package where the machine has it not, and [`runtime`] the libraries of a newer release.
//!
//! Below them, [`cache`] keeps what was fetched and made, so that a second build needs no network, and [`command`] runs the
//! host's programs and says what went wrong.

mod assembler;
pub mod binutils;
pub mod build;
pub mod cache;
pub mod command;
pub mod compare;
pub mod compile;
pub mod compiler;
pub mod elf;
mod extra;
pub mod facts;
pub mod headers;
mod kept;
pub mod kernel_files;
mod lcs;
mod objtool;
pub mod packages;
pub mod pair;
mod parallel;
pub mod plan;
pub mod request;
pub mod running;
pub mod runtime;
mod seal;
pub mod select;
pub mod sheet;
pub mod source;
pub mod target;
#[cfg(test)]
mod testing;
pub mod toolchain;
pub mod touched;
pub mod tree;
pub mod types;
pub mod write;

use sha2::{Digest, Sha256};

/// The first 16 hexadecimal digits of the SHA-256 over all parts and their lengths: the name of what was made of them.
pub fn digest<T: AsRef<[u8]>>(parts: &[T]) -> String {
    let mut hasher = Sha256::new();
    for part in parts.iter().map(AsRef::as_ref) {
        hasher.update(part.len().to_le_bytes());
        hasher.update(part);
    }
    hasher
        .finalize()
        .iter()
        .take(8)
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_digest_depends_on_where_one_part_ends() {
        assert_ne!(digest(&["ab", "c"]), digest(&["a", "bc"]));
        assert_eq!(digest(&["ab", "c"]).len(), 16);
    }
}
