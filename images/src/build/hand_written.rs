//! Livepatch modules of our own (`images/modules/`), each for one thing that patching must do or refuse. They fit every
//! kernel that the tests boot.

use std::fmt::Write as _;
use std::fs;
use std::path::PathBuf;

use patch_build::source::package;

use super::{Error, KernelTree, Module};
use crate::{cache, packages};

macro_rules! text {
    ($path:literal) => {
        include_str!(concat!("../../modules/", $path, ".c"))
    };
}

/// Builds the ordinary module `vmpatch_target`, for patches of a module of the guest. Returns the `.ko` in the cache.
pub fn target(tree: &KernelTree) -> Result<PathBuf, Error> {
    Module::new("vmpatch_target")
        .source("vmpatch_target", text!("target"))
        .build(tree)
}

/// Builds the ordinary module `vmpatch_percpu`, which takes most of the memory that a guest reserves for modules' per-CPU
/// variables. Returns the `.ko` in the cache.
pub fn percpu(tree: &KernelTree) -> Result<PathBuf, Error> {
    Module::new("vmpatch_percpu")
        .source("vmpatch_percpu", text!("percpu"))
        .build(tree)
}

/// Builds the ordinary module `lkrg`, which has the settings of that integrity guard and checks nothing. Returns the `.ko` in the
/// cache.
pub fn lkrg(tree: &KernelTree) -> Result<PathBuf, Error> {
    Module::new("lkrg").source("lkrg_main", text!("lkrg")).build(tree)
}

/// Builds the livepatch module `vmpatch_own`, which a guest loads itself: `__x64_sys_getppid` by another function that does the same.
/// Returns the `.ko` in the cache.
pub fn own(tree: &KernelTree) -> Result<PathBuf, Error> {
    Module::new("vmpatch_own")
        .source("vmpatch_own", text!("own"))
        .build(tree)
}

/// Builds the livepatch module `test_ioctl`, which replaces `__x64_sys_ioctl`. Returns the `.ko` in the cache.
pub fn ioctl(tree: &KernelTree) -> Result<PathBuf, Error> {
    Module::new("test-ioctl").source("ioctl", text!("ioctl")).build(tree)
}

/// Builds the livepatch module `test_exit_tail`: in its `proc_exit_connector` a task named `exit_tail` sleeps for 25 seconds, when no
/// list of tasks names it any more. Returns the `.ko` in the cache.
pub fn exit_tail(tree: &KernelTree) -> Result<PathBuf, Error> {
    Module::new("test-exit-tail")
        .source("exit_tail", text!("exit_tail"))
        .build(tree)
}

/// The package with what kpatch-build links patches with, and its version.
const KPATCH: (&str, &str) = ("kpatch-build", "0.9.11-1.1");

/// Builds `test-kpatch-hook`: [`Applied::Kpatch`]'s function and table, linked with kpatch-build's own init and exit out of Debian's
/// package, as its Makefile does. Returns the `.ko` in the cache.
pub fn kpatch_hook(tree: &KernelTree) -> Result<PathBuf, Error> {
    let (name, version) = KPATCH;
    let folder = packages::fetch_into(tree.cache(), name, Some(version))?.unpacked()?;
    let read = |file: &str| {
        let path = folder.join("usr/share/kpatch/patch").join(file);
        fs::read_to_string(&path).map_err(cache::Error::io("read", &path))
    };
    Module::new("test-kpatch-hook")
        .source("patch-hook", read("patch-hook.c")?)
        .source("output", text!("kpatch_output"))
        .header("livepatch-patch-hook.c", read("livepatch-patch-hook.c")?)
        .header("kpatch-patch.h", read("kpatch-patch.h")?)
        .header("kpatch_output.h", KPATCH_OUTPUT)
        .linker_script(read("kpatch.lds.S")?)
        .allow_undefined()
        .build(tree)
}

const KPATCH_OUTPUT: &str = include_str!("../../modules/kpatch_output.h");

