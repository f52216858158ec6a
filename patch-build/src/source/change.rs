//! A change to the kernel's source: the new texts of some of its files.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use super::c_text;
use super::functions::{self, Versions};
use super::patch::Patched;
use super::{Source, package, patch};
use crate::cache::{self, Cache};
use crate::packages;

/// Why a change could not be made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A diff does not fit.
    #[error(transparent)]
    Patch(#[from] patch::Error),
    /// A function could not be taken over.
    #[error(transparent)]
    Functions(#[from] functions::Error),
    /// A package could not be had.
    #[error(transparent)]
    Package(#[from] packages::Error),
    /// A file could not be read.
    #[error(transparent)]
    Files(#[from] cache::Error),
    /// Not of the form that is wanted.
    #[error("{found:?} is not {wanted}")]
    Form {
        /// What was given.
        found: String,
        /// What it should be.
        wanted: &'static str,
    },
    /// The older version is not the kernel's own source, and differs where it matters.
    #[error("{function} of {file} is another one in {from} than in the kernel's own source, {own}")]
    OtherFrom {
        /// The function.
        function: String,
        /// Its file.
        file: String,
        /// The older version.
        from: String,
        /// The kernel's source.
        own: String,
    },
}

/// A change, ready to be compiled.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Change {
    /// The changed files, relative to the source, with their new text.
    pub files: BTreeMap<String, String>,
    /// What the fix was taken from, for the module's note.
    pub sources: Vec<String>,
    /// Definitions that came along with the named functions, as `FILE: NAME`.
    pub helpers: Vec<String>,
    /// Files of the diff that this kernel is not compiled from: file, and why.
    pub left_out: Vec<(String, String)>,
}

impl Change {
    /// The change that a unified diff makes. `name` is what the diff is called in the module's note.
    pub fn patch(source: &Source, name: &str, diff: &str) -> Result<Self, Error> {
        let work = std::env::temp_dir().join(format!("vmpatch-patch-{}", std::process::id()));
        let io = |action| cache::Error::io(action, &work);
        fs::create_dir(&work).map_err(io("make the folder"))?;
        let patched = patch::apply(source, diff, &work);
        fs::remove_dir_all(&work).map_err(io("remove"))?;
        let Patched { files, left_out } = patched?;
        Ok(Self {
            files,
            sources: vec![name.to_owned()],
            helpers: Vec::new(),
            left_out,
        })
    }

    /// The change of single functions (`FILE:NAME`) between two versions of the distribution's source (`PACKAGE=VERSION`).
    ///
    /// `progress` is told what takes time.
    pub fn functions(
        cache: &Cache,
        source: &Source,
        from: &str,
        to: &str,
        names: &[String],
        progress: &dyn Fn(&str),
    ) -> Result<Self, Error> {
        let mut by_file: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        for name in names {
            let (file, function) = name
                .split_once(':')
                .filter(|(file, _)| is_source_path(file))
                .ok_or_else(|| form(name, "FILE:FUNCTION with a file of the kernel's source"))?;
            by_file.entry(file).or_default().push(function);
        }
        let files: Vec<&str> = by_file.keys().copied().collect();
        let fetched = |package| {
            progress(&format!("fetching {package}"));
            fetched(cache, package, &files)
        };
        let newer = fetched(to)?;
        let is_own = source.id == from.replace('=', "_");
        let older = if is_own { None } else { Some(fetched(from)?) };
        let mut change = Self {
            sources: vec![from.to_owned(), to.to_owned()],
            ..Self::default()
        };
        for (file, functions) in by_file {
            let old = text(&source.folder, file)?;
            let older = older.as_deref().map(|older| text(older, file)).transpose()?;
            if let Some(function) = older.and_then(|older| first_other(&functions, &older, &old)) {
                return Err(Error::OtherFrom {
                    function: function.to_owned(),
                    file: file.to_owned(),
                    from: from.to_owned(),
                    own: source.id.clone(),
                });
            }
            let versions = Versions {
                file,
                from,
                old: &old,
                to,
                new: &text(&newer, file)?,
            };
            let taken = versions.take(&functions)?;
            let helpers = taken.helpers.iter().map(|helper| format!("{file}: {helper}"));
            change.helpers.extend(helpers);
            change.files.insert(file.to_owned(), taken.text);
        }
        Ok(change)
    }
}

/// A folder with these files of the source in a package `NAME=VERSION`.
fn fetched(cache: &Cache, package: &str, files: &[&str]) -> Result<PathBuf, Error> {
    let (name, version) = package.split_once('=').ok_or_else(|| {
        form(
            package,
            "PACKAGE=VERSION of a source package, as linux-source-6.1=6.1.170-3",
        )
    })?;
    Ok(package::files(cache, name, version, files)?)
}

fn form(found: &str, wanted: &'static str) -> Error {
    Error::Form {
        found: found.to_owned(),
        wanted,
    }
}

/// Whether a path stays in the source, and is that of C text.
fn is_source_path(file: &str) -> bool {
    let inside = file.split('/').all(|part| !["", ".", ".."].contains(&part));
    inside && (file.ends_with(".c") || file.ends_with(".h"))
}

fn text(folder: &Path, file: &str) -> Result<String, cache::Error> {
    let path = folder.join(file);
    fs::read_to_string(&path).map_err(cache::Error::io("read", &path))
}

/// The first of the functions that two texts do not define alike.
fn first_other<'a>(names: &[&'a str], one: &str, other: &str) -> Option<&'a str> {
    let (one, other) = (c_text::functions(one), c_text::functions(other));
    let texts = |all: &[c_text::Function<'_>], name: &str| -> Vec<String> {
        let called = all.iter().filter(|function| function.is_called(name));
        called.map(|function| function.text.to_owned()).collect()
    };
    names
        .iter()
        .copied()
        .find(|name| texts(&one, name) != texts(&other, name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_function_that_differs_is_named() {
        let one = "int a(void)\n{\n}\nint b(void)\n{\n}\n";
        let other = "int a(void)\n{\n}\nint b(void)\n{\n\treturn 1;\n}\n";
        assert_eq!(first_other(&["a"], one, other), None);
        assert_eq!(first_other(&["a", "b"], one, other), Some("b"));
    }

    #[test]
    fn a_function_is_named_with_a_file_of_the_source() {
        let cache = Cache::at("/nonexistent");
        let source = Source {
            folder: "/nonexistent".into(),
            id: "linux-source-6.1_1".to_owned(),
            fixed: true,
        };
        let from = "linux-source-6.1=1";
        for name in ["f", "../a.c:f", "/a.c:f", "a.S:f"] {
            let error = Change::functions(&cache, &source, from, from, &[name.to_owned()], &|_| ()).unwrap_err();
            assert!(error.to_string().contains("is not FILE:FUNCTION"), "{error}");
        }
        let error = Change::functions(
            &cache,
            &source,
            from,
            "linux-source-6.1",
            &["a.c:f".to_owned()],
            &|_| (),
        )
        .unwrap_err();
        assert!(error.to_string().contains("is not PACKAGE=VERSION"), "{error}");
    }
}
