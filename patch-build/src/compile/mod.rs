//! Compiles source files of the kernel as the kernel's own build does, before and after a change.

pub(crate) mod command;
mod overlay;
mod parallel;
mod same;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use crate::cache;
use crate::command as host;
use crate::pair::ObjectPair;
use crate::plan::Planned;
use crate::tree::Tree;
use command::{SavedCommand, dependencies};
use parallel::in_parallel;
pub use same::changed_code;

/// Why a file could not be compiled.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The cache could not be used.
    #[error(transparent)]
    Cache(#[from] cache::Error),
    /// The source as it was does not compile.
    #[error("can't compile {} as the kernel's source has it", files.join(", "))]
    Before {
        /// The files.
        files: Vec<String>,
        /// The cause.
        source: host::Error,
    },
    /// The changed source does not compile.
    #[error("the changed {file} does not compile")]
    After {
        /// The file.
        file: String,
        /// The cause.
        source: host::Error,
    },
    /// Only C files have functions of which the compiler tells enough.
    #[error("{file} is no C file: only those can be compiled and compared")]
    NotC {
        /// The file.
        file: String,
    },
    /// The kernel's build left no note of how it compiled a file.
    #[error("{} has no command that makes {object}", note.display())]
    NoCommand {
        /// Where it should be.
        note: PathBuf,
        /// The object file.
        object: String,
    },
    /// The file asks for a setting that is another one here.
    #[error(
        "{file} asks for CONFIG_{setting}, which this machine's tools have set otherwise than those that made the kernel"
    )]
    OtherSetting {
        /// The file.
        file: String,
        /// The setting, without `CONFIG_`.
        setting: String,
    },
    /// A header reaches a changed one on a way that the change does not reach.
    #[error("the changed {file} was compiled with the old {header}: some header includes it by a path with `..`")]
    OldHeader {
        /// The file that was compiled.
        file: String,
        /// The changed header.
        header: String,
    },
}

/// A C file of the kernel as it is, compiled.
#[derive(Clone, Debug)]
pub struct Unit {
    /// The file, relative to the source.
    pub source: String,
    /// The module that it is linked into; `None` for the kernel itself.
    pub module: Option<String>,
    /// The object file.
    pub object: Vec<u8>,
    command: SavedCommand,
}

impl Unit {
    /// Whether its code is the running kernel's, see [`Planned::is_of_running_kernel`].
    pub fn is_of_running_kernel(&self) -> bool {
        self.command.is_of_running_kernel()
    }
}

/// Compiles C files (relative to the source) as they are. Those of a source that can't change are compiled once.
///
/// `progress` is told what takes time.
pub fn before(tree: &Tree, files: &[&str], progress: &dyn Fn(&str)) -> Result<Vec<Unit>, Error> {
    let missing = missing(tree, files)?;
    if !missing.is_empty() {
        progress(&format!("compiling {}", named(&missing)));
        let goals: Vec<&str> = missing.iter().map(String::as_str).collect();
        tree.compile(&goals).map_err(|source| Error::Before {
            files: files.iter().map(|file| (*file).to_owned()).collect(),
            source,
        })?;
    }
    files.iter().map(|file| unit(tree, file)).collect()
}

/// Makes objects of the plan, with the plan's own commands; where one fails, by make, which makes first what the file includes.
/// Those that can't be made are left out.
///
/// `progress` is told what takes time.
pub fn planned(tree: &Tree, planned: &[&Planned], progress: &dyn Fn(&str)) -> Result<Vec<Unit>, Error> {
    // One that was made by another command is none of the kernel's.
    let is_there = |planned: &Planned| {
        let Ok(name) = object_name(&planned.source) else {
            return false;
        };
        let text = fs::read_to_string(note(tree, &name)).unwrap_or_default();
        let is_its = SavedCommand::parse(&name, &text).is_some_and(|command| command.is_same(&planned.command));
        is_its && tree.folder().join(&name).exists()
    };
    let missing = |planned: &&Planned| !tree.is_fixed() || !is_there(planned);
    let wanted: Vec<&Planned> = planned.iter().copied().filter(missing).collect();
    let all = wanted.len();
    let made = in_parallel(
        &wanted,
        |_, planned| tree.compile_by(&planned.command.noted()).is_ok(),
        &|number, planned: &&Planned| progress(&format!("compiling {} ({} of {all})", planned.source, number + 1)),
    );
    let failed = wanted.iter().zip(made).filter(|(_, made)| !made);
    let failed: Vec<&str> = failed.map(|(planned, _)| planned.object.as_str()).collect();
    if !failed.is_empty() {
        make(tree, &failed, progress);
    }
    let there = planned.iter().filter(|planned| is_there(planned));
    there.map(|planned| unit(tree, &planned.source)).collect()
}

/// Makes objects (by the names that make knows) as far as they can be made; what can't has no object.
pub fn make(tree: &Tree, objects: &[&str], progress: &dyn Fn(&str)) {
    let names: Vec<String> = objects.iter().map(|name| (*name).to_owned()).collect();
    progress(&format!("compiling {}", named(&names)));
    let mut goals = vec!["-k"];
    goals.extend(objects.iter().filter(|object| !object.contains("..")));
    drop(tree.compile(&goals));
}

/// Compiles a file that [`before`] compiled once more, as the kernel's own build does: without a section for each function. In the
/// sections of a whole file jumps are shorter here and there, and loops are aligned otherwise. Of a source that can't change it is
/// compiled once.
pub fn as_shipped(tree: &Tree, file: &str) -> Result<Vec<u8>, Error> {
    let unit = unit(tree, file)?;
    let path = tree
        .folder()
        .join(object_name(file)?)
        .with_extension("vmpatch-as-shipped.o");
    if !tree.is_fixed() || !path.exists() {
        let partial = path.with_extension("partial");
        tree.shell(&unit.command.as_shipped(&partial))
            .map_err(|source| Error::Before {
                files: vec![file.to_owned()],
                source,
            })?;
        fs::rename(&partial, &path).map_err(cache::Error::io("rename", &partial))?;
    }
    Ok(fs::read(&path).map_err(cache::Error::io("read", &path))?)
}

