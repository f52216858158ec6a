//! What a module patches, and the kernel's structures that say so.

use super::sections::SectionOffset;

/// Layouts of the livepatch structures in the guest's kernel, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KlpLayout {
    /// `struct klp_patch`: its size.
    pub patch_size: u64,
    /// Offset of `klp_patch.mod`.
    pub patch_mod: u64,
    /// Offset of `klp_patch.objs`.
    pub patch_objs: u64,
    /// Offset of `klp_patch.states`, where there is such a member (5.4 and later).
    pub patch_states: Option<u64>,
    /// Offset of `klp_patch.replace`, where there is such a member (5.1 and later).
    pub patch_replace: Option<u64>,
    /// `struct klp_object`: its size.
    pub object_size: u64,
    /// Offset of `klp_object.name`.
    pub object_name: u64,
    /// Offset of `klp_object.funcs`.
    pub object_funcs: u64,
    /// Offset of `klp_object.callbacks` (4.15 and later).
    pub object_callbacks: Option<u64>,
    /// Size of `struct klp_callbacks`.
    pub callbacks_size: u64,
    /// `struct klp_func`: its size.
    pub func_size: u64,
    /// Offset of `klp_func.old_name`.
    pub func_old_name: u64,
    /// Offset of `klp_func.new_func`.
    pub func_new_func: u64,
    /// Offset of `klp_func.old_sympos`.
    pub func_old_sympos: u64,
}

/// What a module patches.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Patch {
    /// The kernel image, modules, and their functions; at least one object with at least one function.
    pub objects: Vec<PatchObject>,
    /// `klp_patch.replace`: all other patches are to go.
    pub replace: bool,
    /// Where the `struct klp_patch` is.
    pub descriptor: SectionOffset,
    /// Its `mod` member: the only place that may hold the address of the module's own `struct module`.
    pub(crate) this_module: SectionOffset,
}

/// An object of a patch: the kernel image or a module.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PatchObject {
    /// The module's name; none for the kernel image (vmlinux).
    pub name: Option<String>,
    /// The functions to be replaced in it.
    pub functions: Vec<PatchFunction>,
}

/// A function to be replaced.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PatchFunction {
    /// The old function's name in the object's kallsyms.
    pub old_name: String,
    /// Which of several symbols of that name, from 1 on; 0: there must be only one.
    pub sympos: u64,
    /// The new function.
    pub new: SectionOffset,
    /// Bytes of the new function. Where the module has no symbol for it: up to the end of its section.
    pub size: u64,
    /// The new function's own name, where the module has a symbol for it.
    pub symbol: Option<String>,
}

/// Why [`PatchModule::patch`](super::PatchModule::patch) found nothing that it could act on.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PatchError {
    /// Another tool's way to describe a patch.
    #[error("the patch is described in section {section}, which is not handled")]
    Format {
        /// The section that shows it.
        section: &'static str,
    },
    /// Nothing calls `klp_enable_patch`.
    #[error("the module never calls klp_enable_patch, so it patches nothing")]
    NotEnabled,
    /// `klp_enable_patch` is called, but with what is not found.
    #[error(
        "no struct klp_patch found: nothing that the caller of klp_enable_patch refers to has a module and objects"
    )]
    NoPatch,
    /// More than one `struct klp_patch`.
    #[error("the module has two patches, at {first} and at {second}; one is expected")]
    SeveralPatches {
        /// Where one is.
        first: String,
        /// Where another is.
        second: String,
    },
    /// A member of a descriptor is not what it has to be.
    #[error("{member} at {at} is {found}, expected {expected}")]
    Member {
        /// Structure and member.
        member: &'static str,
        /// Section and offset.
        at: String,
        /// What is there.
        found: String,
        /// What should be.
        expected: &'static str,
    },
    /// A patch of nothing.
    #[error("the patch at {at} names no function")]
    Empty {
        /// Section and offset of the `klp_patch`.
        at: String,
    },
    /// More than a patch can sensibly hold.
    #[error("the patch has more than {max} {what}")]
    TooMany {
        /// Of what.
        what: &'static str,
        /// The limit.
        max: usize,
    },
    /// Functions to be called before or after patching.
    #[error("object {object} has a callback at {at}: callbacks are not handled")]
    Callback {
        /// The object's name.
        object: String,
        /// Section and offset of the pointer.
        at: String,
    },
    /// States that later patches are to be compared with.
    #[error("the patch has states (klp_patch.states at {at}): they are not handled")]
    States {
        /// Section and offset of the pointer.
        at: String,
    },
}
