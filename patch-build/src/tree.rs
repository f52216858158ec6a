//! A kernel's source made ready to compile single files of it: configured, its generated headers and tools built, and
//! nothing else.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use crate::assembler;
use crate::cache::{self, Cache, Lock};
use crate::facts::Config;
use crate::kept::{Kept, Parts};
use crate::target::Target;
use crate::toolchain::{self, Toolchain};
use crate::{command, digest, objtool, seal};

/// What the kernel's own flags are extended with: a section for every function and object, so that they can be compared
/// and taken one by one.
pub(crate) const SECTIONS: [&str; 2] = ["-ffunction-sections", "-fdata-sections"];
/// What settings begin with that say something of the tools on the machine that made the configuration. Where they differ, so may
/// code that asks for them, which is then not compiled; see [`Tree::other_settings`].
const OF_THE_TOOLS: [&str; 7] = [
    "BINDGEN_",
    "CC_CAN_LINK",
    "LD_VERSION",
    "OPENSSL_",
    "PAHOLE_",
    "RUST",
    "HAVE_RUST",
];
/// The folder with the assembler that keeps names.
const ASSEMBLER: &str = "vmpatch-assembler";
/// Where a tree notes what `vermagic=` of its modules is.
const VERMAGIC: &str = "vmpatch-vermagic";
/// What decides how files compile and is made once: sealed when the tree is ready, and looked at before each build.
const SEALED: [&str; 10] = [
    ".config",
    "Makefile",
    "Module.symvers",
    "arch/x86/include",
    "include",
    "scripts",
    "source",
    "tools",
    ASSEMBLER,
    VERMAGIC,
];
/// The folder with what was made with the tree.
const KEPT: &str = "vmpatch-kept";
/// A copy of a tree without its objects, for a run of make that makes nothing.
const DRY: &str = "vmpatch-dry";

/// Why a tree could not be made ready.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The cache could not be used.
    #[error(transparent)]
    Cache(#[from] cache::Error),
    /// A program of the host failed.
    #[error(transparent)]
    Command(#[from] command::Error),
    /// There is no compiler like the one that made the kernel.
    #[error(transparent)]
    Toolchain(#[from] toolchain::Error),
    /// The source does not take the configuration as it is.
    #[error(
        "{}: the source would change the kernel's configuration: {changes} (is it the kernel's own source, and are \
         the programs that its configuration asks for installed: pahole of package dwarves?)",
        source_folder.display()
    )]
    Config {
        /// The source.
        source_folder: PathBuf,
        /// The first settings that differ.
        changes: String,
    },
    /// The tree does not say what its modules' `vermagic=` is.
    #[error("{}: no version string of modules in what was compiled", tree.display())]
    NoVermagic {
        /// The tree.
        tree: PathBuf,
    },
}

/// A prepared tree. Only one process at a time has it.
#[derive(Debug)]
pub struct Tree {
    folder: PathBuf,
    source: PathBuf,
    make: Vec<String>,
    compiler: String,
    search_path: String,
    vermagic: String,
    other_settings: Vec<String>,
    /// None where the source can change.
    kept: Option<Kept>,
    /// Names the compiler, the assembler and objtool as they are.
    tools: String,
    _lock: Lock,
}

