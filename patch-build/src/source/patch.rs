//! A change as a unified diff, as `diff -u` and git make it.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use crate::{cache, command};

/// What a kernel is not made of: a diff of the kernel's developers often has tests and documentation with it.
const OUTSIDE: [&str; 4] = ["Documentation/", "tools/", "samples/", "LICENSES/"];

/// Why a diff could not be applied.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no `+++` line in it.
    #[error("no file of the kernel is changed: no line `+++ b/FILE` in the patch")]
    Empty,
    /// A file appears or disappears.
    #[error("the patch makes or removes the file {file}: only files that the kernel's source has can be changed")]
    NewOrGone {
        /// The file.
        file: String,
    },
    /// A path that leads out of the source.
    #[error("the patch changes {file:?}, which is no path in the kernel's source")]
    Outside {
        /// The path.
        file: String,
    },
    /// A file that is neither C nor a header.
    #[error("the patch changes {file}: only C files and headers can be compiled and compared")]
    NotC {
        /// The file.
        file: String,
    },
    /// The file is not there.
    #[error("the kernel's source has no {file}, which the patch changes")]
    Missing {
        /// The file.
        file: String,
    },
    /// `patch` refused it.
    #[error("the patch does not fit the kernel's source")]
    DoesNotFit(#[from] command::Error),
    /// A file could not be read or written.
    #[error(transparent)]
    Files(#[from] cache::Error),
}

/// The files that a diff changes, with their new text; `source` itself is not touched. Context must fit to the letter, at whatever
/// line. `work` is an empty folder for this.
///
/// Files that are no part of a kernel (tests, documentation) are left out.
pub fn apply(source: &Path, diff: &str, work: &Path) -> Result<BTreeMap<String, String>, Error> {
    let files = changed_files(diff)?;
    if files.is_empty() {
        return Err(Error::Empty);
    }
    for file in &files {
        let (old, new) = (source.join(file), work.join(file));
        if !old.is_file() {
            return Err(Error::Missing { file: file.clone() });
        }
        let folder = new.parent().unwrap_or(work);
        fs::create_dir_all(folder).map_err(cache::Error::io("make the folder", folder))?;
        fs::copy(&old, &new).map_err(cache::Error::io("copy to", &new))?;
    }
    let folder = work.to_string_lossy();
    let args = [
        "-p1",
        "--batch",
        "--forward",
        "--fuzz=0",
        "--no-backup-if-mismatch",
        "-r",
        "-",
        "-d",
        &folder,
    ];
    command::filter("patch", &args, kernel_part(diff).as_bytes())?;
    let read = |file: String| {
        let path = work.join(&file);
        let text = fs::read_to_string(&path).map_err(cache::Error::io("read", &path))?;
        Ok((file, text))
    };
    files.into_iter().map(read).collect()
}

/// The files that a diff changes, out of its headers; those outside the kernel left out.
fn changed_files(diff: &str) -> Result<Vec<String>, Error> {
    let mut files = Vec::new();
    for (old, new) in headers(diff) {
        let file = match (stripped(old), stripped(new)) {
            (Some(old), Some(new)) if old == new => new,
            (None, Some(file)) | (Some(file), None) | (Some(_), Some(file)) if is_outside(file) => file,
            (old, new) => {
                return Err(Error::NewOrGone {
                    file: new.or(old).unwrap_or_default().to_owned(),
                });
            }
        };
        if is_outside(file) || files.iter().any(|known| known == file) {
            continue;
        }
        let is_path = file.split('/').all(|part| !["", ".", ".."].contains(&part));
        if !is_path {
            return Err(Error::Outside { file: file.to_owned() });
        }
        if !file.ends_with(".c") && !file.ends_with(".h") {
            return Err(Error::NotC { file: file.to_owned() });
        }
        files.push(file.to_owned());
    }
    Ok(files)
}

fn is_outside(file: &str) -> bool {
    OUTSIDE.iter().any(|folder| file.starts_with(folder))
}

/// The paths of each `---` line and of the `+++` line behind it.
fn headers(diff: &str) -> impl Iterator<Item = (&str, &str)> {
    diff.lines()
        .zip(diff.lines().skip(1))
        .filter_map(|(old, new)| Some((path(old.strip_prefix("--- ")?), path(new.strip_prefix("+++ ")?))))
}

/// The path in a header, without the time that `diff` writes behind a tab.
fn path(header: &str) -> &str {
    header.split('\t').next().unwrap_or(header).trim_end()
}

/// A header's path without its first folder; `None` for no file.
fn stripped(path: &str) -> Option<&str> {
    if path == "/dev/null" {
        return None;
    }
    Some(path.split_once('/').map_or(path, |(_, rest)| rest))
}

/// The diff without the files that are no part of the kernel.
fn kernel_part(diff: &str) -> String {
    let lines: Vec<&str> = diff.split_inclusive('\n').collect();
    let mut out = String::with_capacity(diff.len());
    let mut outside = false;
    for (index, line) in lines.iter().enumerate() {
        let next = lines.get(index + 1).copied().unwrap_or_default();
        if let (Some(old), Some(new)) = (line.strip_prefix("--- "), next.strip_prefix("+++ ")) {
            let file = stripped(path(new)).or(stripped(path(old)));
            outside = file.is_some_and(is_outside);
        }
        if !outside {
            out.push_str(line);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    const DIFF: &str = "A fix.\n---\n net/a.c | 2 +-\n\ndiff --git a/net/a.c b/net/a.c\n--- a/net/a.c\t2026\n+++ b/net/a.c\n\
                        @@ -1,3 +1,3 @@\n one\n-two\n+2\n three\n--- /dev/null\n+++ b/tools/test.c\n@@ -0,0 +1 @@\n+x\n";

    fn applied(name: &str, text: &str, diff: &str) -> Result<BTreeMap<String, String>, Error> {
        let base = std::env::temp_dir().join(format!("vmpatch-patch-{}-{name}", std::process::id()));
        drop(fs::remove_dir_all(&base));
        let (source, work) = (base.join("source"), base.join("work"));
        fs::create_dir_all(source.join("net")).unwrap();
        fs::create_dir_all(&work).unwrap();
        fs::write(source.join("net/a.c"), text).unwrap();
        let result = apply(&source, diff, &work);
        assert_eq!(fs::read_to_string(source.join("net/a.c")).unwrap(), text);
        fs::remove_dir_all(&base).unwrap();
        result
    }

    #[test]
    fn a_diff_changes_the_kernels_files_and_leaves_tests_out() {
        let files = applied("fits", "zero\none\ntwo\nthree\n", DIFF).unwrap();
        assert_eq!(
            files,
            BTreeMap::from([("net/a.c".to_owned(), "zero\none\n2\nthree\n".to_owned())])
        );
    }

    #[test]
    fn a_diff_whose_context_is_not_there_does_not_fit() {
        let error = applied("other", "one\ntwo\nfour\n", DIFF).unwrap_err();
        assert!(matches!(error, Error::DoesNotFit(_)), "{error:?}");
    }

    #[test]
    fn new_files_paths_out_of_the_source_and_files_that_are_no_c_are_refused() {
        let refused = |diff: &str| applied("refused", "", diff).unwrap_err().to_string();
        assert!(refused("--- /dev/null\n+++ b/net/b.c\n").starts_with("the patch makes or removes the file net/b.c"));
        assert!(refused("--- a/../x.c\n+++ b/../x.c\n").contains("no path in the kernel's source"));
        assert!(refused("--- a/net/Makefile\n+++ b/net/Makefile\n").contains("net/Makefile: only C files"));
        assert!(refused("--- a/net/c.c\n+++ b/net/c.c\n").contains("has no net/c.c"));
        assert!(matches!(applied("none", "", "hello"), Err(Error::Empty)));
    }
}