/// Builds `test_klp_livepatch` of the kernel's own selftests, out of that kernel's source package. Returns the `.ko` in the cache.
pub fn selftest(tree: &KernelTree) -> Result<PathBuf, Error> {
    let (package, version, file) = match tree.release() {
        release if release.starts_with("6.1.") => {
            ("linux-source-6.1", "6.1.192-2", "lib/livepatch/test_klp_livepatch.c")
        }
        _ => (
            "linux-source-7.2",
            "7.2.13-1",
            "tools/testing/selftests/livepatch/test_modules/test_klp_livepatch.c",
        ),
    };
    let path = package::files(tree.cache(), package, version, &[file])?.join(file);
    let text = fs::read_to_string(&path).map_err(cache::Error::io("read", &path))?;
    Module::new("test_klp_livepatch")
        .source("test_klp_livepatch", text)
        .build(tree)
}

/// Builds a module of that name that replaces each of these system calls by a function of its own. Returns the `.ko` in the cache.
pub fn many(tree: &KernelTree, name: &str, functions: &[String]) -> Result<PathBuf, Error> {
    let mut text = "#include \"livepatch.h\"\n\nstatic unsigned long calls;\n".to_owned();
    let mut patches = Vec::new();
    for (index, function) in functions.iter().enumerate() {
        // Each is another function, and none is folded into another one. Writing to a string can't fail.
        let _ = write!(
            text,
            "\nstatic long livepatch_{index}(const struct pt_regs *regs)\n{{\n\tWRITE_ONCE(calls, calls + {index});\n\treturn -ENOSYS;\n}}\n"
        );
        patches.push(format!("PATCH({function}, livepatch_{index})"));
    }
    let _ = write!(text, "\nLIVEPATCH({});\n", patches.join(",\n\t"));
    Module::new(name).source("many", text).build(tree)
}

/// Builds `test_v1`, `test_v2` or `test_v3`, a version of a patch that replaces all others: `__x64_sys_sysinfo`, and in the first one
/// `__x64_sys_getppid`. Returns the `.ko` in the cache.
pub fn version(tree: &KernelTree, version: u32) -> Result<PathBuf, Error> {
    let text = format!("#define VERSION {version}\n{}", text!("version"));
    Module::new(&format!("test-v{version}"))
        .source("version", text)
        .build(tree)
}

/// Builds `test_rusage_pair`: `getrusage` and `thread_group_cputime_adjusted`, which see whether the other one is of their own age, and have ftrace
/// sites. Returns the `.ko` in the cache.
pub fn rusage_pair(tree: &KernelTree) -> Result<PathBuf, Error> {
    Module::new("test-rusage-pair")
        .source("rusage_pair", text!("rusage_pair"))
        .allow_undefined()
        .build(tree)
}

/// A module that is to be applied. Its effect is seen by the program [`Applied::program`] (see [`super::programs`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Applied {
    /// `__do_sys_sysinfo` and `si_meminfo`, which see whether the other one is of their own age.
    Pair,
    /// `__x64_sys_pause`, in which tasks sleep, in the old one as in the new.
    Pause,
    /// `kstrtoint`, which has no ftrace site.
    Kstrtoint,
    /// `__x64_sys_sysinfo`, with livepatch relocations to symbols that are not exported, some of them ambiguous.
    Symbols,
    /// `__x64_sys_sysinfo`, with work for the loader: alternatives, retpolines, SMP locks, paravirt, all kinds of data.
    Sections,
    /// `__x64_sys_pause`, with a static call of the kernel, which goes through its trampoline.
    StaticCall,
    /// `__x64_sys_pause`, described as kpatch-build does it.
    Kpatch,
    /// `__x64_sys_pause`, described as klp-build does it.
    KlpBuild,
    /// `vmpatch_target_get` of the module [`target`], with a variable and an exported function of that module.
    Module,
    /// `vmpatch_target_branch` of the module [`target`], which has a static key's branch behind its ftrace site.
    ModuleBranch,
    /// `__x64_sys_pause`, and `vmpatch_target_get` of the module [`target`].
    ModuleAndImage,
    /// `__x64_sys_sysinfo`, with branches on a static key of the kernel's and on one of its own.
    StaticKey,
    /// `__x64_sys_pause`, with a branch on that key of the kernel's, too.
    StaticKeyToo,
    /// `__x64_sys_sysinfo`, with a line for the kernel's log, in which `vmpatch test: sysinfo of ` and the task's command
    /// stand.
    Printk,
    /// `__x64_sys_sysinfo`, with instructions that may fault on a user's address.
    Faults,
    /// `__x64_sys_sysinfo`, which warns at its first call, and warns again with a text, in which `vmpatch test: `, the task's
    /// command, and `, 42` stand.
    Warns,
    /// `__x64_sys_sysinfo`, whose own code the kernel is given to be called later.
    Outlives,
    /// `__x64_sys_sysinfo`, which takes a reference to its own module at one call, and gives it back at the next.
    References,
}

