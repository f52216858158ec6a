//! The patch that a module describes, and the layouts of the kernel's structures for it.

use super::init::{OwnFunction, Work};
use super::sections::SectionOffset;
use super::{PatchModule, klp_build, kpatch, object_name};

/// Most functions that one module may patch, over all its objects.
pub(super) const FUNCTIONS_MAX: usize = 10_000;
/// Most objects.
pub(super) const OBJECTS_MAX: usize = 1_000;

/// The members of `struct klp_callbacks`, in their order (include/linux/livepatch.h, 4.15 to 7.2; 8 bytes each).
pub(super) const CALLBACKS: [&str; 4] = ["pre_patch", "post_patch", "pre_unpatch", "post_unpatch"];

/// The name of the callback whose pointer is at this offset in the structure, in bytes.
pub(super) fn callback(offset: u64) -> String {
    let name = usize::try_from(offset / 8).ok().and_then(|index| CALLBACKS.get(index));
    name.copied().unwrap_or("nameless").to_owned()
}

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

/// The patch that a module describes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Patch {
    /// The objects (the kernel image and modules) with their functions: at least one object with at least one function.
    pub objects: Vec<PatchObject>,
    /// `klp_patch.replace`: the patch replaces all others. It is in the module's data, or a constant that the init of kpatch-build or klp-build
    /// writes. `None` where it is not known, or where the kernel has no such member.
    pub replace: Option<bool>,
    /// The format of the description.
    pub format: PatchFormat,
    /// Place of `klp_patch.mod`, if there is a static `klp_patch`. It is the only place in data that may hold the address of the module's own
    /// `struct module`.
    pub(crate) this_module: Option<SectionOffset>,
    /// Places and lengths of static livepatch structures. vmpatch reads their pointers; the guest does not.
    pub(crate) descriptors: Vec<(SectionOffset, u64)>,
}

/// The format in which a module describes its patch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PatchFormat {
    /// Static `klp_patch` structures, as a kernel developer writes them.
    KlpPatch,
    /// kpatch-build's `.kpatch.funcs`.
    Kpatch,
    /// klp-build's `.init.klp_objects`.
    KlpBuild,
}

impl PatchFormat {
    /// The name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::KlpPatch => "klp_patch",
            Self::Kpatch => "kpatch-build",
            Self::KlpBuild => "klp-build",
        }
    }
}

/// An object of a patch: the kernel image or a module.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PatchObject {
    /// Name of the module; `None` for the kernel image (vmlinux).
    pub name: Option<String>,
    /// The functions that are replaced in it.
    pub functions: Vec<PatchFunction>,
}

/// A function that is replaced.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PatchFunction {
    /// The old function's name in the object's kallsyms.
    pub old_name: String,
    /// Position among symbols of that name, from 1; 0 if the name must be unique.
    pub sympos: u64,
    /// Place of the new function.
    pub new: SectionOffset,
    /// Length of the new function in bytes. Without a symbol for it, it extends to the end of its section.
    pub size: u64,
    /// Name of the new function, if the module has a symbol for it.
    pub symbol: Option<String>,
}

