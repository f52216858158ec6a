//! What goes into guests: programs for them, and livepatch modules for their kernels, each built once and kept.

use std::path::PathBuf;
use std::sync::LazyLock;

use images::build::hand_written::{self, Applied, Refused};
use images::build::{Cve, KernelTree, programs};
use images::cache::Cache;
use images::guest::{GuestConfig, QmpSpelling, Ram};
use images::kernel::Kernel;

/// A guest of that kernel as most tests want it: two vCPUs, shared RAM, two QMP sockets (the first for vmpatch, the second
/// for the test), and all programs.
///
/// # Panics
///
/// If the programs can't be built.
pub fn guest(kernel: Kernel) -> GuestConfig {
    let config = GuestConfig {
        qmp: vec![QmpSpelling::Qmp; 2],
        ..GuestConfig::new(kernel)
    };
    PROGRAMS
        .iter()
        .fold(config.vcpus(2).ram(Ram::SharedMemfd), |config, program| {
            let name = program.file_name().unwrap_or_default().to_string_lossy();
            config.file(&format!("/opt/{name}"), program)
        })
}

static PROGRAMS: LazyLock<Vec<PathBuf>> = LazyLock::new(|| {
    let cache = Cache::from_env().expect("there is a cache");
    let folder = programs::build(&cache).expect("the programs build");
    let entries = std::fs::read_dir(folder).expect("the folder of programs can be read");
    let mut programs: Vec<_> = entries.map(|entry| entry.expect("its entries, too").path()).collect();
    programs.sort();
    programs
});

/// Livepatch modules for one kernel, as paths.
pub struct Modules {
    tree: KernelTree,
}

impl Modules {
    /// For that kernel.
    ///
    /// # Panics
    ///
    /// If its headers can't be had; so for every method here.
    pub fn of(kernel: &Kernel) -> Self {
        let cache = Cache::from_env().expect("there is a cache");
        let release = kernel.fetch().expect("the kernel can be fetched").release;
        Self {
            tree: KernelTree::fetch(&cache, &release, kernel.version()).expect("its headers can be fetched"),
        }
    }

    /// The published fix.
    pub fn cve(&self, cve: Cve) -> String {
        text(cve.module(&self.tree).expect("the fix builds"))
    }

    /// One of our own that is to be applied.
    pub fn applied(&self, module: Applied) -> String {
        text(module.build(&self.tree).expect("the module builds"))
    }

    /// The ordinary module that patches of modules are for.
    pub fn target(&self) -> PathBuf {
        hand_written::target(&self.tree).expect("the module builds")
    }

    /// The ordinary module that needs much per-CPU memory.
    pub fn percpu(&self) -> PathBuf {
        hand_written::percpu(&self.tree).expect("the module builds")
    }

    /// The ordinary module that has an integrity guard's name and settings.
    pub fn lkrg(&self) -> PathBuf {
        hand_written::lkrg(&self.tree).expect("the module builds")
    }

    /// The livepatch that a guest loads itself.
    pub fn own_livepatch(&self) -> PathBuf {
        hand_written::own(&self.tree).expect("the module builds")
    }

    /// The one in which a task sleeps at its end.
    pub fn exit_tail(&self) -> String {
        text(hand_written::exit_tail(&self.tree).expect("the module builds"))
    }

    /// The one that replaces ioctl(), in which the threads of hypervisors are.
    pub fn ioctl(&self) -> String {
        text(hand_written::ioctl(&self.tree).expect("the module builds"))
    }

    /// One that replaces each of these system calls.
    pub fn many(&self, functions: &[String]) -> String {
        text(hand_written::many(&self.tree, "test-many", functions).expect("the module builds"))
    }

    /// One for each of these system calls, which replaces that one.
    pub fn one_each(&self, functions: &[String]) -> Vec<String> {
        let module = |(number, function): (usize, &String)| {
            let name = format!("test-one-{number}");
            text(hand_written::many(&self.tree, &name, std::slice::from_ref(function)).expect("the module builds"))
        };
        functions.iter().enumerate().map(module).collect()
    }

    /// That version, from 1 to 3, of a patch that replaces all others.
    pub fn version(&self, version: u32) -> String {
        text(hand_written::version(&self.tree, version).expect("the module builds"))
    }

    /// Two functions with ftrace sites that see whether the other one is of their own age.
    pub fn rusage_pair(&self) -> String {
        text(hand_written::rusage_pair(&self.tree).expect("the module builds"))
    }

    /// With the init and exit of kpatch-build itself.
    pub fn kpatch_hook(&self) -> String {
        text(hand_written::kpatch_hook(&self.tree).expect("the module builds"))
    }

    /// `test_klp_livepatch` of the kernel's selftests.
    pub fn selftest(&self) -> String {
        text(hand_written::selftest(&self.tree).expect("the module builds"))
    }

    /// One of our own that is to be refused.
    pub fn refused(&self, module: Refused) -> String {
        text(module.build(&self.tree).expect("the module builds"))
    }
}

fn text(path: PathBuf) -> String {
    path.into_os_string().into_string().expect("the cache's path is UTF-8")
}