impl Applied {
    /// All of them.
    pub const ALL: [Self; 18] = [
        Self::Pair,
        Self::Pause,
        Self::Kstrtoint,
        Self::Symbols,
        Self::Sections,
        Self::StaticCall,
        Self::Kpatch,
        Self::KlpBuild,
        Self::Module,
        Self::ModuleBranch,
        Self::ModuleAndImage,
        Self::StaticKey,
        Self::StaticKeyToo,
        Self::Printk,
        Self::Faults,
        Self::Warns,
        Self::Outlives,
        Self::References,
    ];

    /// The program that sees its effect.
    pub fn program(self) -> &'static str {
        match self {
            Self::StaticCall | Self::Kpatch | Self::KlpBuild | Self::ModuleAndImage | Self::StaticKeyToo => {
                Self::Pause.name()
            }
            _ => self.name(),
        }
    }

    /// The name.
    pub fn name(self) -> &'static str {
        self.name_and_text().0
    }

    /// The functions that it replaces.
    pub fn functions(self) -> &'static [&'static str] {
        match self {
            Self::Pair => &["__do_sys_sysinfo", "si_meminfo"],
            Self::Pause | Self::StaticCall | Self::Kpatch | Self::KlpBuild | Self::StaticKeyToo => &["__x64_sys_pause"],
            Self::Kstrtoint => &["kstrtoint"],
            Self::Module => &["vmpatch_target_get"],
            Self::ModuleBranch => &["vmpatch_target_branch"],
            Self::ModuleAndImage => &["__x64_sys_pause", "vmpatch_target_get"],
            Self::Symbols
            | Self::Sections
            | Self::StaticKey
            | Self::Printk
            | Self::Faults
            | Self::Warns
            | Self::Outlives
            | Self::References => &["__x64_sys_sysinfo"],
        }
    }

    /// Builds the module for that kernel. Returns the `.ko` in the cache.
    pub fn build(self, tree: &KernelTree) -> Result<PathBuf, Error> {
        let (name, text) = self.name_and_text();
        let module = Module::new(&format!("test-{}", name.replace('_', "-"))).source(name, text);
        let module = if matches!(
            self,
            Self::Symbols
                | Self::Kpatch
                | Self::KlpBuild
                | Self::Module
                | Self::ModuleAndImage
                | Self::StaticKey
                | Self::StaticKeyToo
        ) {
            module.allow_undefined()
        } else {
            module
        };
        let module = match self {
            Self::Kpatch => module.header("kpatch_output.h", KPATCH_OUTPUT),
            Self::Sections => module.header("vmpatch_trace.h", include_str!("../../modules/vmpatch_trace.h")),
            _ => module,
        };
        module.build(tree)
    }

    fn name_and_text(self) -> (&'static str, &'static str) {
        match self {
            Self::Pair => ("pair", text!("pair")),
            Self::Pause => ("pause", text!("pause")),
            Self::Kstrtoint => ("kstrtoint", text!("kstrtoint")),
            Self::Symbols => ("symbols", text!("symbols")),
            Self::Sections => ("sections", text!("sections")),
            Self::StaticCall => ("static_call", text!("static_call")),
            Self::Kpatch => ("kpatch", text!("kpatch")),
            Self::Module => ("module", text!("module")),
            Self::ModuleBranch => ("module_branch", text!("module_branch")),
            Self::StaticKey => ("static_key", text!("static_key")),
            Self::StaticKeyToo => ("static_key_too", text!("static_key_too")),
            Self::ModuleAndImage => ("module_and_image", text!("module_and_image")),
            Self::KlpBuild => ("klp_build", text!("klp_build")),
            Self::Printk => ("printk", text!("printk")),
            Self::Faults => ("faults", text!("faults")),
            Self::Warns => ("warns", text!("warns")),
            Self::Outlives => ("outlives", text!("outlives")),
            Self::References => ("references", text!("references")),
        }
    }
}

