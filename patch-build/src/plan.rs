//! Which files the kernel's own build makes objects of, and with which command: what a run of make says that makes nothing.
//!
//! No list of folders or of names can say so: a folder's Makefile takes files of others, files are made by programs of the build,
//! and one file may be compiled more than once.

use std::collections::{BTreeSet, HashSet};
use std::path::Path;

use crate::compile::command::SavedCommand;
use crate::tree::{self, Tree};
use crate::{cache, seal};

/// The note of a tree with what make said. In files of lower numbers commands of 7.2 are not whole, or no digest is.
const FILE: &str = "vmpatch-plan-3";

/// Why it could not be told.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The cache could not be used.
    #[error(transparent)]
    Cache(#[from] cache::Error),
    /// Make could not be started.
    #[error("asking the kernel's build which files it compiles")]
    Make(#[from] tree::Error),
    /// Make said less than the whole build.
    #[error("the kernel's build does not say how it makes {missing}, which kernel {release} has: {said}")]
    Incomplete {
        /// A module, or a file of the kernel itself.
        missing: String,
        /// The kernel's release.
        release: String,
        /// The end of make's complaints.
        said: String,
    },
}

/// An object that the kernel's build makes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Planned {
    /// The object, relative to the tree, as make spells it: `arch/x86/kvm/../../../virt/kvm/kvm_main.o`.
    pub object: String,
    /// What it is made of: relative to the source, or to the tree if `made`; without `..`.
    pub source: String,
    /// Whether the build makes that file, too.
    pub made: bool,
    /// How.
    pub(crate) command: SavedCommand,
}

impl Planned {
    /// The module that the object is linked into; `None` for the kernel itself.
    pub fn module(&self) -> Option<&str> {
        self.command.module()
    }

    /// Whether the object's code is the running kernel's.
    pub fn is_of_running_kernel(&self) -> bool {
        self.source.ends_with(".S") || self.command.is_of_running_kernel()
    }

    /// Whether the object has its file's name.
    pub fn is_named_after_source(&self) -> bool {
        let stem = self
            .source
            .rsplit_once('.')
            .map_or(self.source.as_str(), |(stem, _)| stem);
        plain(&self.object).is_some_and(|object| object.strip_suffix(".o") == Some(stem))
    }
}

/// What the kernel's build would do.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// The objects made of C files and of assembly.
    pub objects: Vec<Planned>,
    made: HashSet<String>,
}

impl Plan {
    /// The plan of the kernel that the tree is of; `modules` are the names of those that the kernel has. Asked for once where the
    /// source can't change.
    ///
    /// `progress` is told what takes time.
    pub fn of(tree: &Tree, release: &str, modules: &[String], progress: &dyn Fn(&str)) -> Result<Self, Error> {
        if let Some(text) = seal::note(tree.folder(), FILE).filter(|_| tree.is_fixed()) {
            return Ok(Self::parse(&text, tree.source()));
        }
        progress("asking the kernel's build which files it compiles");
        let (said, complaints) = tree.dry_run()?;
        let text = noted(&String::from_utf8_lossy(&said));
        let plan = Self::parse(&text, tree.source());
        if let Some(missing) = plan.lacks(modules) {
            return Err(Error::Incomplete {
                missing,
                release: release.to_owned(),
                said: complaints,
            });
        }
        seal::write_note(tree.folder(), FILE, &text)?;
        Ok(plan)
    }

    /// Whether the build makes that file (relative to the tree).
    pub fn makes(&self, file: &str) -> bool {
        self.made.contains(file)
    }

    /// The first of the kernel's modules, or of files that every kernel has, that the plan knows nothing of.
    fn lacks(&self, modules: &[String]) -> Option<String> {
        const EVERY_KERNEL: [&str; 5] = [
            "init/main.c",
            "kernel/fork.c",
            "mm/memory.c",
            "fs/open.c",
            "arch/x86/kernel/traps.c",
        ];
        let known: BTreeSet<&str> = self.objects.iter().filter_map(Planned::module).collect();
        let sources: BTreeSet<&str> = self.objects.iter().map(|planned| planned.source.as_str()).collect();
        let module = modules.iter().find(|name| !known.contains(name.as_str())).cloned();
        module.or_else(|| {
            let file = EVERY_KERNEL.into_iter().find(|file| !sources.contains(file));
            file.map(str::to_owned)
        })
    }

    /// Reads what [`noted`] wrote.
    pub(crate) fn parse(text: &str, source: &Path) -> Self {
        let root = format!("{}/", source.display());
        let mut plan = Self::default();
        for line in text.lines() {
            match line.split_once('\t') {
                Some(("made", file)) => drop(plan.made.insert(file.to_owned())),
                Some(("object", rest)) => plan.objects.extend(planned(rest, &root)),
                _ => {}
            }
        }
        plan
    }
}

fn planned(rest: &str, root: &str) -> Option<Planned> {
    let (object, rest) = rest.split_once('\t')?;
    let (source, command) = rest.split_once('\t')?;
    let (source, made) = match source.strip_prefix(root) {
        Some(source) => (source, false),
        None if source.starts_with('/') => return None,
        None => (source, true),
    };
    Some(Planned {
        object: object.to_owned(),
        source: plain(source)?,
        made,
        command: SavedCommand::new(object, command),
    })
}

/// A relative path without `.` and `..`; `None` where it leads out of its root.
pub(crate) fn plain(path: &str) -> Option<String> {
    let mut parts: Vec<&str> = Vec::new();
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => drop(parts.pop()?),
            part => parts.push(part),
        }
    }
    Some(parts.join("/"))
}

