//! Compiles source files of the kernel as the kernel's own build does, before and after a change.

mod command;
mod overlay;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use crate::cache;
use crate::command as host;
use crate::pair::ObjectPair;
use crate::tree::Tree;
use command::{SavedCommand, dependencies};

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
    /// A header reaches a changed one on a way that the change does not reach.
    #[error("the changed {file} was compiled with the old {header}: some header includes it by a path with `..`")]
    OldHeader {
        /// The file that was compiled.
        file: String,
        /// The changed header.
        header: String,
    },
}

/// Compiles `files` (C files, relative to the source) as they are, and with `changed` in place of the files of those names.
///
/// `progress` is told what takes time.
pub fn pairs(
    tree: &Tree,
    files: &[&str],
    changed: &BTreeMap<String, String>,
    progress: &dyn Fn(&str),
) -> Result<Vec<ObjectPair>, Error> {
    let before = objects(tree, files, progress)?;
    let root = tree.folder().join("vmpatch-after");
    if root.exists() {
        fs::remove_dir_all(&root).map_err(cache::Error::io("remove what an interrupted run left in", &root))?;
    }
    overlay::make(tree.source(), &root, changed, files)?;
    let mut pairs = Vec::new();
    for (file, (before, command)) in files.iter().zip(before) {
        progress(&format!("compiling the changed {file}"));
        pairs.push(ObjectPair {
            source: (*file).to_owned(),
            module: command.module().map(str::to_owned),
            has_ftrace: command.has_ftrace(),
            before,
            after: after(tree, &root, file, &command, changed)?,
        });
    }
    fs::remove_dir_all(&root).map_err(cache::Error::io("remove", &root))?;
    Ok(pairs)
}

/// The objects of `files` as they are, and how they were made. Those of a source that can't change are made once.
fn objects(tree: &Tree, files: &[&str], progress: &dyn Fn(&str)) -> Result<Vec<(Vec<u8>, SavedCommand)>, Error> {
    let names = files.iter().map(|file| object_name(file));
    let names = names.collect::<Result<Vec<String>, Error>>()?;
    let missing: Vec<&str> = names
        .iter()
        .map(String::as_str)
        .filter(|name| !tree.is_fixed() || !tree.folder().join(name).exists() || !note(tree, name).exists())
        .collect();
    if !missing.is_empty() {
        progress(&format!("compiling {}", missing.join(", ").replace(".o", ".c")));
        tree.make(&missing).map_err(|source| Error::Before {
            files: files.iter().map(|file| (*file).to_owned()).collect(),
            source,
        })?;
    }
    names.iter().map(|name| object(tree, name)).collect()
}

fn object(tree: &Tree, name: &str) -> Result<(Vec<u8>, SavedCommand), Error> {
    let (path, note) = (tree.folder().join(name), note(tree, name));
    let text = fs::read_to_string(&note).map_err(cache::Error::io("read", &note))?;
    let command = SavedCommand::parse(name, &text).ok_or_else(|| Error::NoCommand {
        note,
        object: name.to_owned(),
    })?;
    let bytes = fs::read(&path).map_err(cache::Error::io("read", &path))?;
    Ok((bytes, command))
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

fn after(
    tree: &Tree,
    root: &Path,
    file: &str,
    command: &SavedCommand,
    changed: &BTreeMap<String, String>,
) -> Result<Vec<u8>, Error> {
    let object = root.join("vmpatch-object.o");
    let shell = command.redirected(tree.source(), root, &object);
    host::output("sh", &["-c", &format!("set -e; {shell}")], tree.folder()).map_err(|source| Error::After {
        file: file.to_owned(),
        source,
    })?;
    let list = root.join("vmpatch-object.o.d");
    let rule = fs::read_to_string(&list).map_err(cache::Error::io("read", &list))?;
    if let Some(header) = old_header(tree.source(), &rule, changed) {
        return Err(Error::OldHeader {
            file: file.to_owned(),
            header: header.to_owned(),
        });
    }
    Ok(fs::read(&object).map_err(cache::Error::io("read", &object))?)
}

/// The first of the changed files that was read in its old form.
fn old_header<'a>(source: &Path, rule: &str, changed: &'a BTreeMap<String, String>) -> Option<&'a str> {
    dependencies(rule).find_map(|path| {
        let real = fs::canonicalize(path).ok()?;
        let relative = real.strip_prefix(fs::canonicalize(source).ok()?).ok()?.to_str()?;
        changed.get_key_value(relative).map(|(file, _)| file.as_str())
    })
}
