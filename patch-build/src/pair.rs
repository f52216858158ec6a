//! A source file compiled before and after a change.

/// The two object files of one source file, each with a section for every function and object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ObjectPair {
    /// The source file, relative to the kernel's source: `net/unix/af_unix.c`.
    pub source: String,
    /// The module that the file is linked into, by the name that `/proc/modules` has (`af_alg`); `None` for the kernel
    /// itself.
    pub module: Option<String>,
    /// Whether the compiler makes call sites for ftrace in this file. Without them a guest's own livepatch can't take the
    /// patch.
    pub has_ftrace: bool,
    /// The object file of the source as it was.
    pub before: Vec<u8>,
    /// The object file of the changed source.
    pub after: Vec<u8>,
}
