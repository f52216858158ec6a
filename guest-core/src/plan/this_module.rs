//! Checks how a patch uses its own `struct module` against the one that vmpatch gives it in the guest.

use super::Refusal;
use crate::kernel::{KernelError, Live};
use crate::module::{Image, PatchModule};

/// Members of `struct module` that vmpatch fills as a native load does, and that the patch's code may use. Functions of the kernel read
/// other members, too: they find null pointers and zero counts, as in a module without the things in question.
const MEMBERS: [&str; 3] = ["state", "name", "refcnt"];
/// Functions, beside those with `driver` in their name, that link what they register with the module's directory in sysfs. A patch has no
/// such directory, and without it they warn or fail (drivers/base/module.c, `module_add_driver`; drivers/base/core.c,
/// `__root_device_register`; Linux 5.10 to 7.3).
const IN_SYSFS: [&str; 5] = [
    "__root_device_register",
    "__xenbus_register_frontend",
    "__xenbus_register_backend",
    "__platform_create_bundle",
    "usb_composite_probe",
];

/// Requires that the module was compiled with the guest kernel's `struct module`: compares its size, as the kernel's own loader does since
/// 6.4 (kernel/module/main.c, `elf_validity_check`), and the offsets of the pointers to init and exit.
pub(super) fn check_layout(live: &Live<'_>, module: &PatchModule<'_>) -> Result<(), Refusal> {
    let Some(bytes) = module.this_module_bytes() else {
        return Ok(());
    };
    let layout = live.kernel.btf.structure("module").map_err(KernelError::from)?;
    if bytes != layout.size() {
        return Err(Refusal::ModuleSize {
            module: bytes,
            guest: layout.size(),
        });
    }
    let members = ["init", "exit"].map(|member| layout.try_member(member).map(|member| member.offset()));
    let mut pointers = module.this_module_pointers();
    match pointers.find(|at| !members.contains(&Some(*at))) {
        Some(offset) => Err(Refusal::ModulePointer { offset }),
        None => Ok(()),
    }
}

/// Requires that the patch uses only the members of its `struct module` that vmpatch fills.
pub(super) fn check_uses(live: &Live<'_>, image: &Image<'_, '_>) -> Result<(), Refusal> {
    let uses = image.this_module_uses();
    let layout = live.kernel.btf.structure("module").map_err(KernelError::from)?;
    let members = MEMBERS.map(|member| layout.try_member(member));
    let is_filled = |offset: u64| {
        let mut members = members.iter().flatten();
        offset == 0 || members.any(|member| (member.offset()..member.end()).contains(&offset))
    };
    let mut others = uses.iter().filter(|one| !one.offset.is_some_and(is_filled));
    if let Some(other) = others.next() {
        return Err(Refusal::ThisModule {
            at: other.at.clone(),
            offset: other.offset,
        });
    }
    let links = |name: &str| {
        IN_SYSFS.contains(&name) || name.contains("driver") && name.contains("register") && !name.contains("unregister")
    };
    match image.undefined().iter().find(|symbol| links(&symbol.name)) {
        Some(symbol) if !uses.is_empty() => Err(Refusal::InSysfs {
            function: symbol.name.clone(),
        }),
        _ => Ok(()),
    }
}