impl Tree {
    /// The tree for that kernel, made ready unless it is in the cache. Waits while another process builds with it.
    ///
    /// `progress` is told what takes time.
    pub fn prepare(cache: &Cache, target: &Target, progress: &dyn Fn(&str)) -> Result<Self, Error> {
        let toolchain = Toolchain::fetch(cache, &target.release, &target.config)?;
        let compiler = toolchain.program();
        let io = |action| cache::Error::io(action, &target.config);
        let config = fs::read_to_string(&target.config).map_err(io("read"))?;
        let makefile = target.source.folder.join("scripts/Makefile.build");
        let makefile = fs::read_to_string(&makefile).map_err(cache::Error::io("read", &makefile))?;
        let objtool = objtool::variables(&Config::parse(&config), &makefile);
        let mut made_of = vec![&*target.source.id, &config, toolchain.version(), assembler::SCRIPT];
        made_of.extend(&objtool);
        let id = digest(&made_of);
        let lock = cache.lock_or_wait(&format!("builds/{}_{id}", target.release), || {
            progress(&format!("waiting for another build for {}", target.release));
        })?;
        let folder = lock.entry().to_owned();
        let mut make = vec![
            format!("KERNELRELEASE={}", target.release),
            format!("CC={}", compiler),
            format!("HOSTCC={}", host_compiler(&toolchain)),
            format!("KCFLAGS={}", SECTIONS.join(" ")),
        ];
        // With it make builds and checks a tool that only the linking of a whole kernel takes (resolve_btfids, with all of libbpf).
        // C files see the setting as it is.
        make.push("CONFIG_DEBUG_INFO_BTF=".to_owned());
        // A Rust compiler that the kernel's makers had not would change the configuration.
        if Config::parse(&config)
            .value("RUSTC_VERSION")
            .is_none_or(|version| version == "0")
        {
            make.push("RUSTC=false".to_owned());
        }
        make.extend(objtool.iter().map(|variable| (*variable).to_owned()));
        // As make spells it, where the cache is behind a link: commands that make notes down are changed by it later.
        let source = &target.source.folder;
        let source = fs::canonicalize(source).map_err(cache::Error::io("find", source))?;
        let mut tree = Self {
            folder,
            source,
            make,
            compiler: toolchain.version().to_owned(),
            search_path: toolchain.search_path(),
            vermagic: String::new(),
            other_settings: Vec::new(),
            kept: None,
            tools: String::new(),
            _lock: lock,
        };
        tree.kept = target.source.fixed.then(|| Kept::at(tree.folder.join(KEPT)));
        if let Some(changed) = tree.not_as_it_was(&config) {
            if seal::has(&tree.folder) {
                progress(&format!(
                    "{changed} of the prepared source is not what it was: preparing it anew"
                ));
            }
            tree.make_ready(target, &config, progress)?;
        }
        tree.other_settings = tree.compare_settings(&config)?;
        let vermagic = tree.folder.join(VERMAGIC);
        tree.vermagic = fs::read_to_string(&vermagic).map_err(cache::Error::io("read", &vermagic))?;
        tree.tools = tree.name_tools();
        Ok(tree)
    }

    /// One in which nothing is, with an empty source, both in that folder.
    #[cfg(test)]
    pub(crate) fn bare(root: &Path) -> Self {
        let lock = Cache::at(root).lock("tree").unwrap();
        let (folder, source) = (root.join("tree"), root.join("source"));
        for folder in [&folder, &source] {
            fs::create_dir(folder).unwrap();
        }
        Self {
            folder,
            source,
            make: Vec::new(),
            compiler: "gcc".to_owned(),
            search_path: std::env::var("PATH").unwrap(),
            vermagic: String::new(),
            other_settings: Vec::new(),
            kept: None,
            tools: String::new(),
            _lock: lock,
        }
    }

    /// The kernel's source.
    pub fn source(&self) -> &Path {
        &self.source
    }

    /// Where the generated headers and the objects are.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The kernel's compiler: the first line of its `--version`.
    pub fn compiler(&self) -> &str {
        &self.compiler
    }

    /// What a module's `vermagic=` must be.
    pub fn vermagic(&self) -> &str {
        &self.vermagic
    }

    /// Settings of the kernel's tools that are others here (`RUST`, without `CONFIG_`): code that asks for them is not the kernel's.
    pub(crate) fn other_settings(&self) -> &[String] {
        &self.other_settings
    }

    /// Whether the source can't change: it is the cache's own.
    pub(crate) fn is_fixed(&self) -> bool {
        self.kept.is_some()
    }

    /// What was made of these parts with the tree's tools, if that is kept; `None`, too, where the source can change.
    pub(crate) fn kept(&self, parts: &[&[u8]]) -> Option<Parts> {
        self.kept.as_ref()?.get(&self.key(parts))
    }

    /// Keeps what was made of these parts and of `inputs`, unless the source can change.
    pub(crate) fn keep(&self, parts: &[&[u8]], inputs: &[PathBuf], made: &[&[u8]]) -> Result<(), cache::Error> {
        match &self.kept {
            Some(kept) => kept.put(&self.key(parts), inputs, made),
            None => Ok(()),
        }
    }

