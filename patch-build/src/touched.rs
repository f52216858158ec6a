//! Which of the kernel's C files a change gets into: none that can have a copy of changed code in it is left out unsaid.

use std::collections::BTreeSet;
use std::fs;

use object::{Object, ObjectSymbol, SymbolKind};

use crate::cache;
use crate::compile::{self, Unit};
use crate::facts::{Config, KernelFacts, ModuleError};
use crate::plan::{self, Plan, Planned};
use crate::source::change::Change;
use crate::source::included_c;
use crate::source::includers::{Index, Read};
use crate::tree::Tree;

/// Where a tree notes that what the build makes for single files has been made.
const MADE: &str = "vmpatch-made";

/// Why it could not be told.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file of the source could not be read.
    #[error(transparent)]
    Files(#[from] cache::Error),
    /// The list of modules could not be read.
    #[error(transparent)]
    Modules(#[from] ModuleError),
    /// The kernel's build does not say what it compiles.
    #[error(transparent)]
    Plan(#[from] plan::Error),
    /// A file could not be compiled.
    #[error(transparent)]
    Compile(#[from] compile::Error),
    /// An object is no ELF file.
    #[error("reading the object of {file}")]
    Object {
        /// The source file.
        file: String,
        /// The cause.
        source: object::Error,
    },
    /// Code of any file may be in any other.
    #[error("kernel {release} was optimised as a whole ({setting}): code of one file may be inlined in every other")]
    Whole {
        /// The kernel's release.
        release: String,
        /// The setting that says so.
        setting: String,
    },
    /// Code is changed that no patch of the kernel reaches.
    #[error("{file} is changed, and compiled {what}: no patch of a running kernel can replace that")]
    NotOfKernel {
        /// The changed file.
        file: String,
        /// For what.
        what: &'static str,
    },
    /// An object is linked into more than one module.
    #[error("{file} is linked into more than one module ({modules}): a patch for it is not made yet")]
    Shared {
        /// The source file.
        file: String,
        /// The modules.
        modules: String,
    },
    /// Nothing of the kernel is made of what was changed.
    #[error("nothing of kernel {release} is made of what was changed: {}", left_out.join(", "))]
    Nowhere {
        /// Each changed file, and why it is left out.
        left_out: Vec<String>,
        /// The kernel's release.
        release: String,
    },
}

/// Where a change gets into.
#[derive(Debug, Default)]
pub struct Touched {
    /// The C files, compiled as they are.
    pub units: Vec<Unit>,
    /// Places that may have changed code in them, and could not be compiled: file, and why.
    pub not_compiled: Vec<(String, String)>,
    /// Places that the change gets into and that are none of the running kernel: file, and why.
    pub left_out: Vec<(String, String)>,
}

/// Finds the C files that the change is in or that read a changed file, as far as this kernel is made of them and their code may
/// change, and compiles them as they are.
///
/// Code of a file is inlined in that file, or where the file is included; nowhere else, as long as the linker does not
/// optimise. So no debug information of the whole kernel is needed to find inlined copies.
///
/// `progress` is told what takes time.
pub fn find(tree: &Tree, facts: &KernelFacts, change: &Change, progress: &dyn Fn(&str)) -> Result<Touched, Error> {
    check_link(&facts.config, &facts.release)?;
    let changed: Vec<&str> = change.files.keys().map(String::as_str).collect();
    progress("looking for files that include what changed");
    let may_be_included =
        !changed.iter().all(|file| file.ends_with(".c")) || included_c::may_be_included(tree, &changed)?;
    if !may_be_included
        && included_c::are_of_their_folders(tree.source(), &changed)
        && let Some(units) = alone(tree, facts, &changed, progress)?
    {
        return Ok(Touched {
            units,
            ..Touched::default()
        });
    }
    let plan = Plan::of(tree, &facts.release, &facts.modules.names()?, progress)?;
    let mut reads = reads(tree, &plan, &changed, may_be_included, progress);
    if !may_be_included {
        // Whatever could not be followed does not lead to what nobody includes.
        reads.iter_mut().for_each(|read| read.unknown = false);
    }
    Search {
        tree,
        facts,
        change,
        progress,
    }
    .touched(&plan, &reads)
}

/// C files that no other includes, compiled by themselves; `None` where one of them is not part of the kernel, or not by itself.
fn alone(
    tree: &Tree,
    facts: &KernelFacts,
    changed: &[&str],
    progress: &dyn Fn(&str),
) -> Result<Option<Vec<Unit>>, Error> {
    let units = match compile::before(tree, changed, progress) {
        Err(compile::Error::Before { .. } | compile::Error::NoCommand { .. }) => return Ok(None),
        units => units?,
    };
    for unit in &units {
        if !unit.is_of_running_kernel() || missing(unit, facts)?.is_some() {
            return Ok(None);
        }
    }
    Ok(Some(units))
}

/// What the compiler reads for each object of the plan. Files that the build makes for single objects are made first: what they
/// include is not known before.
fn reads(tree: &Tree, plan: &Plan, changed: &[&str], may_be_included: bool, progress: &dyn Fn(&str)) -> Vec<Read> {
    let read = || -> Vec<Read> {
        let mut index = Index::new(tree.source(), tree.folder(), plan);
        plan.objects
            .iter()
            .map(|planned| index.read(planned, changed))
            .collect()
    };
    let mut reads = read();
    let made = tree.folder().join(MADE);
    if !may_be_included || (tree.is_fixed() && made.exists()) {
        return reads;
    }
    // Objects are compiled only where what one includes is made of others: the vDSO's images.
    for compiles in [false, true] {
        let all = plan.objects.iter().zip(&reads);
        let unknown: Vec<&str> = all
            .filter(|(planned, read)| read.to_be_made && planned.is_of_running_kernel())
            .map(|(planned, _)| planned.object.as_str())
            .collect();
        if unknown.is_empty() {
            break;
        }
        progress("making the files that the kernel's build makes for single objects");
        if compiles {
            compile::make(tree, &unknown, progress);
        } else {
            compile::make_inputs(tree, &unknown);
        }
        reads = read();
    }
    // Without this note they are made once more.
    drop(fs::write(made, ""));
    reads
}

/// What a search goes by.
struct Search<'a> {
    tree: &'a Tree,
    facts: &'a KernelFacts,
    change: &'a Change,
    progress: &'a dyn Fn(&str),
}

impl Search<'_> {
    fn touched(&self, plan: &Plan, reads: &[Read]) -> Result<Touched, Error> {
        let mut touched = Touched::default();
        let is_changed = |planned: &Planned| !planned.made && self.change.files.contains_key(&planned.source);
        let concerned: Vec<(&Planned, &Read)> = plan
            .objects
            .iter()
            .zip(reads)
            .filter(|(_, read)| read.unknown || !read.changed.is_empty())
            .collect();
        let (running, others): (Vec<&Planned>, Vec<&Planned>) = concerned
            .iter()
            .map(|(planned, _)| *planned)
            .partition(|planned| what_for(planned).is_none());
        let (certain, maybe): (Vec<&Planned>, Vec<&Planned>) = running.iter().partition(|planned| is_changed(planned));
        for planned in &others {
            self.outside(planned, is_changed(planned), &running, &mut touched)?;
        }
        if !maybe.is_empty() && self.tree.is_fixed() {
            self.try_out(&certain)?;
        }
        let differ = compile::changed_code(self.tree, &maybe, &self.change.files, self.progress)?;
        let maybe = maybe
            .into_iter()
            .zip(differ)
            .filter(|(_, differs)| *differs)
            .map(|(planned, _)| planned);
        let (assembly, maybe): (Vec<&Planned>, Vec<&Planned>) =
            maybe.partition(|planned| planned.source.ends_with(".S"));
        let mut wanted = certain.clone();
        wanted.extend(maybe);
        touched.not_compiled.extend(assembly.iter().map(|planned| {
            let why = "what it includes changes, and assembly is not compared";
            (planned.source.clone(), why.to_owned())
        }));
        self.compile(&wanted, &mut touched)?;
        let of_running = concerned.iter().filter(|(planned, _)| what_for(planned).is_none());
        let read: BTreeSet<&str> = of_running
            .flat_map(|(_, read)| read.changed.iter().map(String::as_str))
            .collect();
        self.left_out(&read, &mut touched)?;
        Ok(touched)
    }

    /// Compiles the changed files before and after, which is kept: what does not compile is told before all that reads a changed header is
    /// looked at.
    fn try_out(&self, certain: &[&Planned]) -> Result<(), Error> {
        let own: Vec<&Planned> = certain
            .iter()
            .copied()
            .filter(|planned| planned.is_named_after_source() && shared(planned).is_none())
            .collect();
        let mut units = Vec::new();
        for unit in compile::planned(self.tree, &own, self.progress)? {
            if missing(&unit, self.facts)?.is_none() {
                units.push(unit);
            }
        }
        compile::after(self.tree, units, &self.change.files, self.progress)?;
        Ok(())
    }

    /// Compiles what is to be compared.
    fn compile(&self, wanted: &[&Planned], touched: &mut Touched) -> Result<(), Error> {
        if let Some(error) = wanted.iter().find_map(|planned| shared(planned)) {
            return Err(error);
        }
        // What is named after another file would be taken for that one's.
        let (own, others): (Vec<&Planned>, Vec<&Planned>) =
            wanted.iter().partition(|planned| planned.is_named_after_source());
        let units = compile::planned(self.tree, &own, self.progress)?;
        for planned in own.iter().chain(&others) {
            if !units.iter().any(|unit| unit.source == planned.source) {
                let why = "what it includes changes, and it does not compile here";
                touched.not_compiled.push((planned.source.clone(), why.to_owned()));
            }
        }
        for unit in units {
            match missing(&unit, self.facts)? {
                None => touched.units.push(unit),
                Some(reason) => touched.left_out.push((unit.source, reason)),
            }
        }
        Ok(())
    }

    /// An object that the running kernel has no code of.
    fn outside(
        &self,
        planned: &Planned,
        is_changed: bool,
        running: &[&Planned],
        touched: &mut Touched,
    ) -> Result<(), Error> {
        let Some(place) = what_for(planned) else {
            return Ok(());
        };
        if place == VDSO {
            let is_same = || compile::changed_code(self.tree, &[planned], &self.change.files, self.progress);
            if is_changed || is_same()?.contains(&true) {
                return Err(Error::NotOfKernel {
                    file: planned.source.clone(),
                    what: place,
                });
            }
        } else if is_changed {
            let is_running = running.iter().any(|other| other.source == planned.source);
            if is_running {
                let why = format!("it is compiled {place}, too: only the kernel's own copy is patched");
                touched.left_out.push((planned.source.clone(), why));
            } else {
                touched
                    .left_out
                    .push((planned.source.clone(), format!("it is compiled {place}")));
            }
        }
        Ok(())
    }

    /// Says which of the changed files are none of this kernel, and refuses where that is all of them.
    fn left_out(&self, read: &BTreeSet<&str>, touched: &mut Touched) -> Result<(), Error> {
        for file in self.change.files.keys().filter(|file| !read.contains(file.as_str())) {
            if !touched.left_out.iter().any(|(name, _)| name == file) {
                touched
                    .left_out
                    .push((file.clone(), why_none(file, &self.facts.release)));
            }
        }
        if !read.is_empty() || !touched.units.is_empty() || !touched.not_compiled.is_empty() {
            return Ok(());
        }
        Err(Error::Nowhere {
            left_out: touched
                .left_out
                .iter()
                .map(|(file, why)| format!("{file}: {why}"))
                .collect(),
            release: self.facts.release.clone(),
        })
    }
}

/// The vDSO: the kernel maps it into processes, and does not run it.
const VDSO: &str = "for the vDSO, which processes run";

/// Refuses an object that is linked into more than one module: make gives their names with a colon between (scripts/Makefile.lib of 5.10,
/// `modname-multi`).
fn shared(planned: &Planned) -> Option<Error> {
    let modules = planned.module().filter(|module| module.contains(':'))?;
    Some(Error::Shared {
        file: planned.source.clone(),
        modules: modules.replace(':', ", "),
    })
}

/// Why nothing of a kernel is made of a file.
fn why_none(file: &str, release: &str) -> String {
    match what_folder_is_for(file) {
        Some(what) => format!("it is compiled {what}"),
        None => format!("no code of kernel {release} is made of it"),
    }
}

/// What the files of a folder are for that is not of the running kernel.
fn what_folder_is_for(file: &str) -> Option<&'static str> {
    const FOLDERS: [(&str, &str); 8] = [
        ("arch/x86/boot/startup/", ""),
        ("arch/x86/boot/", "for what runs before the kernel does"),
        ("arch/x86/realmode/", "for what starts other processors"),
        (
            "arch/x86/purgatory/",
            "for what runs between this kernel and the next (kexec)",
        ),
        ("drivers/firmware/efi/libstub/", "for what runs before the kernel does"),
        ("scripts/", "for the build itself"),
        ("tools/", "for the build itself"),
        ("usr/", "for the first programs"),
    ];
    let of = FOLDERS.iter().find(|(folder, _)| file.starts_with(folder));
    of.map(|(_, what)| *what).filter(|what| !what.is_empty())
}

