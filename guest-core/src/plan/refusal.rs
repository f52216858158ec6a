//! Why a patch is not applied.

use crate::addr::Gva;
use crate::btf::BtfError;
use crate::kernel::KernelError;
use crate::kernel::guard::Armed;
use crate::module::{ImageError, LinkError, ModuleError, NoteError, PatchError, ResolveError};
use crate::per_cpu::PerCpuError;
use crate::place::RegistryError;
use crate::redirect::RedirectError;

/// Why a module does not fit the guest. Nothing was changed.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// Not a module that vmpatch understands.
    #[error(transparent)]
    Module(#[from] ModuleError),
    /// The patch that it describes is not understood.
    #[error(transparent)]
    Patch(#[from] PatchError),
    /// It has a section, or needs memory, that is not handled.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// It can't be linked against this kernel.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// It was made for another kernel.
    #[error("the module was made for kernel {module:?}, the guest runs {guest:?}")]
    Vermagic {
        /// `vermagic` of the module.
        module: String,
        /// `vermagic`, or the release, of the guest's kernel.
        guest: String,
    },
    /// It was compiled against another type of something that it uses.
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
    /// It was compiled with another type than the guest's kernel has.
    #[error(
        "the module was compiled with a struct or union {name} of {module} bytes, the guest's kernel has {}",
        sizes(guest)
    )]
    TypeSize {
        /// Its name.
        name: String,
        /// Bytes of the module's.
        module: u64,
        /// Bytes of those of that name that the kernel has.
        guest: Vec<u64>,
    },
    /// Its types can't be read.
    #[error("the module's .BTF.base can't be read: {0}")]
    BaseTypes(BtfError),
    /// It was compiled with a `struct module` of another size.
    #[error("the module was compiled with a struct module of {module} bytes, the guest's kernel has one of {guest}")]
    ModuleSize {
        /// Bytes of the module's.
        module: u64,
        /// Bytes of the kernel's.
        guest: u64,
    },
    /// Its `struct module` has a pointer where the guest's kernel has neither init nor exit.
    #[error(
        "the module was compiled with another struct module: at byte {offset}, where it points at init or exit, the guest's kernel has something else"
    )]
    ModulePointer {
        /// Bytes from the structure's start.
        offset: u64,
    },
    /// It uses a part of its own `struct module` that the guest's does not have filled in.
    #[error(
        "{at} uses {} of THIS_MODULE: in a guest that is patched from outside, only its address, state, name and refcnt can be used",
        offset.map_or_else(|| "an unknown part".to_owned(), |offset| format!("byte {offset}"))
    )]
    ThisModule {
        /// Section and offset.
        at: String,
        /// Bytes from the structure's start, where it can be told.
        offset: Option<u64>,
    },
    /// It registers something that is linked with its module in sysfs.
    #[error(
        "the patch uses THIS_MODULE and calls {function}, which links what it registers with the module in the guest's sysfs, where a patch from outside is not"
    )]
    InSysfs {
        /// The function.
        function: String,
    },
    /// Its tables for unwinding have another format than the guest's kernel reads.
    #[error("the module was built for another ORC format ({module}) than the guest's kernel has ({guest})")]
    OrcHeader {
        /// The digest of the module's format.
        module: String,
        /// That of the kernel's.
        guest: String,
    },
    /// The guest's integrity guard would stop the guest, or may.
    #[error(transparent)]
    Guard(#[from] Armed),
    /// `klp_patch.replace`, in a guest that has other patches.
    #[error("the module is to replace all other livepatches (klp_patch.replace); revert these first: {others}")]
    Replace {
        /// The others, by name.
        others: String,
    },
    /// All that it patches is in modules that the guest has not loaded.
    #[error("it patches nothing but modules that the guest has not loaded: {}", objects.join(", "))]
    Pending {
        /// The module's name.
        id: String,
        /// The modules.
        objects: Vec<String>,
    },
    /// A part of it has been applied before, with data that the rest would have to share.
    #[error(
        "{section} belongs to {id}, too, which was applied before {objects} was loaded; revert it and apply it again"
    )]
    SharedData {
        /// The section.
        section: String,
        /// The part that is applied.
        id: String,
        /// What is to be patched now.
        objects: String,
    },
    /// A module that the patch needs is being loaded or unloaded.
    #[error("the guest's module {module} is just being loaded or unloaded")]
    Unsettled {
        /// The module.
        module: String,
    },
    /// It is there already, of the very same module.
    #[error("{id} is already applied")]
    AlreadyApplied {
        /// Its name.
        id: String,
    },
    /// A patch of that name is there already, of another module.
    #[error("{id} is applied from another module (its SHA-256 is {applied}, this one's is {file}): revert {id} first")]
    OtherModule {
        /// The name.
        id: String,
        /// SHA-256 of the module that is applied, in hex.
        applied: String,
        /// SHA-256 of this module, in hex.
        file: String,
    },
    /// It is there already, but something has overwritten its redirect.
    #[error("{id} is applied, but {function} is not redirected any more ({found}): revert {id}, then apply it again")]
    NotActive {
        /// Its name.
        id: String,
        /// The function.
        function: String,
        /// What is in place of the redirect.
        found: String,
    },
    /// The guest has a module of that name.
    #[error("the guest has loaded a module {id} of its own, and can't know a second one by that name")]
    Loaded {
        /// The name.
        id: String,
    },
    /// A kernel that was built without modules does not load a livepatch either.
    #[error("the guest's kernel was built without modules, and can't know the patch's code as one")]
    NoModules,
    /// What it says of the code that it was made for can't be read.
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
        /// Its address in the guest.
        at: Gva,
        /// What is there.
        found: u8,
        /// What should be.
        expected: u8,
    },
    /// Another patch holds the function.
    #[error("{function} is already patched by {id}; revert that one first")]
    Held {
        /// The function.
        function: String,
        /// The patch.
        id: String,
    },
    /// A function that the patch names is not in this kernel, or not once.
    #[error("function {name}: {cause}")]
    Function {
        /// Its name.
        name: String,
        /// Why not.
        cause: ResolveError,
    },
    /// It can't be redirected.
    #[error(transparent)]
    Redirect(#[from] RedirectError),
    /// No per-CPU memory.
    #[error(transparent)]
    PerCpu(#[from] PerCpuError),
    /// No room.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// The guest's tables could not be read.
    #[error("reading the guest's kernel")]
    Kernel(#[from] KernelError),
    /// Its record could not be written down.
    #[error("writing the patch's record")]
    Record(#[from] serde_json::Error),
}

/// The sizes of the types of a name, for a message.
fn sizes(sizes: &[u64]) -> String {
    let sizes: Vec<_> = sizes.iter().map(u64::to_string).collect();
    match sizes.as_slice() {
        [] => "none of that name".to_owned(),
        sizes => format!("{} bytes", sizes.join(" or ")),
    }
}
