//! Which C files a changed header gets into.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs;
use std::path::Path;

use crate::cache::Error;

/// What no x86-64 kernel is compiled of.
const OUTSIDE: [&str; 7] = [
    "Documentation",
    "tools",
    "samples",
    "scripts",
    "LICENSES",
    "rust",
    ".git",
];

/// The C files that include one of `headers`, directly or through other headers; in order. Includes are matched by the end of
/// their path, so that a file may be named that finds another header of that name; conditions around them are not looked at.
///
/// All C files and headers of the source are read for it, or, for a header outside the include folders, those of its top folder.
pub fn find(source: &Path, headers: &[&str]) -> Result<BTreeSet<String>, Error> {
    let is_public = |header: &&str| header.starts_with("include/") || header.starts_with("arch/x86/include/");
    let includes = if headers.iter().any(is_public) {
        includes_below(source, "")?
    } else {
        let tops: BTreeSet<&str> = headers
            .iter()
            .map(|header| header.split('/').next().unwrap_or(""))
            .collect();
        let mut all = BTreeMap::new();
        for top in tops {
            all.extend(includes_below(source, top)?);
        }
        all
    };
    Ok(reached(&includes, headers))
}

/// The files of a folder and of those below, each with the paths that it includes.
fn includes_below(source: &Path, top: &str) -> Result<BTreeMap<String, Vec<String>>, Error> {
    let mut all = BTreeMap::new();
    let mut folders = vec![top.to_owned()];
    while let Some(folder) = folders.pop() {
        let path = source.join(&folder);
        let entries = fs::read_dir(&path).map_err(Error::io("list", &path))?;
        for entry in entries.filter_map(Result::ok) {
            let (Ok(name), Ok(kind)) = (entry.file_name().into_string(), entry.file_type()) else {
                continue;
            };
            let below = if folder.is_empty() {
                name
            } else {
                format!("{folder}/{name}")
            };
            if kind.is_dir() && is_inside(&below) {
                folders.push(below);
            } else if kind.is_file() && (below.ends_with(".c") || below.ends_with(".h")) {
                let text = fs::read(entry.path()).map_err(Error::io("read", &entry.path()))?;
                let includes: Vec<String> = includes(&String::from_utf8_lossy(&text)).map(str::to_owned).collect();
                all.insert(below, includes);
            }
        }
    }
    Ok(all)
}

/// Whether a folder may have files of an x86-64 kernel.
fn is_inside(folder: &str) -> bool {
    !OUTSIDE.contains(&folder)
        && (!folder.starts_with("arch/") || folder == "arch/x86" || folder.starts_with("arch/x86/"))
}

/// The paths that a text includes.
fn includes(text: &str) -> impl Iterator<Item = &str> {
    text.lines().filter_map(|line| {
        let rest = line
            .trim_start()
            .strip_prefix('#')?
            .trim_start()
            .strip_prefix("include")?
            .trim_start();
        let rest = rest.strip_prefix(['"', '<'])?;
        rest.split(['"', '>']).next()
    })
}

/// The C files from which one of `headers` is reached.
fn reached(includes: &BTreeMap<String, Vec<String>>, headers: &[&str]) -> BTreeSet<String> {
    let mut by_name: HashMap<&str, Vec<(&str, &str)>> = HashMap::new();
    for (file, included) in includes {
        for path in included {
            by_name.entry(base(path)).or_default().push((path, file));
        }
    }
    let mut files = BTreeSet::new();
    let mut seen: BTreeSet<&str> = BTreeSet::new();
    let mut wanted: Vec<&str> = headers.to_vec();
    while let Some(header) = wanted.pop() {
        for (path, file) in by_name.get(base(header)).into_iter().flatten() {
            if !names(path, header) || !seen.insert(file) {
                continue;
            }
            if file.ends_with(".c") {
                files.insert((*file).to_owned());
            }
            // Some C files are included, too.
            wanted.push(file);
        }
    }
    files
}

fn base(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or(path)
}

/// Whether an include of `path` may mean `header`.
fn names(path: &str, header: &str) -> bool {
    let path = path.trim_start_matches("../").trim_start_matches("./");
    header == path || header.strip_suffix(path).is_some_and(|rest| rest.ends_with('/')) || path.contains("/../")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_is_followed_through_other_headers_to_c_files() {
        let file = |name: &str, included: &[&str]| {
            let included = included.iter().map(|path| (*path).to_owned()).collect();
            (name.to_owned(), included)
        };
        let includes = BTreeMap::from([
            file("include/net/a.h", &[]),
            file("include/net/b.h", &["net/a.h"]),
            file("net/x.c", &["net/b.h"]),
            file("net/y.c", &["../include/net/a.h"]),
            file("net/z.c", &["other/a.h", "linux/list.h"]),
        ]);
        let found: Vec<String> = reached(&includes, &["include/net/a.h"]).into_iter().collect();
        assert_eq!(found, ["net/x.c", "net/y.c"]);
    }

    #[test]
    fn includes_are_read_in_every_spelling() {
        let text = "#include <a.h>\n # include \"b/c.h\" /* x */\n#include MACRO\n#define include\n";
        assert_eq!(includes(text).collect::<Vec<_>>(), ["a.h", "b/c.h"]);
    }

    #[test]
    fn other_architectures_are_outside() {
        assert!(is_inside("arch/x86/kernel") && is_inside("arch") && !is_inside("arch/arm64") && !is_inside("tools"));
    }
}
