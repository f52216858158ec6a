//! The reasons for which a patch is refused.

use super::{NoTransition, RevertError};
use crate::addr::Gva;
use crate::btf::BtfError;
use crate::kernel::KernelError;
use crate::kernel::guard::Armed;
use crate::module::{ImageError, LinkError, ModuleError, NoteError, PatchError, ResolveError};
use crate::per_cpu::PerCpuError;
use crate::redirect::RedirectError;
use crate::registry::RegistryError;

/// Why a patch is not applied. Nothing was changed.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// The file is no module that vmpatch understands.
    #[error(transparent)]
    Module(#[from] ModuleError),
    /// The module does not describe a patch that vmpatch understands.
    #[error(transparent)]
    Patch(#[from] PatchError),
    /// The module has a section that is not handled, or needs memory that a patch cannot have.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The module cannot be linked against this kernel.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// The module was made for another kernel.
    #[error("the module was made for kernel {module:?}, the guest runs {guest:?}")]
    Vermagic {
        /// `vermagic` of the module.
        module: String,
        /// `vermagic`, or the release, of the guest's kernel.
        guest: String,
    },
    /// The module was compiled against another type of a symbol that it uses.
    #[error(
        "the module was compiled against another {symbol} (checksum {module:#010x}; the guest's kernel has {guest:#010x})"
    )]
    Version {
        /// The exported symbol.
        symbol: String,
        /// The checksum of its type in the module.
        module: u32,
        /// That of the guest's kernel.
        guest: u32,
    },
    /// The module was compiled with another type than the guest's kernel has.
    #[error(
        "the module was compiled with a struct or union {name} of {module} bytes, the guest's kernel has {}",
        sizes(guest)
    )]
    TypeSize {
        /// Name of the type.
        name: String,
        /// Size in the module, in bytes.
        module: u64,
        /// Sizes of the kernel's types of that name, in bytes.
        guest: Vec<u64>,
    },
    /// The module's types cannot be read.
    #[error("the module's .BTF.base can't be read: {0}")]
    BaseTypes(BtfError),
    /// The module was compiled with a `struct module` of another size.
    #[error("the module was compiled with a struct module of {module} bytes, the guest's kernel has one of {guest}")]
    ModuleSize {
        /// Size in the module, in bytes.
        module: u64,
        /// Size in the guest's kernel, in bytes.
        guest: u64,
    },
    /// The module's `struct module` has a pointer at an offset where the guest's kernel has neither init nor exit.
    #[error(
        "the module was compiled with another struct module: at byte {offset}, where it points at init or exit, the guest's kernel has something else"
    )]
    ModulePointer {
        /// Bytes from the structure's start.
        offset: u64,
    },
    /// The module uses a member of its `struct module` that vmpatch does not fill.
    #[error(
        "{at} uses {} of THIS_MODULE: in a guest that is patched from outside, only its address, state, name and refcnt can be used",
        offset.map_or_else(|| "an unknown part".to_owned(), |offset| format!("byte {offset}"))
    )]
    ThisModule {
        /// Section and offset of the use.
        at: String,
        /// Offset of the member in the structure, in bytes; `None` where it cannot be told.
        offset: Option<u64>,
    },
    /// The module registers something that the kernel links with the module's directory in sysfs.
    #[error(
        "the patch uses THIS_MODULE and calls {function}, which links what it registers with the module in the guest's sysfs, where a patch from outside is not"
    )]
    InSysfs {
        /// The function.
        function: String,
    },
    /// The module's ORC tables have another format than the guest's kernel reads.
    #[error("the module was built for another ORC format ({module}) than the guest's kernel has ({guest})")]
    OrcHeader {
        /// The digest of the module's format.
        module: String,
        /// That of the kernel's.
        guest: String,
    },
    /// The module's ORC entries have another length than the guest's kernel reads.
    #[error("the module's ORC entries have {module} bytes, those of the guest's kernel {guest}")]
    OrcEntry {
        /// Bytes of an entry in the module.
        module: u64,
        /// Bytes of an entry in the guest's kernel.
        guest: u64,
    },
    /// The guest's integrity guard would or may stop the guest.
    #[error(transparent)]
    Guard(#[from] Armed),
    /// The module sets `klp_patch.replace`, and the guest has livepatches of its own.
    #[error(
        "the module is to replace all other livepatches (klp_patch.replace), and the guest has its own, which its tenant must disable \
         first: {livepatches}"
    )]
    Replace {
        /// Names of the livepatches.
        livepatches: String,
    },
    /// A patch cannot be replaced.
    #[error("replacing {id}")]
    Replaced {
        /// The patch.
        id: String,
        /// Why not.
        source: Box<RevertError>,
    },
    /// The module patches only modules that the guest has not loaded.
    #[error("it patches nothing but modules that the guest has not loaded: {}", objects.join(", "))]
    Pending {
        /// The module's name.
        id: String,
        /// The modules.
        objects: Vec<String>,
    },
    /// A part of the module is applied, with variables that the rest would have to share.
    #[error(
        "{section} belongs to {id}, too, which was applied before {objects} was loaded; revert it and apply it again"
    )]
    SharedData {
        /// The section with the variables.
        section: String,
        /// The part that is applied.
        id: String,
        /// The objects to be patched now.
        objects: String,
    },
    /// Another patch is in transition.
    #[error(
        "{id} is in transition: some tasks still run the old code; wait for its end (vmpatch finish), or revert it"
    )]
    InTransition {
        /// The other patch.
        id: String,
    },
    /// It can't be in transition.
    #[error("the patch can only be applied at one instant")]
    NoTransition(#[from] NoTransition),
    /// The guest is loading or unloading a module that the patch needs.
    #[error("the guest is loading or unloading the module {module}")]
    ModuleInTransition {
        /// The module.
        module: String,
    },
    /// The same module is already applied.
    #[error("{id} is already applied")]
    AlreadyApplied {
        /// Its name.
        id: String,
    },
    /// Another module is applied under that name.
    #[error("{id} is applied from another module (its SHA-256 is {applied}, this one's is {file}): revert {id} first")]
    OtherModule {
        /// The name.
        id: String,
        /// SHA-256 of the module that is applied, in hex.
        applied: String,
        /// SHA-256 of this module, in hex.
        file: String,
    },
    /// The patch is applied, but something has overwritten a redirect.
    #[error("{id} is applied, but {function} is not redirected any more ({found}): revert {id}, then apply it again")]
    NotActive {
        /// Its name.
        id: String,
        /// The old function.
        function: String,
        /// The bytes in place of the redirect.
        found: String,
    },
    /// The guest has loaded a module of that name.
    #[error("a module named {id} is already loaded in the guest")]
    Loaded {
        /// The name.
        id: String,
    },
    /// The guest's kernel was built without modules. Such a kernel loads no livepatch either.
    #[error("the guest's kernel was built without modules, so the patch cannot be registered as one")]
    NoModules,
    /// The module's note of the code that it was made for cannot be read.
    #[error(transparent)]
    Note(#[from] NoteError),
    /// The guest runs other code than the patch was made for.
    #[error(
        "the patch was made for another {function}: byte {offset:#x} of it, at {at}, is {found:#04x} in the guest, expected {expected:#04x}"
    )]
    OtherCode {
        /// The function.
        function: String,
        /// The first byte that differs, counted from the function's start.
        offset: usize,
        /// Guest-virtual address of that byte.
        at: Gva,
        /// The guest's byte.
        found: u8,
        /// The byte that the patch was made for.
        expected: u8,
    },
    /// Another patch, which came later than the first part of this one, has replaced the function.
    #[error("{function} is held by {id}, which was applied after the first part of this module; revert that one first")]
    Held {
        /// The function.
        function: String,
        /// The patch.
        id: String,
    },
    /// A function that the patch names is not in this kernel, or its name is not unique.
    #[error("function {name}")]
    Function {
        /// Its name.
        name: String,
        /// Why it was not found.
        #[source]
        cause: ResolveError,
    },
    /// A function cannot be redirected.
    #[error(transparent)]
    Redirect(#[from] RedirectError),
    /// The guest has no per-CPU memory for the patch.
    #[error(transparent)]
    PerCpu(#[from] PerCpuError),
    /// The registry cannot be read, or has no space for the patch.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// The guest's kernel cannot be read.
    #[error("reading the guest's kernel")]
    Kernel(#[from] KernelError),
    /// The patch's record cannot be encoded.
    #[error("writing the patch's record")]
    Record(#[from] serde_json::Error),
}

/// The sizes of the kernel's types of one name, for a message.
fn sizes(sizes: &[u64]) -> String {
    let sizes: Vec<_> = sizes.iter().map(u64::to_string).collect();
    match sizes.as_slice() {
        [] => "none of that name".to_owned(),
        sizes => format!("{} bytes", sizes.join(" or ")),
    }
}
