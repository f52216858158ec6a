//! Which of the kernel's C files a change gets into: none that can have a copy of changed code in it is left out unsaid.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use object::{Object, ObjectSymbol, SymbolKind};

use crate::compile::{self, Unit};
use crate::facts::{Config, KernelFacts, ModuleError};
use crate::source::c_text;
use crate::source::change::Change;
use crate::source::includers::{self, Includers};
use crate::tree::Tree;
use crate::{cache, facts};

/// A changed header that gets into more files than these would take as long as a kernel.
const FILES_MAX: usize = 100;

/// Why it could not be told.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file of the source could not be read.
    #[error(transparent)]
    Files(#[from] cache::Error),
    /// The list of modules could not be read.
    #[error(transparent)]
    Modules(#[from] ModuleError),
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
    /// The kernel does not have that file's code.
    #[error("{file} is not part of kernel {release}: {reason}")]
    NotInKernel {
        /// The source file.
        file: String,
        /// The kernel's release.
        release: String,
        /// What was looked for.
        reason: String,
    },
    /// The header is included nearly everywhere.
    #[error(
        "{} may get into {found} files of the kernel; more than {FILES_MAX} are not compiled for one patch",
        headers.join(", ")
    )]
    TooMany {
        /// The changed headers.
        headers: Vec<String>,
        /// How many files include them.
        found: usize,
    },
    /// The header is read for every file.
    #[error("{} gets into every file of the kernel, as the compiler reads it first of all", headers.join(", "))]
    Everything {
        /// The changed headers.
        headers: Vec<String>,
    },
    /// Code of any file may be in any other.
    #[error("kernel {release} was optimised as a whole ({setting}): code of one file may be inlined in every other")]
    Whole {
        /// The kernel's release.
        release: String,
        /// The setting that says so.
        setting: String,
    },
    /// Nothing of the kernel is made of what was changed.
    #[error("no file of kernel {release} includes {}", headers.join(", "))]
    Nowhere {
        /// The changed headers.
        headers: Vec<String>,
        /// The kernel's release.
        release: String,
    },
}

/// Where a change gets into.
#[derive(Debug)]
pub struct Touched {
    /// The C files, compiled as they are.
    pub units: Vec<Unit>,
    /// Places that may have changed code in them, and could not be compiled: file, and why.
    pub not_compiled: Vec<(String, String)>,
}