/// Compiles the same files again, with `changed` files in place of the source's.
pub fn after(
    tree: &Tree,
    units: Vec<Unit>,
    changed: &BTreeMap<String, String>,
    progress: &dyn Fn(&str),
) -> Result<Vec<ObjectPair>, Error> {
    let root = tree.folder().join("vmpatch-after");
    if root.exists() {
        fs::remove_dir_all(&root).map_err(cache::Error::io("remove what an interrupted run left in", &root))?;
    }
    let files = units
        .iter()
        .flat_map(|unit| [unit.source.as_str(), unit.command.object()]);
    overlay::make(tree.source(), &root, changed, &files.collect::<Vec<_>>())?;
    let all = units.len();
    let objects = in_parallel(
        &units,
        |number, unit| {
            let object = root.join(format!("vmpatch-object-{number}.o"));
            recompile(tree, &root, unit, &object, changed)
        },
        &|number, unit: &Unit| {
            progress(&format!(
                "compiling the changed {} ({} of {all})",
                unit.source,
                number + 1
            ))
        },
    );
    let mut pairs = Vec::new();
    for (unit, after) in units.into_iter().zip(objects) {
        pairs.push(ObjectPair {
            source: unit.source,
            module: unit.module,
            has_ftrace: unit.command.has_ftrace(),
            before: unit.object,
            after: after?,
        });
    }
    fs::remove_dir_all(&root).map_err(cache::Error::io("remove", &root))?;
    Ok(pairs)
}

/// The objects that have to be made.
fn missing(tree: &Tree, files: &[&str]) -> Result<Vec<String>, Error> {
    let names = files.iter().map(|file| object_name(file));
    let names = names.collect::<Result<Vec<String>, Error>>()?;
    let is_missing =
        |name: &String| !tree.is_fixed() || !tree.folder().join(name).exists() || !note(tree, name).exists();
    Ok(names.into_iter().filter(is_missing).collect())
}

/// The C files of some objects, for people.
fn named(objects: &[String]) -> String {
    const SHOWN_MAX: usize = 3;
    let mut names: Vec<String> = objects.iter().map(|object| object.replace(".o", ".c")).collect();
    if names.len() > SHOWN_MAX {
        let more = names.len() - SHOWN_MAX;
        names.truncate(SHOWN_MAX);
        return format!("{} and {more} more", names.join(", "));
    }
    names.join(", ")
}

fn unit(tree: &Tree, file: &str) -> Result<Unit, Error> {
    let name = object_name(file)?;
    let (path, note) = (tree.folder().join(&name), note(tree, &name));
    let text = fs::read_to_string(&note).map_err(cache::Error::io("read", &note))?;
    let command = SavedCommand::parse(&name, &text).ok_or_else(|| Error::NoCommand {
        note,
        object: name.clone(),
    })?;
    // fixdep notes every setting that the file or a header of it mentions (scripts/basic/fixdep.c).
    let asks = |setting: &&String| text.contains(&format!("$(wildcard include/config/{setting})"));
    if let Some(setting) = tree.other_settings().iter().find(asks) {
        return Err(Error::OtherSetting {
            file: file.to_owned(),
            setting: setting.clone(),
        });
    }
    Ok(Unit {
        source: file.to_owned(),
        module: command.module().map(str::to_owned),
        object: fs::read(&path).map_err(cache::Error::io("read", &path))?,
        command,
    })
}

/// Where the build notes how it made an object.
fn note(tree: &Tree, object: &str) -> PathBuf {
    let (folder, name) = object.rsplit_once('/').unwrap_or(("", object));
    tree.folder().join(folder).join(format!(".{name}.cmd"))
}

fn object_name(file: &str) -> Result<String, Error> {
    let stem = file
        .strip_suffix(".c")
        .ok_or_else(|| Error::NotC { file: file.to_owned() })?;
    Ok(format!("{stem}.o"))
}

fn recompile(
    tree: &Tree,
    root: &Path,
    unit: &Unit,
    object: &Path,
    changed: &BTreeMap<String, String>,
) -> Result<Vec<u8>, Error> {
    // Relative: some of the compiler's messages and sanitizers keep the path, and no module should depend on where it was built.
    let relative = root.strip_prefix(tree.folder()).unwrap_or(root);
    let shell = unit.command.redirected(tree.source(), relative, object);
    tree.compile_by(&shell).map_err(|source| Error::After {
        file: unit.source.clone(),
        source,
    })?;
    let list = object.with_extension("o.d");
    let rule = fs::read_to_string(&list).map_err(cache::Error::io("read", &list))?;
    if let Some(header) = old_header(tree, &rule, changed) {
        return Err(Error::OldHeader {
            file: unit.source.clone(),
            header: header.to_owned(),
        });
    }
    Ok(fs::read(object).map_err(cache::Error::io("read", object))?)
}

/// The first of the changed files that was read in its old form.
fn old_header<'a>(tree: &Tree, rule: &str, changed: &'a BTreeMap<String, String>) -> Option<&'a str> {
    dependencies(rule).find_map(|path| {
        let real = fs::canonicalize(tree.folder().join(path)).ok()?;
        let relative = real.strip_prefix(tree.source()).ok()?.to_str()?;
        changed.get_key_value(relative).map(|(file, _)| file.as_str())
    })
}