    fn key<'k>(&'k self, parts: &[&'k [u8]]) -> Vec<&'k [u8]> {
        let own = [self.compiler.as_bytes(), self.tools.as_bytes()];
        own.into_iter().chain(parts.iter().copied()).collect()
    }

    /// Each program that makes an object, where it is found, its size and when it was changed.
    fn name_tools(&self) -> String {
        let compiler = self.compiler.split(' ').next().unwrap_or_default();
        let found = |name: &str| {
            let mut folders = self.search_path.split(':').map(Path::new);
            folders.find_map(|folder| fs::canonicalize(folder.join(name)).ok())
        };
        let own = ["tools/objtool/objtool", "vmpatch-assembler/as"].map(|name| Some(self.folder.join(name)));
        let programs = [found(compiler), found("as")].into_iter().chain(own).flatten();
        let named = programs.map(|path| {
            let about = fs::metadata(&path).ok();
            let changed = about.as_ref().and_then(|about| about.modified().ok());
            format!("{} {:?} {changed:?}\n", path.display(), about.map(|about| about.len()))
        });
        named.collect()
    }

    /// Runs make in the source for `goals`, with the tools of that `PATH`.
    pub(crate) fn make(&self, search_path: &str, goals: &[&str]) -> Result<(), command::Error> {
        let args = self.make_args(search_path, &format!("O={}", self.folder.display()));
        let mut args: Vec<&str> = args.iter().map(String::as_str).collect();
        args.push("-s");
        args.extend(goals);
        command::output("env", &args, &self.source).map(drop)
    }

    /// Makes objects of the kernel's own C files, in which every reference names what is meant.
    pub(crate) fn compile(&self, goals: &[&str]) -> Result<(), command::Error> {
        self.make(&self.naming_path(), goals)
    }

    /// What make says that it would run for the whole kernel, were there no object yet, and the end of its complaints: of files that
    /// only a whole build has, so that they are no error.
    pub(crate) fn dry_run(&self) -> Result<(Vec<u8>, String), Error> {
        /// What a prepared tree has beside objects of the kernel. What make would make anew it would not look behind.
        const PREPARED: &str = "for one in .config Makefile Module.symvers source scripts tools include arch/x86/include; do \
            [ ! -e \"$one\" ] || { mkdir -p \"$0/$(dirname \"$one\")\"; cp -a \"$one\" \"$0/$one\"; }; done";
        let dry = self.folder.join(DRY);
        let io = |action| cache::Error::io(action, &dry);
        if dry.exists() {
            fs::remove_dir_all(&dry).map_err(io("remove what an interrupted run left in"))?;
        }
        command::output("sh", &["-ec", PREPARED, &dry.to_string_lossy()], &self.folder)?;
        let complaints = dry.join("vmpatch-complaints");
        let script = "file=$1; shift; \"$@\" 2>\"$file\" || :";
        let complaints_path = complaints.to_string_lossy();
        let mut args = vec!["-c", script, "sh", &complaints_path];
        let output = format!("O={}", dry.display());
        let make = self.make_args(&self.search_path, &output);
        args.push("env");
        args.extend(make.iter().map(String::as_str));
        // What is said of one file stays together.
        args.extend(["-Otarget", "-n", "-k", "vmlinux", "modules"]);
        let said = command::output("sh", &args, &self.source)?;
        let complaints = fs::read(&complaints).map_err(cache::Error::io("read", &complaints))?;
        fs::remove_dir_all(&dry).map_err(io("remove"))?;
        let said = String::from_utf8_lossy(&said).replace(&*dry.to_string_lossy(), &self.folder.to_string_lossy());
        Ok((said.into_bytes(), command::tail(&complaints)))
    }

    /// The arguments of `env` that run make, with that `O=`. Where this runs under another make, that one's flags are none of ours.
    fn make_args(&self, search_path: &str, output: &str) -> Vec<String> {
        let jobs = std::thread::available_parallelism().map_or(1, usize::from);
        let own = ["-u", "MAKEFLAGS", "-u", "MFLAGS"].map(str::to_owned);
        let mut args = own.to_vec();
        args.extend([
            format!("PATH={search_path}"),
            "make".to_owned(),
            format!("-j{jobs}"),
            output.to_owned(),
        ]);
        args.extend(self.make.iter().cloned());
        args
    }

    /// The value of `PATH` with which the kernel's build finds its compiler, assembler and linker.
    pub(crate) fn search_path(&self) -> &str {
        &self.search_path
    }

    /// Runs a shell command in the tree's folder, as the build would.
    pub(crate) fn shell(&self, text: &str) -> Result<(), command::Error> {
        self.run(&self.search_path, text)
    }

    /// As [`Tree::shell`], for a command that makes objects as [`Tree::compile`] does.
    pub(crate) fn compile_by(&self, text: &str) -> Result<(), command::Error> {
        self.run(&self.naming_path(), text)
    }

    fn run(&self, search_path: &str, text: &str) -> Result<(), command::Error> {
        let path = format!("PATH={search_path}");
        command::output("env", &[&path, "sh", "-ec", text], &self.folder).map(drop)
    }

    /// The value of `PATH` with which the assembler keeps names.
    fn naming_path(&self) -> String {
        format!("{}:{}", self.folder.join(ASSEMBLER).display(), self.search_path)
    }

    fn make_ready(&self, target: &Target, config: &str, progress: &dyn Fn(&str)) -> Result<(), Error> {
        let io = |action| cache::Error::io(action, &self.folder);
        if self.folder.exists() {
            fs::remove_dir_all(&self.folder).map_err(io("remove what an interrupted run left in"))?;
        }
        fs::create_dir(&self.folder).map_err(io("make the folder"))?;
        progress(&format!("preparing the source of {}", target.release));
        let own = self.folder.join(".config");
        fs::write(&own, config).map_err(cache::Error::io("write", &own))?;
        let symvers = self.folder.join("Module.symvers");
        fs::copy(&target.symvers, &symvers).map_err(cache::Error::io("copy to", &symvers))?;
        assembler::write(&self.folder.join(ASSEMBLER))?;
        self.make(&self.search_path, &["olddefconfig"])?;
        self.compare_settings(config)?;
        if self.make.iter().any(|word| word == objtool::AT_ONCE) {
            // Objects that are made on the way to `modules_prepare` do not wait for it.
            self.make(&self.search_path, &["tools/objtool"])?;
        }
        self.make(&self.search_path, &["modules_prepare"])?;
        let vermagic = self.read_vermagic()?;
        let file = self.folder.join(VERMAGIC);
        fs::write(&file, vermagic).map_err(cache::Error::io("write", &file))?;
        seal::seal(&self.folder, &SEALED)?;
        Ok(())
    }

    /// What of a tree in the cache is not what it was when it was made, so that files would compile otherwise; all of it where it is not
    /// ready.
    fn not_as_it_was(&self, config: &str) -> Option<String> {
        if let Err(error) = self.compare_settings(config) {
            return Some(match error {
                Error::Config { changes, .. } => format!(".config ({changes})"),
                _ => ".config".to_owned(),
            });
        }
        seal::broken(&self.folder)
    }

    /// Compares the tree's configuration with the kernel's own: the settings of the tools that differ, by name.
    ///
    /// Errors: others differ, too.
    fn compare_settings(&self, config: &str) -> Result<Vec<String>, Error> {
        let own = self.folder.join(".config");
        let taken = fs::read_to_string(&own).map_err(cache::Error::io("read", &own))?;
        let (of_tools, others): (Vec<Change>, Vec<Change>) = changes(config, &taken)
            .into_iter()
            .partition(|change| is_of_the_tools(&change.name));
        if !others.is_empty() {
            return Err(Error::Config {
                source_folder: self.source.clone(),
                changes: named(&others),
            });
        }
        Ok(of_tools.into_iter().map(|change| change.name).collect())
    }

    /// Lets the kernel's own headers say what `vermagic=` is (include/linux/vermagic.h).
    fn read_vermagic(&self) -> Result<String, Error> {
        const BEFORE: &str = "vermagic=";
        let text = "#define INCLUDE_VERMAGIC\n#include <linux/vermagic.h>\n\
                    const char vmpatch_vermagic[] = \"vermagic=\" VERMAGIC_STRING;\n";
        let object = self.compile_extra("vmpatch_vermagic", text)?;
        let string = find(&object, BEFORE.as_bytes()).and_then(|rest| rest.split(|byte| *byte == 0).next());
        string
            .and_then(|string| String::from_utf8(string.to_vec()).ok())
            .ok_or_else(|| Error::NoVermagic {
                tree: self.folder.clone(),
            })
    }
}

/// The compiler for the build's own tools, which run on this machine: any that is made for it, with this machine's own assembler and
/// linker, as those of another release may not read its libraries.
fn host_compiler(toolchain: &Toolchain) -> String {
    const CANDIDATES: [&str; 3] = ["gcc", "cc", "gcc-12"];
    let works = |program: &&str| command::output(program, &["--version"], Path::new("/")).is_ok();
    let program = if toolchain.is_own() {
        toolchain.program()
    } else {
        CANDIDATES.into_iter().find(works).unwrap_or("gcc")
    };
    match toolchain.passed_over() {
        Some(folder) => format!("{program} -B{}/", folder.display()),
        None => program.to_owned(),
    }
}

/// What follows `needle`.
fn find<'a>(bytes: &'a [u8], needle: &[u8]) -> Option<&'a [u8]> {
    let at = bytes.windows(needle.len()).position(|window| window == needle)?;
    bytes.get(at + needle.len()..)
}

