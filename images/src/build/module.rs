//! C sources to a kernel module.

use std::borrow::Cow;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use super::{Error, KernelTree, digest, klp_rela};
use crate::cache;
use crate::command;

/// The headers that the modules here share; every module's folder has them.
const HEADERS: [(&str, &str); 2] = [
    ("livepatch.h", include_str!("../../modules/livepatch.h")),
    ("sysinfo.h", include_str!("../../modules/sysinfo.h")),
];

/// No debug information: it is most of the time and of the file. Warnings are errors, for nobody would see them.
const FLAGS: &str = "-g0 -Werror";

/// A module to be built.
#[derive(Clone, Debug)]
pub struct Module {
    name: String,
    sources: Vec<Source>,
    headers: Vec<(&'static str, Cow<'static, str>)>,
    linker_script: Option<Cow<'static, str>>,
    undefined_allowed: bool,
}

#[derive(Clone, Debug)]
struct Source {
    /// Without `.c`.
    stem: String,
    text: Cow<'static, str>,
    /// Whether objtool reads it, as it does every file of the kernel.
    checked: bool,
}

impl Module {
    /// A module of that name (its file's, in which the kernel takes `-` for `_`), without sources yet.
    pub fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            sources: Vec::new(),
            headers: Vec::new(),
            linker_script: None,
            undefined_allowed: false,
        }
    }

    /// Adds a source file.
    #[must_use]
    pub fn source(mut self, stem: &str, text: impl Into<Cow<'static, str>>) -> Self {
        self.sources.push(Source {
            stem: stem.to_owned(),
            text: text.into(),
            checked: true,
        });
        self
    }

    /// Adds a header, which the kernel's headers can include, too.
    #[must_use]
    pub fn header(mut self, name: &'static str, text: impl Into<Cow<'static, str>>) -> Self {
        self.headers.push((name, text.into()));
        self
    }

    /// Has the objects linked by this script, which the C preprocessor reads first.
    #[must_use]
    pub fn linker_script(mut self, text: impl Into<Cow<'static, str>>) -> Self {
        self.linker_script = Some(text.into());
        self
    }

    /// Adds a source file that objtool is to leave alone: huge, or no real code.
    #[must_use]
    pub fn unchecked_source(mut self, stem: &str, text: impl Into<Cow<'static, str>>) -> Self {
        self.sources.push(Source {
            stem: stem.to_owned(),
            text: text.into(),
            checked: false,
        });
        self
    }

    /// Lets the build succeed where the kernel exports no such symbol: the module cannot be loaded, or only as a
    /// livepatch, whose relocations (`.klp.sym.…` in the sources, see `livepatch.h`) the kernel resolves later.
    #[must_use]
    pub fn allow_undefined(mut self) -> Self {
        self.undefined_allowed = true;
        self
    }

    /// The module's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Builds the module for that kernel, unless it has been built from the same sources before. Returns the `.ko` in the
    /// cache.
    pub fn build(&self, tree: &KernelTree) -> Result<PathBuf, Error> {
        let kbuild = self.kbuild();
        let mut inputs = vec![tree.id(), tree.compiler(), &kbuild, klp_rela::RULES];
        inputs.extend(HEADERS.map(|(_, text)| text));
        inputs.extend(
            self.sources
                .iter()
                .flat_map(|source| [source.stem.as_str(), &*source.text]),
        );
        inputs.extend(self.headers.iter().flat_map(|(name, text)| [*name, &**text]));
        inputs.extend(self.linker_script.as_deref());
        let key = format!("modules/{}/{}-{}", tree.release(), self.name, digest(&inputs));
        let file = format!("{}.ko", self.name);
        let folder = tree.cache().folder(&key, |folder| {
            let work = folder.join("build");
            fs::create_dir(&work).map_err(cache::Error::io("make the folder", &work))?;
            self.write_sources(&work, &kbuild)?;
            self.make(tree, &work)?;
            let built = work.join(&file);
            klp_rela::mark(&built)?;
            fs::rename(&built, folder.join(&file)).map_err(cache::Error::io("keep", &built))?;
            fs::remove_dir_all(&work).map_err(cache::Error::io("remove", &work))?;
            Ok::<(), Error>(())
        })?;
        Ok(folder.join(file))
    }

    fn write_sources(&self, work: &Path, kbuild: &str) -> Result<(), Error> {
        let write = |name: &str, text: &str| {
            let path = work.join(name);
            fs::write(&path, text).map_err(cache::Error::io("write", &path))
        };
        write("Kbuild", kbuild)?;
        HEADERS.iter().try_for_each(|(name, text)| write(name, text))?;
        self.headers.iter().try_for_each(|(name, text)| write(name, text))?;
        if let Some(text) = &self.linker_script {
            write("module.lds.S", text)?;
        }
        for source in &self.sources {
            write(&format!("{}.c", source.stem), &source.text)?;
        }
        Ok(())
    }

    fn make(&self, tree: &KernelTree, work: &Path) -> Result<(), Error> {
        let module_folder = format!("M={}", work.to_string_lossy());
        // Where cargo runs under another make, that one's flags are none of ours.
        let search_path = format!("PATH={}", tree.search_path());
        let mut args = vec![
            "-u",
            "MAKEFLAGS",
            "-u",
            "MFLAGS",
            &search_path,
            "make",
            "-s",
            &module_folder,
        ];
        if self.undefined_allowed {
            args.push("KBUILD_MODPOST_WARN=1");
        }
        args.push("modules");
        command::output("env", &args, tree.folder())?;
        Ok(())
    }

    /// The kernel build's description of the module (Documentation/kbuild/modules.rst).
    fn kbuild(&self) -> String {
        let mut text = format!("obj-m := {}.o\nccflags-y := {FLAGS}\n", self.name);
        if !self.headers.is_empty() {
            text.push_str("ccflags-y += -I$(src)\n");
        }
        let is_whole = |source: &Source| source.stem == self.name;
        if !self.sources.iter().any(is_whole) {
            let objects: Vec<String> = self.sources.iter().map(|source| format!("{}.o", source.stem)).collect();
            // Writing to a string can't fail.
            let _ = writeln!(text, "{}-y := {}", self.name, objects.join(" "));
        }
        if self.linker_script.is_some() {
            let _ = writeln!(
                text,
                "ldflags-y += -T $(src)/module.lds\ntargets += module.lds\n$(obj)/{}.o: $(obj)/module.lds",
                self.name
            );
        }
        for source in self.sources.iter().filter(|source| !source.checked) {
            let _ = writeln!(text, "OBJECT_FILES_NON_STANDARD_{}.o := y", source.stem);
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_module_of_one_file_of_its_name_lists_no_objects() {
        let module = Module::new("one").source("one", "");
        assert_eq!(module.kbuild(), "obj-m := one.o\nccflags-y := -g0 -Werror\n");
    }

    #[test]
    fn a_module_of_several_files_lists_them_and_what_objtool_leaves_alone() {
        let module = Module::new("two").source("a", "").unchecked_source("b", "");
        let expected =
            "obj-m := two.o\nccflags-y := -g0 -Werror\ntwo-y := a.o b.o\nOBJECT_FILES_NON_STANDARD_b.o := y\n";
        assert_eq!(module.kbuild(), expected);
    }
}
