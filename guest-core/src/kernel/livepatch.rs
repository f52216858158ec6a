//! The guest's own livepatches: which functions they hold, and the layout of their structures.
//!
//! `klp_patches` (kernel/livepatch/core.c): `klp_patch.list` → `obj_list` → `klp_object.node`, `func_list` → `klp_func.node`
//! (include/linux/livepatch.h; these lists since 5.1).

use super::list::Walker;
use super::{KernelError, Live};
use crate::addr::Gva;
use crate::memory::VirtMemory;
use crate::module::KlpLayout;

/// The layout of the livepatch structures in this kernel.
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

/// The addresses of all functions that a livepatch of the guest's own has redirected.
pub fn held_functions(live: &Live<'_>) -> Result<Vec<Gva>, KernelError> {
    let Some(patches) = live.kernel.symbols.unique("klp_patches") else {
        return Ok(Vec::new());
    };
    let btf = &live.kernel.btf;
    let (patch, object, func) = (
        btf.structure("klp_patch")?,
        btf.structure("klp_object")?,
        btf.structure("klp_func")?,
    );
    let old_func = func.offset("old_func")?;
    let mut held = Vec::new();
    let mut walker = Walker::new(live);
    for patch_at in walker.list("klp_patches", patches, patch.offset("list")?)? {
        let objects = patch_at.wrapping_add(patch.offset("obj_list")?);
        for object_at in walker.list("klp_patch.obj_list", objects, object.offset("node")?)? {
            let funcs = object_at.wrapping_add(object.offset("func_list")?);
            for func_at in walker.list("klp_object.func_list", funcs, func.offset("node")?)? {
                let at = func_at.wrapping_add(old_func);
                let what = "klp_func.old_func";
                held.push(Gva(live.read_u64(at).map_err(|source| KernelError::Unreadable {
                    what,
                    at,
                    source,
                })?));
            }
        }
    }
    Ok(held)
}