/// A setting that differs.
#[derive(Debug, PartialEq, Eq)]
struct Change {
    /// Without `CONFIG_`.
    name: String,
    before: Option<String>,
    after: Option<String>,
}

/// The settings that differ between two configurations, by name.
fn changes(before: &str, after: &str) -> Vec<Change> {
    let settings = |text: &str| -> BTreeMap<String, String> {
        let setting = |line: &str| {
            let (name, value) = line.strip_prefix("CONFIG_")?.split_once('=')?;
            Some((name.to_owned(), value.to_owned()))
        };
        text.lines().filter_map(setting).collect()
    };
    let (before, after) = (settings(before), settings(after));
    let names: BTreeSet<&String> = before.keys().chain(after.keys()).collect();
    let change = |name: &String| {
        let (before, after) = (before.get(name), after.get(name));
        (before != after).then(|| Change {
            name: name.clone(),
            before: before.cloned(),
            after: after.cloned(),
        })
    };
    names.into_iter().filter_map(change).collect()
}

fn is_of_the_tools(name: &str) -> bool {
    OF_THE_TOOLS.iter().any(|prefix| name.starts_with(prefix))
}

/// The first changes, for people.
fn named(changes: &[Change]) -> String {
    const SHOWN_MAX: usize = 5;
    let named = |change: &Change| {
        let value = |value: &Option<String>| value.as_deref().unwrap_or("none").to_owned();
        format!(
            "{} from {} to {}",
            change.name,
            value(&change.before),
            value(&change.after)
        )
    };
    changes.iter().take(SHOWN_MAX).map(named).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_that_the_source_would_change_are_named_with_both_values() {
        let before = "# Linux/x86 6.1\nCONFIG_A=y\nCONFIG_B=2\n";
        let same = "# Linux/x86 6.1.1\nCONFIG_B=2\nCONFIG_A=y\n# CONFIG_C is not set\n";
        assert_eq!(changes(before, same), []);
        let other = changes(before, "CONFIG_A=y\nCONFIG_B=3\nCONFIG_C=m\n");
        assert_eq!(named(&other), "B from 2 to 3, C from none to m");
    }

    #[test]
    fn settings_of_the_tools_are_told_from_the_kernels() {
        for name in [
            "RUST_IS_AVAILABLE",
            "LD_VERSION",
            "PAHOLE_VERSION",
            "CC_CAN_LINK_STATIC",
        ] {
            assert!(is_of_the_tools(name), "{name}");
        }
        for name in ["LD_ORPHAN_WARN", "CC_VERSION_TEXT", "TRUSTED_KEYS"] {
            assert!(!is_of_the_tools(name), "{name}");
        }
    }
}