/// What an object is for that is not of the running kernel; `None` for those that are.
fn what_for(planned: &Planned) -> Option<&'static str> {
    if let Some(what) = what_folder_is_for(&planned.object) {
        return Some(what);
    }
    if planned.is_of_running_kernel() {
        return None;
    }
    Some(if planned.object.starts_with("arch/x86/entry/vdso/") {
        VDSO
    } else {
        "for another place in memory than the kernel's"
    })
}

/// Refuses a kernel whose files were not compiled one by one (Kconfig of 6.1: `LTO_CLANG_FULL`, `LTO_CLANG_THIN`).
fn check_link(config: &Config, release: &str) -> Result<(), Error> {
    let whole = ["LTO_CLANG", "LTO_CLANG_FULL", "LTO_CLANG_THIN", "LTO_GCC", "LTO"];
    match whole.iter().find(|setting| config.enabled(setting)) {
        None => Ok(()),
        Some(setting) => Err(Error::Whole {
            release: release.to_owned(),
            setting: format!("CONFIG_{setting}"),
        }),
    }
}

/// What the kernel lacks of a file that was compiled for it; `None` where it is part of the kernel.
///
/// kbuild compiles whatever it is asked for, also files that no configuration would choose.
fn missing(unit: &Unit, facts: &KernelFacts) -> Result<Option<String>, Error> {
    if let Some(module) = &unit.module {
        let has = facts.modules.has(module)?;
        return Ok((!has).then(|| format!("it has no module {module}")));
    }
    let elf = object::File::parse(&*unit.object).map_err(|source| Error::Object {
        file: unit.source.clone(),
        source,
    })?;
    let functions: Vec<&str> = elf
        .symbols()
        .filter(|symbol| symbol.kind() == SymbolKind::Text && symbol.is_definition())
        .filter_map(|symbol| symbol.name().ok())
        .filter(|name| !name.contains('.') && !name.starts_with("__pfx_"))
        .collect();
    let found = functions.iter().filter(|name| is_symbol(facts, name)).count();
    // Names of static functions are not rare enough to go by one of them.
    let is_in = functions.is_empty() || found * 2 >= functions.len();
    Ok((!is_in).then(|| {
        format!(
            "{found} of its {} functions are among the kernel's symbols",
            functions.len()
        )
    }))
}

