//! A change as a unified diff, as `diff -u` and git make it.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use super::{Source, hunks, package};
use crate::{cache, command};

/// What a kernel is not made of: a diff of the kernel's developers often has tests and documentation with it.
const OUTSIDE: [&str; 4] = ["Documentation/", "tools/", "samples/", "LICENSES/"];

/// Why a diff could not be applied.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no `+++` line in it.
    #[error("no file of the kernel is changed: no line `+++ b/FILE` in the patch")]
    Empty,
    /// Nothing of the kernel is in it.
    #[error("nothing of the kernel is made of what the patch changes: {}", left_out.join(", "))]
    Nothing {
        /// Each changed file, and why it is left out.
        left_out: Vec<String>,
    },
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
    /// A part of it may belong elsewhere.
    #[error(transparent)]
    Place(#[from] hunks::Error),
    /// `patch` took another place than the one that is meant.
    #[error("the patch does not fit the kernel's source where it should: {said}")]
    Elsewhere {
        /// What `patch` said.
        said: String,
    },
    /// `patch` refused it.
    #[error("the patch does not fit the kernel's source")]
    DoesNotFit(#[from] command::Error),
    /// A file could not be read or written.
    #[error(transparent)]
    Files(#[from] cache::Error),
}

/// What a diff changes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Patched {
    /// The files, with their new text.
    pub files: BTreeMap<String, String>,
    /// Those that this kernel is not compiled from: file, and why.
    pub left_out: Vec<(String, String)>,
}

/// The files that a diff changes, with their new text; `source` itself is not touched. Context must fit to the letter, at whatever
/// line; where it fits more than once, line and function must tell which place is meant. `work` is an empty folder for this.
///
/// Files that are no part of a kernel (tests, documentation) are left out without a word.
pub fn apply(source: &Source, diff: &str, work: &Path) -> Result<Patched, Error> {
    let unused = |file: &str| package::why_unused(source, file);
    let Changed { files, left_out } = changed_files(diff, &unused)?;
    if files.is_empty() {
        return Err(nothing(&left_out));
    }
    for file in &files {
        let (old, new) = (source.folder.join(file), work.join(file));
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
    let is_wanted = |file: &str| !is_outside(file) && unused(file).is_none();
    let old = |old: &str, new: &str| {
        let file = stripped(path(new)).or(stripped(path(old)))?;
        let text = fs::read(source.folder.join(file)).ok()?;
        Some(hunks::Old {
            name: file.to_owned(),
            text: String::from_utf8_lossy(&text).into_owned(),
        })
    };
    let diff = hunks::placed(&part(diff, &is_wanted), &old)?;
    let said = command::filter("patch", &args, diff.as_bytes())?;
    let said = String::from_utf8_lossy(&said);
    if let Some(line) = said.lines().find(|line| line.contains("(offset ")) {
        return Err(Error::Elsewhere { said: line.to_owned() });
    }
    let read = |file: String| {
        let path = work.join(&file);
        let text = fs::read_to_string(&path).map_err(cache::Error::io("read", &path))?;
        Ok((file, text))
    };
    Ok(Patched {
        files: files.into_iter().map(read).collect::<Result<_, Error>>()?,
        left_out,
    })
}

/// Why a diff that changes nothing but these files is refused.
fn nothing(left_out: &[(String, String)]) -> Error {
    if left_out.is_empty() {
        return Error::Empty;
    }
    Error::Nothing {
        left_out: left_out.iter().map(|(file, why)| format!("{file}: {why}")).collect(),
    }
}

/// The files that a diff names.
#[derive(Debug, Default)]
struct Changed {
    files: Vec<String>,
    left_out: Vec<(String, String)>,
}

/// The files that a diff changes, out of its headers; those outside the kernel are not among them. `unused` says why a file is none
/// that the kernel is compiled from.
fn changed_files(diff: &str, unused: &dyn Fn(&str) -> Option<&'static str>) -> Result<Changed, Error> {
    let Changed {
        mut files,
        mut left_out,
    } = Changed::default();
    for (old, new) in headers(diff) {
        let is_none = |file: &str| is_outside(file) || unused(file).is_some();
        let file = match (stripped(old), stripped(new)) {
            (Some(old), Some(new)) if old == new => new,
            (None, Some(file)) | (Some(file), None) | (Some(_), Some(file)) if is_none(file) => file,
            (old, new) => {
                return Err(Error::NewOrGone {
                    file: new.or(old).unwrap_or_default().to_owned(),
                });
            }
        };
        if is_outside(file) || files.iter().any(|known| known == file) {
            continue;
        }
        if let Some(why) = unused(file) {
            if !left_out.iter().any(|(known, _)| known == file) {
                left_out.push((file.to_owned(), why.to_owned()));
            }
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
    Ok(Changed { files, left_out })
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

/// The diff of the files that are wanted.
fn part(diff: &str, is_wanted: &dyn Fn(&str) -> bool) -> String {
    let lines: Vec<&str> = diff.split_inclusive('\n').collect();
    let mut out = String::with_capacity(diff.len());
    let mut is_left_out = false;
    for (index, line) in lines.iter().enumerate() {
        let next = lines.get(index + 1).copied().unwrap_or_default();
        if let (Some(old), Some(new)) = (line.strip_prefix("--- "), next.strip_prefix("+++ ")) {
            let file = stripped(path(new)).or(stripped(path(old)));
            is_left_out = !file.is_none_or(is_wanted);
        }
        if !is_left_out {
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

    fn applied(name: &str, text: &str, diff: &str) -> Result<Patched, Error> {
        let base = std::env::temp_dir().join(format!("vmpatch-patch-{}-{name}", std::process::id()));
        drop(fs::remove_dir_all(&base));
        let (source, work) = (base.join("source"), base.join("work"));
        fs::create_dir_all(source.join("net")).unwrap();
        fs::create_dir_all(&work).unwrap();
        fs::write(source.join("net/a.c"), text).unwrap();
        let of_cache = Source {
            folder: source.clone(),
            id: "linux-source-6.1_1".to_owned(),
            fixed: true,
        };
        let result = apply(&of_cache, diff, &work);
        assert_eq!(fs::read_to_string(source.join("net/a.c")).unwrap(), text);
        fs::remove_dir_all(&base).unwrap();
        result
    }

    #[test]
    fn a_diff_changes_the_kernels_files_and_leaves_tests_out() {
        let Patched { files, left_out } = applied("fits", "zero\none\ntwo\nthree\n", DIFF).unwrap();
        assert!(left_out.is_empty());
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

    #[test]
    fn files_that_no_code_of_this_kernel_reads_are_left_out_by_name() {
        const MORE: &str = "--- a/drivers/gpu/drm/amd/include/a.h\n+++ b/drivers/gpu/drm/amd/include/a.h\n@@ -1 +1 @@\n-x\n+y\n\
                            --- /dev/null\n+++ b/arch/arm/boot/dts/b.dts\n@@ -0,0 +1 @@\n+x\n";
        let Patched { files, left_out } = applied("unused", "one\ntwo\nthree\n", &format!("{MORE}{DIFF}")).unwrap();
        assert_eq!(files.into_keys().collect::<Vec<_>>(), ["net/a.c"]);
        let names: Vec<&str> = left_out.iter().map(|(file, _)| file.as_str()).collect();
        assert_eq!(names, ["drivers/gpu/drm/amd/include/a.h", "arch/arm/boot/dts/b.dts"]);
        let error = applied("unused-alone", "", MORE).unwrap_err().to_string();
        assert!(
            error.starts_with("nothing of the kernel is made of what the patch changes: drivers/gpu/"),
            "{error}"
        );
    }

    /// Two functions that look alike where the diff changes one of them.
    const ALIKE: &str = "int f(void)\n{\n\tint n = 0;\n\n\tlook();\n\treturn n;\n}\n\n\
                         int g(void)\n{\n\tint n = 0;\n\n\tlook();\n\treturn n;\n}\n\nint h(void);\n";

    /// A change of `look();` in the function that a heading names, made at a line of another version.
    fn change_of(function: &str, line: u32) -> String {
        format!(
            "--- a/net/a.c\n+++ b/net/a.c\n@@ -{line},7 +{line},7 @@{function}\n {{\n \tint n = 0;\n \n-\tlook();\n+\tlisten();\n \treturn n;\n }}\n \n"
        )
    }

    #[test]
    fn a_diff_that_fits_at_two_places_is_only_applied_where_its_line_or_its_function_is() {
        let changed = |name: &str, diff: &str| {
            let text = applied(name, ALIKE, diff)?.files.remove("net/a.c").unwrap();
            let at = text.find("listen").unwrap();
            Ok::<_, Error>(if at < text.find("int g").unwrap() { "f" } else { "g" })
        };
        for (name, function, line, expected) in [
            ("line-f", "", 2, "f"),
            ("line-g", "", 10, "g"),
            ("heading-f", " int f(void)", 4, "f"),
            ("heading-g", " int g(void)", 9, "g"),
            ("nearer-to-other", " int g(void)", 4, "g"),
        ] {
            assert_eq!(changed(name, &change_of(function, line)).unwrap(), expected, "{name}");
        }
        for (name, function, line) in [
            ("no-heading", "", 4),
            ("of-other", " int h(void)", 4),
            ("line-of-other", " int g(void)", 2),
        ] {
            let error = changed(name, &change_of(function, line)).unwrap_err().to_string();
            assert!(
                error.contains("net/a.c") && error.contains("lines 2 and 10"),
                "{name}: {error}"
            );
        }
    }

    #[test]
    fn a_diff_without_context_is_refused() {
        let diff = "--- a/net/a.c\n+++ b/net/a.c\n@@ -5,0 +6 @@\n+\tlisten();\n";
        let error = applied("no-context", ALIKE, diff).unwrap_err().to_string();
        assert!(error.contains("net/a.c") && error.contains("context"), "{error}");
    }
}
