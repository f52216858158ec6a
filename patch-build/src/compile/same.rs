//! Which files a change of headers changes the code of: by what the compiler reads of each before and after.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use super::after::old_header;
use super::old_numbers::with_old_numbers;
use super::pace::Pace;
use super::{Error, overlay};
use crate::cache;
use crate::parallel::in_parallel;
use crate::plan::Planned;
use crate::source::slice;
use crate::tree::Tree;

/// Whether the change changes the code of each of the files, or might: where one can't be preprocessed, or reads an old header.
///
/// `progress` is told what takes time.
pub fn changed_code(
    tree: &Tree,
    planned: &[&Planned],
    changed: &BTreeMap<String, String>,
    progress: &dyn Fn(&str),
) -> Result<Vec<bool>, Error> {
    let root = tree.folder().join("vmpatch-read");
    if root.exists() {
        fs::remove_dir_all(&root).map_err(cache::Error::io("remove what an interrupted run left in", &root))?;
    }
    let mut texts = BTreeMap::new();
    for (file, text) in changed {
        let path = tree.source().join(file);
        let old = fs::read_to_string(&path).map_err(cache::Error::io("read", &path))?;
        texts.insert(file.clone(), with_old_numbers(&old, text));
    }
    let files = planned
        .iter()
        .flat_map(|one| [one.source.as_str(), one.object.as_str()]);
    overlay::make(tree.source(), &root, &texts, &files.collect::<Vec<_>>())?;
    let pace = Pace::of(planned.len());
    let done = in_parallel(
        planned,
        |number, planned| !is_same(tree, &root, number, planned, changed).unwrap_or(false),
        &|number, planned: &&Planned| {
            progress(&format!(
                "looking at what {} uses of the change ({})",
                planned.source,
                pace.at(number)
            ));
        },
    );
    fs::remove_dir_all(&root).map_err(cache::Error::io("remove", &root))?;
    Ok(done)
}

/// Whether the compiler makes the same of a file; `None` where that could not be told.
fn is_same(
    tree: &Tree,
    root: &Path,
    number: usize,
    planned: &Planned,
    changed: &BTreeMap<String, String>,
) -> Option<bool> {
    let [before, after] = ["before", "after"].map(|side| root.join(format!("vmpatch-{side}-{number}.i")));
    tree.shell(&planned.command.preprocessing(None, &before)).ok()?;
    let relative = root.strip_prefix(tree.folder()).unwrap_or(root);
    let moved = Some((tree.source(), relative));
    tree.shell(&planned.command.preprocessing(moved, &after)).ok()?;
    let list = fs::read_to_string(after.with_extension("i.d")).ok()?;
    if old_header(tree, &list, changed).is_some() {
        return None;
    }
    let [one, other] = [&before, &after].map(|path| fs::read(path).ok());
    let (one, other) = (one?, other?);
    let (one, other) = (String::from_utf8_lossy(&one), String::from_utf8_lossy(&other));
    // They take as much room as the sources of the kernel.
    for path in [&before, &after] {
        fs::remove_file(path).ok()?;
    }
    Some(match () {
        () if planned.source.ends_with(".S") => slice::same_assembly(&one, &other),
        () if planned.command.forgets_unused() => slice::same_code(&one, &other),
        () => slice::same_words(&one, &other),
    })
}
