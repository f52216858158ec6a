//! What an init or exit may call and use, by the format of the module.

use super::OwnFunction;
use crate::module::PatchFormat;

/// Enables a patch.
pub(super) const ENABLE: &str = "klp_enable_patch";
/// Called by the compiler at a function's start, and keeps all registers.
pub(super) const FENTRY: &str = "__fentry__";
/// Where a function returns, on kernels that may have to do more than that (since 5.19).
pub(super) const RETURN: &str = "__x86_return_thunk";
/// What the compiler has an indirect call go through.
pub(super) const INDIRECT: &str = "__x86_indirect_thunk_";
/// Functions that never come back.
pub(super) const NEVER_RETURN: [&str; 3] = ["__stack_chk_fail", "fortify_panic", "__fortify_panic"];

/// Messages for the kernel's log: nothing but people reads it, and the format `%n`, which would write, does not exist in the
/// kernel (Documentation/core-api/printk-formats.rst).
const MESSAGES: [&str; 3] = ["_printk", "printk", ENABLE];
/// How the tools' init and exit get memory, compare names, and keep lists; from 5.10 to 7.2.
const TOOLS: [&str; 25] = [
    "__kmalloc",
    "__kmalloc_noprof",
    "__kmalloc_cache_noprof",
    "__kmalloc_large_noprof",
    "kmalloc_trace",
    "kmalloc_large",
    "kmalloc_order_trace",
    "kmem_cache_alloc_trace",
    "kfree",
    "strcmp",
    "memcpy",
    "memset",
    "memmove",
    "__memcpy",
    "__memset",
    "__list_add_valid",
    "__list_del_entry_valid",
    "__list_add_valid_or_report",
    "__list_del_entry_valid_or_report",
    "__ubsan_handle_out_of_bounds",
    "__ubsan_handle_shift_out_of_bounds",
    "klp_find_section_by_name",
    "__WARN_trap",
    "__SCT__WARN_trap",
    "__warn_printk",
];
/// What the inlined part of an allocation reads.
const TOOL_DATA: [&str; 4] = [
    "kmalloc_caches",
    "random_kmalloc_seed",
    "__stack_chk_guard",
    "__ref_stack_chk_guard",
];

/// What is accepted.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rules {
    /// True for the code of a tool, which is known: it may branch, and fill memory that it has allocated.
    pub is_tool: bool,
    /// The tool's own variables, which nothing else uses.
    pub variables: &'static [&'static str],
    /// True where branches matter, as what comes behind them does: in an init, until the patch is enabled.
    pub branches_count: bool,
}

impl Rules {
    pub fn of(format: PatchFormat, function: OwnFunction) -> Self {
        let variables: &[&str] = match format {
            PatchFormat::KlpPatch => &[],
            PatchFormat::Kpatch => &["lpatch", "patch_objects", "patch_objects_nr"],
            PatchFormat::KlpBuild => &["patch"],
        };
        let is_tool = format != PatchFormat::KlpPatch;
        Self {
            is_tool,
            variables,
            branches_count: function == OwnFunction::Init && !is_tool,
        }
    }

    /// Whether the function may be called.
    pub fn may_call(&self, name: &str) -> bool {
        MESSAGES.contains(&name) || NEVER_RETURN.contains(&name) || (self.is_tool && TOOLS.contains(&name))
    }

    /// Whether a variable of the kernel may be used. Where nothing follows from what is read, any may be read.
    pub fn may_use(&self, name: &str) -> bool {
        !self.is_tool || TOOL_DATA.contains(&name)
    }
}