/// A module that is to be refused by name, the guest untouched. A module for another release than the guest's is any of
/// the others, built for another kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// Calls `vmpatch_test_missing`, which no kernel has.
    Unresolved,
    /// Patches `vmpatch_test_missing`, which no kernel has.
    Missing,
    /// Patches `c_start`, of which there are three, without a position.
    Ambiguous,
    /// Patches the 99th `c_start`.
    NoSuchPosition,
    /// Patches `srso_untrain_ret`, which has two bytes.
    TooShort,
    /// Has more variables on each CPU than there is memory for.
    PercpuData,
    /// Wants a callback to run before it is applied.
    Callbacks,
    /// Has six megabytes of code.
    TooBig,
    /// Is a module, but no livepatch.
    NoLivepatch,
    /// Looks a symbol up in its init, with `register_kprobe`.
    InitLookup,
    /// Initialises the list `vmpatch_test_list` in its init.
    InitList,
    /// Calls `register_reboot_notifier` in its init.
    InitNotifier,
    /// Chooses in its init, by `__num_online_cpus`, which function to enable.
    InitCondition,
    /// Calls `cancel_delayed_work_sync` in its exit.
    ExitWork,
}

impl Refused {
    /// All of them.
    pub const ALL: [Self; 14] = [
        Self::Unresolved,
        Self::Missing,
        Self::Ambiguous,
        Self::NoSuchPosition,
        Self::TooShort,
        Self::PercpuData,
        Self::Callbacks,
        Self::TooBig,
        Self::NoLivepatch,
        Self::InitLookup,
        Self::InitList,
        Self::InitNotifier,
        Self::InitCondition,
        Self::ExitWork,
    ];

    /// Builds the module for that kernel. Returns the `.ko` in the cache.
    pub fn build(self, tree: &KernelTree) -> Result<PathBuf, Error> {
        let (name, text) = self.name_and_text();
        let module = Module::new(&format!("refused-{}", name.replace('_', "-"))).source(name, text);
        let module = match self {
            Self::Unresolved => module.allow_undefined(),
            Self::TooBig => module.unchecked_source("too_big_text", text!("refused/too_big_text")),
            Self::InitLookup | Self::InitList | Self::InitNotifier | Self::InitCondition | Self::ExitWork => {
                module.header("with_init.h", include_str!("../../modules/refused/with_init.h"))
            }
            _ => module,
        };
        module.build(tree)
    }

    fn name_and_text(self) -> (&'static str, &'static str) {
        match self {
            Self::Unresolved => ("unresolved", text!("refused/unresolved")),
            Self::Missing => ("missing", text!("refused/missing")),
            Self::Ambiguous => ("ambiguous", text!("refused/ambiguous")),
            Self::NoSuchPosition => ("no_such_position", text!("refused/no_such_position")),
            Self::TooShort => ("too_short", text!("refused/too_short")),
            Self::PercpuData => ("percpu_data", text!("refused/percpu_data")),
            Self::Callbacks => ("callbacks", text!("refused/callbacks")),
            Self::TooBig => ("too_big", text!("refused/too_big")),
            Self::NoLivepatch => ("no_livepatch", text!("refused/no_livepatch")),
            Self::InitLookup => ("init_lookup", text!("refused/init_lookup")),
            Self::InitList => ("init_list", text!("refused/init_list")),
            Self::InitNotifier => ("init_notifier", text!("refused/init_notifier")),
            Self::InitCondition => ("init_condition", text!("refused/init_condition")),
            Self::ExitWork => ("exit_work", text!("refused/exit_work")),
        }
    }
}
