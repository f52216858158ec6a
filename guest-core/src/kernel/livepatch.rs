//! The guest's own livepatches: the functions that they replace, and the layout of their structures.
//!
//! `klp_patches` (kernel/livepatch/core.c): `klp_patch.list` → `obj_list` → `klp_object.node`, `func_list` → `klp_func.node`
//! (include/linux/livepatch.h; these lists since 5.1).

use super::list::Walker;
use super::{KernelError, Live, modules};
use crate::addr::Gva;
use crate::btf::Struct;
use crate::memory::VirtMemory;
use crate::module::KlpLayout;

/// The layout of the livepatch structures in this kernel.
///
/// # Errors
///
/// The kernel's types lack a structure or member.
pub fn layout(live: &Live<'_>) -> Result<KlpLayout, KernelError> {
    let btf = &live.kernel.btf;
    let (patch, object, func) = (
        btf.structure("klp_patch")?,
        btf.structure("klp_object")?,
        btf.structure("klp_func")?,
    );
    Ok(KlpLayout {
        patch_size: patch.size(),
        patch_mod: patch.offset("mod")?,
        patch_objs: patch.offset("objs")?,
        patch_states: patch.try_member("states").map(|member| member.offset()),
        patch_replace: patch.try_member("replace").map(|member| member.offset()),
        object_size: object.size(),
        object_name: object.offset("name")?,
        object_funcs: object.offset("funcs")?,
        object_callbacks: object.try_member("callbacks").map(|member| member.offset()),
        callbacks_size: btf.structure("klp_callbacks").map_or(0, |callbacks| callbacks.size()),
        func_size: func.size(),
        func_old_name: func.offset("old_name")?,
        func_new_func: func.offset("new_func")?,
        func_old_sympos: func.offset("old_sympos")?,
    })
}

/// A function that a livepatch of the guest's own replaces.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Held {
    /// Guest-virtual address of the replaced function.
    pub function: Gva,
    /// Name of the livepatch's module.
    pub livepatch: String,
    /// The code that a call of the function runs.
    pub code: Code,
}

/// The code that a call of a replaced function runs. The function's ftrace site calls livepatch's handler (`klp_ftrace_handler`,
/// kernel/livepatch/patch.c).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Code {
    /// The livepatch's code.
    Livepatch,
    /// The code behind the ftrace site: the livepatch is not enabled, or restores the original (`klp_func.nop`).
    BehindSite,
    /// Either, depending on the task: the guest is in a transition.
    Transition,
}

impl Held {
    /// The last one of `held` that replaces `function`. Later livepatches are at the end of the guest's list, and take precedence.
    pub fn last_of(held: &[Self], function: Gva) -> Option<&Self> {
        held.iter().rfind(|held| held.function == function)
    }
}

/// All functions that livepatches of the guest's own replace, in the order in which the livepatches were loaded.
///
/// # Errors
///
/// The guest's list of livepatches cannot be read.
pub fn held(live: &Live<'_>) -> Result<Vec<Held>, KernelError> {
    let live = &live.that_changes_when("applying a livepatch of its own");
    let Some(patches) = live.kernel.symbol_of_feature("klp_patches")? else {
        return Ok(Vec::new());
    };
    let btf = &live.kernel.btf;
    let (patch, object, func) = (
        btf.structure("klp_patch")?,
        btf.structure("klp_object")?,
        btf.structure("klp_func")?,
    );
    let mut all = Vec::new();
    let mut walker = Walker::new(live);
    for patch_at in walker.list("klp_patches", patches, patch.offset("list")?)? {
        let module = word(live, "klp_patch.mod", patch_at.wrapping_add(patch.offset("mod")?))?;
        let livepatch = modules::name(live, Gva(module))?;
        let objects = patch_at.wrapping_add(patch.offset("obj_list")?);
        for object_at in walker.list("klp_patch.obj_list", objects, object.offset("node")?)? {
            let funcs = object_at.wrapping_add(object.offset("func_list")?);
            for func_at in walker.list("klp_object.func_list", funcs, func.offset("node")?)? {
                all.push(Held {
                    function: Gva(word(
                        live,
                        "klp_func.old_func",
                        func_at.wrapping_add(func.offset("old_func")?),
                    )?),
                    livepatch: livepatch.clone(),
                    code: code(live, &func, func_at)?,
                });
            }
        }
    }
    Ok(all)
}

/// The code that the flags of a `klp_func` select.
fn code(live: &Live<'_>, func: &Struct<'_>, at: Gva) -> Result<Code, KernelError> {
    let flag = |name: &str| {
        let mut byte = [0];
        let at = at.wrapping_add(func.offset(name)?);
        live.read(at, &mut byte).map_err(|source| KernelError::Unreadable {
            what: "the flags of klp_func",
            at,
            source,
        })?;
        Ok::<_, KernelError>(byte != [0])
    };
    Ok(match (flag("transition")?, flag("patched")?, flag("nop")?) {
        (true, ..) => Code::Transition,
        (false, true, false) => Code::Livepatch,
        (false, ..) => Code::BehindSite,
    })
}

fn word(live: &Live<'_>, what: &'static str, at: Gva) -> Result<u64, KernelError> {
    live.read_u64(at)
        .map_err(|source| KernelError::Unreadable { what, at, source })
}
