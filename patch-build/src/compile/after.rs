//! Compiles files with a change in place of the source's own text.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use super::command::dependencies;
use super::pace::Pace;
use super::{Complaint, Error, Unit, overlay};
use crate::cache;
use crate::kept;
use crate::pair::ObjectPair;
use crate::parallel::in_parallel;
use crate::tree::Tree;

/// The folder in which the changed source is.
const FOLDER: &str = "vmpatch-after";

/// Compiles the same files again, with `changed` files in place of the source's. The same change of a source that can't change is
/// compiled once.
///
/// `progress` is told what takes time.
pub fn after(
    tree: &Tree,
    units: Vec<Unit>,
    changed: &BTreeMap<String, String>,
    progress: &dyn Fn(&str),
) -> Result<Vec<ObjectPair>, Error> {
    let change = digest_of(changed);
    let kept = |unit: &Unit| -> Option<Vec<u8>> { tree.kept(&key(unit, &change))?.pop() };
    let mut objects: Vec<Option<Vec<u8>>> = units.iter().map(kept).collect();
    let missing = units.iter().zip(&objects).filter(|(_, object)| object.is_none());
    let missing: Vec<&Unit> = missing.map(|(unit, _)| unit).collect();
    let mut compiled = compile(tree, &missing, changed, &change, progress)?.into_iter();
    for object in objects.iter_mut().filter(|object| object.is_none()) {
        *object = compiled.next();
    }
    let pairs = units.into_iter().zip(objects).filter_map(|(unit, after)| {
        Some(ObjectPair {
            source: unit.source,
            module: unit.module,
            has_ftrace: unit.command.has_ftrace(),
            before: unit.object,
            after: after?,
        })
    });
    Ok(pairs.collect())
}

fn compile(
    tree: &Tree,
    units: &[&Unit],
    changed: &BTreeMap<String, String>,
    change: &str,
    progress: &dyn Fn(&str),
) -> Result<Vec<Vec<u8>>, Error> {
    if units.is_empty() {
        return Ok(Vec::new());
    }
    let root = tree.folder().join(FOLDER);
    if root.exists() {
        fs::remove_dir_all(&root).map_err(cache::Error::io("remove what an interrupted run left in", &root))?;
    }
    let files = units
        .iter()
        .flat_map(|unit| [unit.source.as_str(), unit.command.object()]);
    overlay::make(tree.source(), &root, changed, &files.collect::<Vec<_>>())?;
    let pace = Pace::of(units.len());
    let objects = in_parallel(
        units,
        |number, unit| {
            let path = root.join(format!("vmpatch-object-{number}.o"));
            let (object, inputs) = recompile(tree, &root, unit, &path, changed)?;
            tree.keep(&key(unit, change), &inputs, &[&object])?;
            Ok(object)
        },
        &|number, unit: &&Unit| progress(&format!("compiling the changed {} ({})", unit.source, pace.at(number))),
    );
    let objects = objects.into_iter().collect::<Result<Vec<_>, Error>>()?;
    fs::remove_dir_all(&root).map_err(cache::Error::io("remove", &root))?;
    Ok(objects)
}

/// What an object is made of beside the files that its compiler reads unchanged.
fn key<'k>(unit: &'k Unit, change: &'k str) -> [&'k [u8]; 4] {
    let command = unit.command.text().as_bytes();
    [b"after", unit.source.as_bytes(), command, change.as_bytes()]
}

/// The object, and the unchanged files that it was made of.
fn recompile(
    tree: &Tree,
    root: &Path,
    unit: &Unit,
    object: &Path,
    changed: &BTreeMap<String, String>,
) -> Result<(Vec<u8>, Vec<PathBuf>), Error> {
    // Relative: some of the compiler's messages and sanitizers keep the path, and no module should depend on where it was built.
    let relative = root.strip_prefix(tree.folder()).unwrap_or(root);
    let shell = unit.command.redirected(tree.source(), relative, object);
    tree.compile_by(&shell).map_err(|failure| Error::After {
        file: unit.source.clone(),
        source: Complaint::of(&failure, &relative.to_string_lossy()),
    })?;
    let list = object.with_extension("o.d");
    let rule = fs::read_to_string(&list).map_err(cache::Error::io("read", &list))?;
    if let Some(header) = old_header(tree, &rule, changed) {
        return Err(Error::OldHeader {
            file: unit.source.clone(),
            header: header.to_owned(),
        });
    }
    let bytes = fs::read(object).map_err(cache::Error::io("read", object))?;
    Ok((bytes, unchanged(tree, root, &rule)?))
}

/// The files of a list of dependencies, by their own paths, but for those of the change.
fn unchanged(tree: &Tree, root: &Path, rule: &str) -> Result<Vec<PathBuf>, cache::Error> {
    let root = fs::canonicalize(root).map_err(cache::Error::io("find", root))?;
    let mut files = Vec::new();
    for path in dependencies(rule) {
        let path = tree.folder().join(path);
        let real = fs::canonicalize(&path).map_err(cache::Error::io("find", &path))?;
        if !real.starts_with(&root) {
            files.push(real);
        }
    }
    Ok(files)
}

/// Names a change.
pub(super) fn digest_of(changed: &BTreeMap<String, String>) -> String {
    let parts: Vec<&str> = changed
        .iter()
        .flat_map(|(file, text)| [file.as_str(), text.as_str()])
        .collect();
    kept::digest(&parts)
}

/// The first of the changed files that was read in its old form.
fn old_header<'a>(tree: &Tree, rule: &str, changed: &'a BTreeMap<String, String>) -> Option<&'a str> {
    dependencies(rule).find_map(|path| {
        let real = fs::canonicalize(tree.folder().join(path)).ok()?;
        let relative = real.strip_prefix(tree.source()).ok()?.to_str()?;
        changed.get_key_value(relative).map(|(file, _)| file.as_str())
    })
}