/// What the plan needs of all that make said: a line for each object (`object`, its name, its source, the command), and one for
/// each file that is named and is not of the source (`made`).
///
/// scripts/Makefile.build of 6.1 compiles with `cmd; scripts/basic/fixdep DEPENDENCIES OBJECT 'cmd' > …` on one line, behind traps; 7.2
/// has `./scripts/basic/fixdep`.
fn noted(said: &str) -> String {
    let mut objects = String::new();
    let mut made: BTreeSet<&str> = BTreeSet::new();
    for line in said.lines() {
        let line = line
            .split_once("scripts/basic/fixdep ")
            .map_or(line, |(command, _)| command.strip_suffix("./").unwrap_or(command));
        if let Some((object, source, command)) = compilation(line) {
            objects.push_str(&format!("object\t{object}\t{source}\t{command}\n"));
            made.extend(relative(source));
        } else {
            let words = line.split(|c: char| c.is_whitespace() || "'\"();>=<,".contains(c));
            made.extend(words.filter_map(relative));
        }
    }
    let made = made.iter().map(|file| format!("made\t{file}\n"));
    made.chain([objects]).collect()
}

/// A word that may be a file that others include: relative, in a folder, and no object.
fn relative(word: &str) -> Option<&str> {
    let word = word.strip_prefix("./").unwrap_or(word);
    let name = word.rsplit('/').next()?;
    let is_object = [".o", ".a", ".d", ".cmd", ".ko", ".mod", ".tmp"]
        .iter()
        .any(|end| name.ends_with(end));
    let is_file = !name.is_empty() && !word.starts_with(['/', '-', '$', '.']) && word.contains('/');
    (is_file && !is_object).then_some(word)
}

/// Object, source and command of a line that compiles. Programs of the build itself are linked in one step, or have no list of
/// dependencies by that name.
fn compilation(line: &str) -> Option<(&str, &str, &str)> {
    const LIST: &str = " -Wp,-MMD,";
    let list = line.find(LIST)?;
    let start = line.get(..list)?.rfind("; ").map_or(0, |at| at + 2);
    let command = line.get(start..)?.trim_end().trim_end_matches(';').trim_end();
    let mut words = command
        .split(' ')
        .filter(|word| !word.is_empty())
        .skip_while(|word| *word != "-o")
        .skip(1);
    let (object, source) = (words.next()?, words.next()?);
    let is_one = object.ends_with(".o") && [".c", ".S"].iter().any(|end| source.ends_with(end));
    is_one.then_some((object, source, command))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAID: &str = "set -e;  echo '  CC      a/../v/k.o';    trap 'rm -f a/../v/k.o; trap - PIPE; kill -s PIPE $$' PIPE; gcc-12 \
        -Wp,-MMD,a/../v/.k.o.d -I/src/include -mcmodel=kernel -DMODULE -DKBUILD_MODNAME='\"kvm\"' -c -o a/../v/k.o /src/a/../v/k.c   ; \
        ./tools/objtool/objtool --orc a/../v/k.o; scripts/basic/fixdep a/../v/.k.o.d a/../v/k.o 'gcc-12 x' > a/../v/.k.o.cmd; rm -f x\n\
        set -e; mawk -f /src/lib/raid6/unroll.awk < /src/int.uc > lib/raid6/int1.c\n\
        set -e; gcc-12 -Wp,-MMD,lib/raid6/.int1.o.d -c -o lib/raid6/int1.o lib/raid6/int1.c ; scripts/basic/fixdep a b\n\
        set -e; gcc -Wp,-MMD,scripts/.x.d -o scripts/x /src/scripts/x.c; scripts/basic/fixdep a b\n";

    fn plan() -> Plan {
        Plan::parse(&noted(SAID), Path::new("/src"))
    }

    #[test]
    fn objects_are_known_by_the_file_that_they_are_made_of() {
        let plan = plan();
        let known: Vec<(&str, &str, bool)> = plan
            .objects
            .iter()
            .map(|one| (one.object.as_str(), one.source.as_str(), one.made))
            .collect();
        assert_eq!(
            known,
            [
                ("a/../v/k.o", "v/k.c", false),
                ("lib/raid6/int1.o", "lib/raid6/int1.c", true)
            ]
        );
        assert_eq!(plan.objects[0].module(), Some("kvm"));
        assert!(plan.objects[0].is_of_running_kernel() && !plan.objects[1].is_of_running_kernel());
        assert!(plan.makes("lib/raid6/int1.c") && !plan.makes("v/k.c"));
    }

    #[test]
    fn a_plan_without_one_of_the_kernels_modules_is_not_the_whole() {
        assert_eq!(
            plan().lacks(&["kvm".to_owned(), "kvm_amd".to_owned()]).as_deref(),
            Some("kvm_amd")
        );
        assert_eq!(plan().lacks(&["kvm".to_owned()]).as_deref(), Some("init/main.c"));
    }

    #[test]
    fn a_path_that_leaves_its_root_is_none() {
        assert_eq!(plain("a/./b/../c.c").as_deref(), Some("a/c.c"));
        assert_eq!(plain("a/../../c.c"), None);
    }

    #[test]
    fn a_command_ends_where_the_program_that_notes_it_begins() {
        for program in ["scripts/basic/fixdep", "./scripts/basic/fixdep"] {
            let said = format!(
                "set -e; gcc-16 -Wp,-MMD,lib/.k.o.d -c -o lib/k.o /src/lib/k.c ; ./tools/objtool/objtool --orc lib/k.o; {program} lib/.k.o.d lib/k.o 'x' > y\n"
            );
            let plan = Plan::parse(&noted(&said), Path::new("/src"));
            let last = plan.objects[0].command.words().last();
            assert_eq!(last, Some("lib/k.o"), "{program}");
        }
    }
}