/// Finds the C files that the change is in or that include a changed file, as far as this kernel is made of them, and compiles them
/// as they are.
///
/// Code of a file is inlined in that file, or where the file is included; nowhere else, as long as the linker does not
/// optimise. So no debug information of the whole kernel is needed to find inlined copies.
///
/// `progress` is told what takes time.
pub fn find(tree: &Tree, facts: &KernelFacts, change: &Change, progress: &dyn Fn(&str)) -> Result<Touched, Error> {
    check_link(&facts.config, &facts.release)?;
    let changed: Vec<&str> = change.files.keys().map(String::as_str).collect();
    progress("looking for files that include what changed");
    let includers = includers::find(tree.source(), &changed)?;
    if includers.everything {
        let headers = changed.iter().map(|file| (*file).to_owned()).collect();
        return Err(Error::Everything { headers });
    }
    // A file that others include may have no object of its own.
    let is_alone = |file: &&str| file.ends_with(".c") && !includers.included.contains(*file);
    let (alone, included): (Vec<&str>, Vec<&str>) = changed.iter().partition(|file| is_alone(file));
    let mut units = compile::before(tree, &alone, progress)?;
    for unit in &units {
        if let Some(reason) = missing(unit, facts)? {
            return Err(Error::NotInKernel {
                file: unit.source.clone(),
                release: facts.release.clone(),
                reason,
            });
        }
    }
    let mut touched = including(tree, facts, &included, &includers, progress)?;
    units.retain(|unit| touched.units.iter().all(|other| other.source != unit.source));
    touched.units.splice(0..0, units);
    if touched.units.is_empty() {
        return Err(Error::Nowhere {
            headers: changed.iter().map(|file| (*file).to_owned()).collect(),
            release: facts.release.clone(),
        });
    }
    Ok(touched)
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

/// Of the files that others include: those that include them, and themselves where they are compiled by themselves, too.
fn including(
    tree: &Tree,
    facts: &KernelFacts,
    included: &[&str],
    includers: &Includers,
    progress: &dyn Fn(&str),
) -> Result<Touched, Error> {
    let folders = module_folders(facts)?;
    let mut files: BTreeSet<&str> = BTreeSet::new();
    for file in included.iter().copied().chain(includers.c.iter().map(String::as_str)) {
        let is_named = includers::has_own_object(tree.source(), file)?;
        if is_named && may_be_in_kernel(tree.source(), facts, &folders, file)? {
            files.insert(file);
        }
    }
    if files.len() > FILES_MAX {
        return Err(Error::TooMany {
            headers: included.iter().map(|file| (*file).to_owned()).collect(),
            found: files.len(),
        });
    }
    let files: Vec<&str> = files.into_iter().collect();
    let mut units = compile::before_where_possible(tree, &files, progress)?;
    let mut not_compiled = Vec::new();
    for file in files {
        let compiled = units.iter().any(|unit| unit.source == file);
        if !compiled && is_of_kernel(&functions(tree.source(), file)?, facts) {
            not_compiled.push((
                file.to_owned(),
                "it includes what changed, and does not compile here".to_owned(),
            ));
        }
    }
    let not_running = |file: &&String| {
        ["arch/x86/boot/", "arch/x86/realmode/", "arch/x86/purgatory/"]
            .iter()
            .any(|folder| file.starts_with(folder))
    };
    let assembly = includers.assembly.iter().filter(|file| !not_running(file));
    not_compiled.extend(assembly.map(|file| {
        (
            file.clone(),
            "it includes what changed, and assembly is not compared".to_owned(),
        )
    }));
    let mut in_kernel = Vec::new();
    for unit in units.drain(..) {
        let concerned = included
            .iter()
            .any(|file| unit.source == *file || unit.includes(tree, file));
        if concerned && missing(&unit, facts)?.is_none() {
            in_kernel.push(unit);
        }
    }
    Ok(Touched {
        units: in_kernel,
        not_compiled,
    })
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

/// The folders of the source that modules come from.
fn module_folders(facts: &KernelFacts) -> Result<BTreeSet<String>, facts::ModuleError> {
    let folder = |file: &String| {
        let file = file.strip_prefix("kernel/").unwrap_or(file);
        file.rsplit_once('/').map(|(folder, _)| folder.to_owned())
    };
    Ok(facts.modules.list()?.iter().filter_map(folder).collect())
}

/// Spares most files that this kernel is not made of being compiled: a file has a function among the kernel's symbols, or a
/// module comes from its folder or one above.
fn may_be_in_kernel(
    source: &Path,
    facts: &KernelFacts,
    module_folders: &BTreeSet<String>,
    file: &str,
) -> Result<bool, cache::Error> {
    let mut folder = file;
    while let Some((above, _)) = folder.rsplit_once('/') {
        if module_folders.contains(above) {
            return Ok(true);
        }
        folder = above;
    }
    let functions = functions(source, file)?;
    // What macros make, or another file has that this one includes, has other names.
    let is_plain = |function: &(String, bool)| !function.1;
    Ok(!functions.iter().any(is_plain)
        || functions
            .iter()
            .any(|(name, is_made)| *is_made || is_symbol(facts, name)))
}

/// The functions that a file's text defines: name, and whether a macro makes it.
fn functions(source: &Path, file: &str) -> Result<Vec<(String, bool)>, cache::Error> {
    let path = source.join(file);
    let text = fs::read(&path).map_err(cache::Error::io("read", &path))?;
    let text = String::from_utf8_lossy(&text);
    let functions = c_text::functions(&text);
    Ok(functions
        .iter()
        .map(|function| (function.name.to_owned(), function.made_by.is_some()))
        .collect())
}

/// Whether most of a file's functions are the kernel's: then it is part of it. Names of static functions are not rare enough to
/// go by one of them.
fn is_of_kernel(functions: &[(String, bool)], facts: &KernelFacts) -> bool {
    let plain: Vec<&String> = functions
        .iter()
        .filter(|(_, is_made)| !is_made)
        .map(|(name, _)| name)
        .collect();
    let found = plain.iter().filter(|name| is_symbol(facts, name)).count();
    found > 0 && found * 2 >= plain.len()
}

#[cfg(test)]
mod tests {
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
}
