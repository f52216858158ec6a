//! Which files a changed one gets into: those that include it.

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

/// What the compiler reads before every C file: it is on its command line (Makefile and scripts/Makefile.lib of 6.1, `-include`).
const BEFORE_ALL: [&str; 3] = [
    "include/linux/kconfig.h",
    "include/linux/compiler-version.h",
    "include/linux/compiler_types.h",
];

/// The files that a change of other files gets into.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Includers {
    /// C files.
    pub c: BTreeSet<String>,
    /// Files of assembly.
    pub assembly: BTreeSet<String>,
    /// Those of the changed files that others may include.
    pub included: BTreeSet<String>,
    /// True where every C file is reached, whatever it includes.
    pub everything: bool,
}

/// The files that include one of `changed` (headers, or C files, some of which others include), directly or through others.
/// Includes are matched by the end of their path, so that a file may be named that finds another header of that name;
/// conditions around them are not looked at.
///
/// All files of the source are read for it, or, for what lies outside the include folders, those of its part of the source.
pub fn find(source: &Path, changed: &[&str]) -> Result<Includers, Error> {
    let is_public = |file: &&str| file.starts_with("include/") || file.starts_with("arch/x86/include/");
    let includes = if changed.iter().any(is_public) {
        includes_below(source, "")?
    } else {
        let parts: BTreeSet<&str> = changed.iter().map(|file| part(file)).collect();
        let mut all = BTreeMap::new();
        for part in parts {
            all.extend(includes_below(source, part)?);
        }
        all
    };
    Ok(reached(&includes, changed))
}

/// Whether the kernel's build may make an object of a C file by itself: the Makefile of its folder, or of one above, has an object
/// of that name. Some files that others include could be compiled, but never are (the scheduler's).
pub fn has_own_object(source: &Path, file: &str) -> Result<bool, Error> {
    let Some(object) = file.strip_suffix(".c").map(|stem| format!("{}.o", base(stem))) else {
        return Ok(false);
    };
    let mut folder = file;
    while let Some((above, _)) = folder.rsplit_once('/') {
        folder = above;
        for makefile in ["Makefile", "Kbuild"] {
            let path = source.join(folder).join(makefile);
            if path.is_file() {
                let text = fs::read_to_string(&path).map_err(Error::io("read", &path))?;
                let mut words = text.split(|c: char| c.is_whitespace() || c == '=');
                if words.any(|word| base(word) == object) {
                    return Ok(true);
                }
            }
        }
    }
    Ok(false)
}

/// The part of the source whose files may include what is no public header. Drivers of one kind do not include those of another,
/// and there are many.
fn part(file: &str) -> &str {
    let mut ends = file.match_indices('/').map(|(at, _)| at);
    let (first, second) = (ends.next(), ends.next());
    let end = match second {
        Some(second) if file.starts_with("drivers/") || file.starts_with("sound/") => Some(second),
        _ => first,
    };
    end.and_then(|end| file.get(..end)).unwrap_or("")
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
            } else if kind.is_file() && [".c", ".h", ".S"].iter().any(|end| below.ends_with(end)) {
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

/// The files from which one of `changed` is reached.
fn reached(includes: &BTreeMap<String, Vec<String>>, changed: &[&str]) -> Includers {
    let mut by_name: HashMap<&str, Vec<(&str, &str)>> = HashMap::new();
    for (file, included) in includes {
        for path in included {
            by_name.entry(base(path)).or_default().push((path, file));
        }
    }
    let mut found = Includers::default();
    let mut seen: BTreeSet<&str> = BTreeSet::new();
    let mut wanted: Vec<&str> = changed.to_vec();
    while let Some(one) = wanted.pop() {
        found.everything |= BEFORE_ALL.contains(&one);
        for (path, file) in by_name.get(base(one)).into_iter().flatten() {
            if !names(path, one) {
                continue;
            }
            if changed.contains(&one) {
                found.included.insert(one.to_owned());
            }
            if !seen.insert(file) {
                continue;
            }
            if file.ends_with(".c") {
                found.c.insert((*file).to_owned());
            } else if file.ends_with(".S") {
                found.assembly.insert((*file).to_owned());
            }
            // Some C files are included, too.
            wanted.push(file);
        }
    }
    found
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
            file("net/s.S", &["net/b.h"]),
        ]);
        let found = reached(&includes, &["include/net/a.h"]);
        assert_eq!(found.c.into_iter().collect::<Vec<_>>(), ["net/x.c", "net/y.c"]);
        assert_eq!(found.assembly.into_iter().collect::<Vec<_>>(), ["net/s.S"]);
        assert!(!found.everything);
    }

    #[test]
    fn a_c_file_gets_into_the_one_that_includes_it() {
        let includes = BTreeMap::from([("fs/compat_binfmt_elf.c".to_owned(), vec!["binfmt_elf.c".to_owned()])]);
        let found = reached(&includes, &["fs/binfmt_elf.c"]);
        assert_eq!(found.c.into_iter().collect::<Vec<_>>(), ["fs/compat_binfmt_elf.c"]);
        assert!(found.included.contains("fs/binfmt_elf.c"));
    }

    #[test]
    fn what_the_compiler_reads_first_of_all_gets_into_everything() {
        let includes = BTreeMap::from([(
            "include/linux/compiler_types.h".to_owned(),
            vec!["linux/own.h".to_owned()],
        )]);
        assert!(reached(&includes, &["include/linux/own.h"]).everything);
    }

    #[test]
    fn a_file_has_an_object_of_its_own_where_a_makefile_names_it() {
        let root = std::env::temp_dir().join(format!("vmpatch-makefile-{}", std::process::id()));
        fs::create_dir_all(root.join("kernel/sched")).unwrap();
        fs::write(
            root.join("kernel/sched/Makefile"),
            "obj-y:=core.o\nobj-y += build_policy.o\n",
        )
        .unwrap();
        fs::write(root.join("kernel/Makefile"), "obj-y = fork.o sched/clock.o\n").unwrap();
        let own = |file: &str| has_own_object(&root, file).unwrap();
        assert!(own("kernel/sched/core.c") && own("kernel/fork.c") && own("kernel/sched/clock.c"));
        assert!(!own("kernel/sched/rt.c"));
        fs::remove_dir_all(&root).unwrap();
    }

    #[test]
    fn only_drivers_of_one_kind_are_read_for_a_driver() {
        assert_eq!(part("drivers/net/virtio_net.c"), "drivers/net");
        assert_eq!(part("fs/proc/internal.h"), "fs");
        assert_eq!((part("drivers/x.c"), part("x.c")), ("drivers", ""));
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
