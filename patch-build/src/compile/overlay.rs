//! The kernel's source with some files changed, made of links to the unchanged ones: the source itself stays as it is.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use crate::cache::Error;

/// Makes the folder `root`, which must not exist: as `source`, with the text of `changed` files in place of theirs.
///
/// Real folders are those of the changed files and of the `compiled` ones, with those above them; everything else is a link.
/// Of a compiled file that is spelled with `..`, the folders before that are real, too. So a `#include "x.h"` finds a changed file beside the one that includes it, and `-I` those in include folders. Where a
/// header reaches a changed one by `..` through a link, it would find the unchanged one: see the list of files that the
/// compiler leaves.
pub(super) fn make(
    source: &Path,
    root: &Path,
    changed: &BTreeMap<String, String>,
    compiled: &[&str],
) -> Result<(), Error> {
    let mut folders = BTreeSet::from([""]);
    for file in changed.keys().map(String::as_str).chain(compiled.iter().copied()) {
        let above = file.match_indices('/').filter_map(|(at, _)| file.get(..at));
        folders.extend(above.take_while(|folder| !folder.ends_with("..")));
    }
    // In order, a folder comes before those in it.
    for folder in &folders {
        let (old, new) = (source.join(folder), root.join(folder));
        fs::create_dir(&new).map_err(Error::io("make the folder", &new))?;
        let entries = fs::read_dir(&old).map_err(Error::io("list", &old))?;
        for entry in entries.filter_map(Result::ok) {
            let Ok(name) = entry.file_name().into_string() else {
                continue;
            };
            let path = if folder.is_empty() {
                name
            } else {
                format!("{folder}/{name}")
            };
            let link = root.join(&path);
            match changed.get(&path) {
                Some(text) => fs::write(&link, text).map_err(Error::io("write", &link))?,
                None if folders.contains(path.as_str()) => {}
                None => symlink(entry.path(), &link).map_err(Error::io("make the link", &link))?,
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changed_files_are_real_and_everything_else_is_as_it_was() {
        let base = std::env::temp_dir().join(format!("vmpatch-overlay-{}", std::process::id()));
        drop(fs::remove_dir_all(&base));
        let source = base.join("source");
        for file in ["net/a.c", "net/a.h", "net/deep/b.c", "fs/c.c", "Makefile"] {
            let path = source.join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, format!("old {file}")).unwrap();
        }
        let root = base.join("root");
        let changed = BTreeMap::from([("net/a.h".to_owned(), "new".to_owned())]);
        make(&source, &root, &changed, &["net/deep/b.c"]).unwrap();
        assert_eq!(fs::read_to_string(root.join("net/deep/../a.h")).unwrap(), "new");
        assert_eq!(
            fs::read_to_string(root.join("net/deep/b.c")).unwrap(),
            "old net/deep/b.c"
        );
        assert!(!root.join("net/deep").is_symlink() && root.join("fs").is_symlink());
        assert_eq!(fs::read_to_string(source.join("net/a.h")).unwrap(), "old net/a.h");
        fs::remove_dir_all(&base).unwrap();
    }
}