fn is_symbol(facts: &KernelFacts, name: &str) -> bool {
    facts.symbols.named(name).next().is_some()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn a_kernel_that_was_optimised_as_a_whole_is_refused_by_the_setting() {
        let check = |text: &str| check_link(&Config::parse(text), "6.1.0-x").map_err(|error| error.to_string());
        assert_eq!(check("CONFIG_LTO_NONE=y\nCONFIG_ARCH_SUPPORTS_LTO_CLANG=y\n"), Ok(()));
        let error = check("CONFIG_LTO=y\nCONFIG_LTO_CLANG=y\nCONFIG_LTO_CLANG_THIN=y\n").unwrap_err();
        assert!(
            error.contains("6.1.0-x was optimised as a whole (CONFIG_LTO_CLANG)"),
            "{error}"
        );
    }

    #[test]
    fn a_file_of_what_runs_before_the_kernel_is_named_as_that() {
        let boot = "it is compiled for what runs before the kernel does";
        assert_eq!(why_none("arch/x86/boot/compressed/misc.c", "6.1.0-x"), boot);
        let none = "no code of kernel 6.1.0-x is made of it";
        assert_eq!(why_none("arch/x86/boot/startup/sme.c", "6.1.0-x"), none);
        assert_eq!(why_none("drivers/net/a.c", "6.1.0-x"), none);
    }

    #[test]
    fn an_object_in_two_modules_is_refused_by_their_names() {
        let refused = |module: &str| {
            let flags = format!("-DMODULE -DKBUILD_MODNAME='\"{module}\"'");
            let text =
                format!("object\tlib/zstd/a.o\t/src/lib/zstd/a.c\tgcc {flags} -c -o lib/zstd/a.o /src/lib/zstd/a.c\n");
            let plan = Plan::parse(&text, Path::new("/src"));
            plan.objects.iter().find_map(shared).map(|error| error.to_string())
        };
        let error = refused("zstd_compress:zstd_decompress").unwrap();
        assert!(
            error.starts_with("lib/zstd/a.c is linked into more than one module (zstd_compress, zstd_decompress)"),
            "{error}"
        );
        assert_eq!(refused("zstd_compress"), None);
    }
}
