//! Which of the kernel's C files a change gets into.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use object::{Object, ObjectSymbol, SymbolKind};

use crate::compile::{self, Unit};
use crate::facts::{KernelFacts, ModuleError};
use crate::source::change::Change;
use crate::source::{c_text, includers};
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
    /// Nothing of the kernel is made of what was changed.
    #[error("no file of kernel {release} includes {}", headers.join(", "))]
    Nowhere {
        /// The changed headers.
        headers: Vec<String>,
        /// The kernel's release.
        release: String,
    },
}

/// The C files that the change is in or that include a changed header, as far as this kernel is made of them; compiled as they
/// are.
///
/// `progress` is told what takes time.
pub fn units(tree: &Tree, facts: &KernelFacts, change: &Change, progress: &dyn Fn(&str)) -> Result<Vec<Unit>, Error> {
    let is_header = |file: &&str| file.ends_with(".h");
    let (headers, files): (Vec<&str>, Vec<&str>) = change.files.keys().map(String::as_str).partition(is_header);
    let mut units = compile::before(tree, &files, progress)?;
    for unit in &units {
        if let Some(reason) = missing(unit, facts)? {
            return Err(Error::NotInKernel {
                file: unit.source.clone(),
                release: facts.release.clone(),
                reason,
            });
        }
    }
    if !headers.is_empty() {
        units.extend(including(tree, facts, &headers, &files, progress)?);
    }
    if units.is_empty() {
        return Err(Error::Nowhere {
            headers: headers.iter().map(|header| (*header).to_owned()).collect(),
            release: facts.release.clone(),
        });
    }
    Ok(units)
}

/// The C files beside `known` ones that include the headers.
fn including(
    tree: &Tree,
    facts: &KernelFacts,
    headers: &[&str],
    known: &[&str],
    progress: &dyn Fn(&str),
) -> Result<Vec<Unit>, Error> {
    progress(&format!("looking for files that include {}", headers.join(", ")));
    let all = includers::find(tree.source(), headers)?;
    let folders = module_folders(facts)?;
    let mut files = Vec::new();
    for file in all.iter().filter(|file| !known.contains(&file.as_str())) {
        if may_be_in_kernel(tree.source(), facts, &folders, file)? {
            files.push(file.as_str());
        }
    }
    if files.len() > FILES_MAX {
        return Err(Error::TooMany {
            headers: headers.iter().map(|header| (*header).to_owned()).collect(),
            found: files.len(),
        });
    }
    let mut units = Vec::new();
    for unit in compile::before_where_possible(tree, &files, progress)? {
        let includes = headers.iter().any(|header| unit.includes(tree, header));
        if includes && missing(&unit, facts)?.is_none() {
            units.push(unit);
        }
    }
    Ok(units)
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
    let path = source.join(file);
    let text = fs::read(&path).map_err(cache::Error::io("read", &path))?;
    let text = String::from_utf8_lossy(&text);
    Ok(c_text::functions(&text)
        .iter()
        .any(|function| is_symbol(facts, function.name)))
}