/// Why a module describes no patch that can be applied.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PatchError {
    /// kpatch-build has not finished the module, or has made it for kpatch's own kernel module.
    #[error("section {section}: kpatch-build has not finished the module as a livepatch module (create-klp-module)")]
    Unfinished {
        /// The section that shows this.
        section: &'static str,
    },
    /// The module never calls `klp_enable_patch`.
    #[error("the module never calls klp_enable_patch, so it patches nothing")]
    NotEnabled,
    /// The module calls `klp_enable_patch`, but its argument was not found.
    #[error(
        "no struct klp_patch found: nothing that the caller of klp_enable_patch refers to has a module and objects"
    )]
    NoPatch,
    /// More than one `struct klp_patch`.
    #[error("the module has two patches, at {first} and at {second}; one is expected")]
    SeveralPatches {
        /// Place of the first.
        first: String,
        /// Place of the second.
        second: String,
    },
    /// A member of a descriptor has a wrong value.
    #[error("{member} at {at} is {found}, expected {expected}")]
    Member {
        /// Structure and member.
        member: &'static str,
        /// Section and offset.
        at: String,
        /// What is there.
        found: String,
        /// The expected value.
        expected: &'static str,
    },
    /// The patch has no function.
    #[error("the patch names no function")]
    Empty,
    /// The patch has more functions or objects than are accepted.
    #[error("the patch has more than {max} {what}")]
    TooMany {
        /// Of what.
        what: &'static str,
        /// The limit.
        max: usize,
    },
    /// An object has a callback.
    #[error("object {object} has a {callback} callback at {at}, which would have to be called in the guest")]
    Callback {
        /// The object's name.
        object: String,
        /// The kind of callback: a member of `struct klp_callbacks`.
        callback: String,
        /// Section and offset of the pointer.
        at: String,
    },
    /// The patch has states, with which the kernel compares later patches.
    #[error("the patch has states (klp_patch.states at {at}): they are not handled")]
    States {
        /// Section and offset of the pointer.
        at: String,
    },
    /// The patch is for a module name that no module can have.
    #[error("the patch is for module {name:?}, and no module can have that name: {advice}")]
    ObjectName {
        /// The name.
        name: String,
        /// The advice for the operator.
        advice: String,
    },
    /// Init or exit does something beside enabling the patch.
    #[error(
        "{function} {work} ({at}): vmpatch does not run a module's init and exit yet; load the module in the guest, or build the patch without that work"
    )]
    OwnFunction {
        /// Init or exit.
        function: OwnFunction,
        /// What it does.
        work: Work,
        /// Section and offset of the instruction.
        at: String,
    },
}

impl PatchModule<'_> {
    /// The format of the module's description.
    pub fn format(&self) -> PatchFormat {
        if self.section_named(kpatch::FUNCS).is_some() {
            PatchFormat::Kpatch
        } else if self.section_named(klp_build::OBJECTS).is_some() {
            PatchFormat::KlpBuild
        } else {
            PatchFormat::KlpPatch
        }
    }

    /// Reads the patch that the module describes, in any format.
    ///
    /// # Errors
    ///
    /// The module describes no patch that can be applied.
    pub fn patch(&self, layout: &KlpLayout) -> Result<Patch, PatchError> {
        let patch = match self.format() {
            PatchFormat::Kpatch => self.kpatch()?,
            PatchFormat::KlpBuild => self.klp_build()?,
            PatchFormat::KlpPatch => self.klp_patch(layout)?,
        };
        if patch.objects.iter().all(|object| object.functions.is_empty()) {
            return Err(PatchError::Empty);
        }
        for name in patch.objects.iter().filter_map(|object| object.name.as_deref()) {
            if let Some(advice) = object_name::advice(name) {
                let name = name.to_owned();
                return Err(PatchError::ObjectName { name, advice });
            }
        }
        let described = patch.this_module.map(|this| SectionOffset {
            offset: this.offset.saturating_sub(layout.patch_mod),
            ..this
        });
        let written = self.check_own_functions(patch.format, described, layout.patch_replace)?;
        let replace = match patch.format {
            PatchFormat::KlpPatch => patch.replace,
            PatchFormat::Kpatch | PatchFormat::KlpBuild => written,
        };
        Ok(Patch { replace, ..patch })
    }
}

/// Groups functions by their objects. Both are in the order of their first occurrence.
pub(super) fn group(functions: Vec<(Option<String>, PatchFunction)>) -> Vec<PatchObject> {
    let mut objects: Vec<PatchObject> = Vec::new();
    for (name, function) in functions {
        match objects.iter_mut().find(|object| object.name == name) {
            Some(object) => object.functions.push(function),
            None => objects.push(PatchObject {
                name,
                functions: vec![function],
            }),
        }
    }
    objects
}
