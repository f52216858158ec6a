//! Which of the files that the kernel's build compiles read a changed one: by the compiler's own rules for `#include`, over the
//! whole of what the build compiles.
//!
//! Conditions are not looked at, so that a file may be named that does not read it; none that does is left out. Where a line
//! can't be followed (a macro, a header that the build has yet to make) the file counts as one that may.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use super::tokens::{is_word, run_of};
use crate::plan::{Plan, Planned, plain};

/// How far the files that an object is made of are known.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Read {
    /// Those of the changed files that the compiler may read for it.
    pub changed: BTreeSet<String>,
    /// Something may be read that could not be followed; so any file may.
    pub unknown: bool,
    /// Something may be read that the build has yet to make. Implies `unknown`.
    pub to_be_made: bool,
}

/// Numbers of files, each once.
#[derive(Default)]
struct Seen(Vec<bool>);

impl Seen {
    /// Adds one; false where it is there.
    fn insert(&mut self, file: usize) -> bool {
        if self.0.len() <= file {
            self.0.resize(file + 1, false);
        }
        let is_there = self
            .0
            .get_mut(file)
            .is_none_or(|is_there| std::mem::replace(is_there, true));
        !is_there
    }

    fn has(&self, file: usize) -> bool {
        self.0.get(file).copied().unwrap_or_default()
    }
}

/// The `#include` lines of what the build compiles. It reads files when they are needed, each once.
#[derive(Debug)]
pub struct Index<'a> {
    source: &'a Path,
    tree: &'a Path,
    plan: &'a Plan,
    numbers: HashMap<PathBuf, usize>,
    paths: Vec<PathBuf>,
    lines: HashMap<usize, Rc<Lines>>,
    /// Where a file's names lead, for a way to search.
    leads: HashMap<(usize, usize), Rc<Found>>,
    folders: HashMap<PathBuf, HashSet<String>>,
    found: HashMap<(usize, PathBuf, String), Found>,
    searched: HashMap<Search, usize>,
}

/// What a file's lines say of other files.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Lines {
    named: Vec<Named>,
    /// Macros that stand in the place of a name.
    macros: BTreeSet<String>,
    /// Macros that are defined as a name (`<x.h>`), by name; and what trace events call their file and its folder.
    defined: Vec<(String, String)>,
}

/// A name in an `#include` line.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Named {
    path: String,
    /// In quotes: the folder of the including file comes first.
    quoted: bool,
    /// `#include_next`: any file of that name.
    next: bool,
}

/// Where a name leads.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Found {
    files: Vec<usize>,
    /// To a file that the build has yet to make.
    to_be_made: bool,
    /// Nobody knows where.
    lost: bool,
}

impl Found {
    /// Nowhere that is known.
    fn lost() -> Self {
        Self {
            lost: true,
            ..Self::default()
        }
    }
}

/// Where a compiler looks for headers.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
struct Search {
    /// For names in quotes, before the others.
    quoted: Vec<PathBuf>,
    folders: Vec<PathBuf>,
    /// What it reads before the file itself.
    before: Vec<PathBuf>,
}

impl<'a> Index<'a> {
    /// For a source, and a tree in which the build of that plan makes its objects.
    pub fn new(source: &'a Path, tree: &'a Path, plan: &'a Plan) -> Self {
        Self {
            source,
            tree,
            plan,
            numbers: HashMap::new(),
            paths: Vec::new(),
            lines: HashMap::new(),
            leads: HashMap::new(),
            folders: HashMap::new(),
            found: HashMap::new(),
            searched: HashMap::new(),
        }
    }

    /// What the compiler may read to make an object.
    pub fn read(&mut self, planned: &Planned, changed: &[&str]) -> Read {
        let search = Search::of(planned, self.tree);
        let key = self.searched.len();
        let key = *self.searched.entry(search.clone()).or_insert(key);
        let root = if planned.made { self.tree } else { self.source };
        let own = root.join(&planned.source);
        let is_there = own.exists();
        let mut read = Read {
            unknown: !is_there,
            to_be_made: !is_there,
            ..Read::default()
        };
        let mut wanted = vec![self.number(own)];
        wanted.extend(
            search
                .before
                .iter()
                .map(|path| self.number(path.clone()))
                .collect::<Vec<_>>(),
        );
        let mut seen = Seen::default();
        let mut macros: BTreeSet<String> = BTreeSet::new();
        let mut defining: Vec<(usize, Rc<Lines>)> = Vec::new();
        loop {
            while let Some(file) = wanted.pop() {
                if !seen.insert(file) {
                    continue;
                }
                let lines = self.lines(file);
                macros.extend(lines.macros.iter().cloned());
                if !lines.defined.is_empty() {
                    defining.push((file, Rc::clone(&lines)));
                }
                let found = self.leads(&search, key, file, &lines);
                read.to_be_made |= found.to_be_made;
                wanted.extend(found.files.iter().filter(|file| !seen.has(**file)));
            }
            // A file that is read later may define one of them.
            let (mut is_lost, mut to_be_made) = (false, false);
            for name in &macros {
                let found = self.behind_macro(&search, key, name, &defining);
                to_be_made |= found.to_be_made;
                is_lost |= found.lost || found.files.is_empty();
                wanted.extend(found.files.into_iter().filter(|file| !seen.has(*file)));
            }
            if wanted.is_empty() {
                read.to_be_made |= to_be_made;
                read.unknown |= is_lost;
                break;
            }
        }
        read.unknown |= read.to_be_made;
        for file in changed {
            let number = self.numbers.get(&self.source.join(file));
            if number.is_some_and(|number| seen.has(*number)) {
                read.changed.insert((*file).to_owned());
            }
        }
        read
    }

    /// What a macro in the place of a name may stand for: each name that a macro of that name is defined as; for trace events
    /// (include/trace/define_trace.h of 6.1) each file that was called one of them.
    fn behind_macro(&mut self, search: &Search, key: usize, name: &str, defining: &[(usize, Rc<Lines>)]) -> Found {
        let values = |wanted: &str| -> BTreeSet<(usize, String)> {
            let all = defining.iter().flat_map(|(file, lines)| {
                let of = lines.defined.iter().filter(|(name, _)| name == wanted);
                of.map(|(_, value)| (*file, value.clone()))
            });
            all.collect()
        };
        let mut all = Found::default();
        let mut add = |found: Found| {
            all.to_be_made |= found.to_be_made;
            all.lost |= found.lost;
            all.files.extend(found.files);
        };
        if name == "TRACE_INCLUDE" {
            let mut folders = vec!["trace/events".to_owned(), ".".to_owned()];
            folders.extend(values("TRACE_INCLUDE_PATH").into_iter().map(|(_, path)| path));
            let from = self.number(self.source.join("include/trace/define_trace.h"));
            let mut is_known = true;
            let named = values("TRACE_INCLUDE_FILE");
            let has_name = |file: usize| named.iter().any(|(other, _)| *other == file);
            // What does not say its file's name has that of its system (include/trace/define_trace.h).
            let systems = values("TRACE_SYSTEM").into_iter().filter(|(file, _)| !has_name(*file));
            let files = named.iter().filter(|(_, name)| name != "TRACE_SYSTEM").cloned();
            for (file, value) in files.chain(systems).collect::<Vec<_>>() {
                let mut files = Vec::new();
                for folder in &folders {
                    for from in [from, file] {
                        let named = Named {
                            path: format!("{folder}/{value}.h"),
                            quoted: true,
                            next: false,
                        };
                        files.extend(self.find(search, key, from, &named).files);
                    }
                }
                is_known &= !files.is_empty();
                add(Found {
                    files,
                    ..Found::default()
                });
            }
            all.lost |= !is_known;
            return all;
        }
        for (file, value) in values(name) {
            let found = named(&value).map(|named| self.find(search, key, file, &named));
            let found = found.filter(|found| found.to_be_made || !found.files.is_empty());
            add(found.unwrap_or_else(Found::lost));
        }
        all
    }

    /// Where all names in a file lead.
    fn leads(&mut self, search: &Search, key: usize, file: usize, lines: &Lines) -> Rc<Found> {
        if let Some(found) = self.leads.get(&(key, file)) {
            return Rc::clone(found);
        }
        let mut all = Found::default();
        for named in &lines.named {
            let found = self.find(search, key, file, named);
            all.files.extend(found.files);
            all.to_be_made |= found.to_be_made;
        }
        let all = Rc::new(all);
        self.leads.insert((key, file), Rc::clone(&all));
        all
    }

    /// Where a name in a file leads. A name that leads nowhere stands behind a condition that does not hold, else the kernel would
    /// not compile; unless the build makes that file.
    fn find(&mut self, search: &Search, key: usize, file: usize, named: &Named) -> Found {
        let own = self
            .paths
            .get(file)
            .and_then(|path| path.parent())
            .unwrap_or(Path::new(""))
            .to_owned();
        let from = if named.quoted { own.clone() } else { PathBuf::new() };
        let id = (
            key,
            from,
            format!("{}{}", if named.next { "+" } else { "" }, named.path),
        );
        if let Some(found) = self.found.get(&id) {
            return found.clone();
        }
        let quoted = named.quoted.then_some(&own).into_iter().chain(&search.quoted);
        let quoted = quoted.filter(|_| named.quoted);
        let mut found = Found::default();
        for folder in quoted.chain(&search.folders) {
            let Some(path) = normal(&folder.join(&named.path)) else {
                continue;
            };
            if self.exists(&path) {
                found.files.push(self.number(path));
            } else if self.is_to_be_made(&path) {
                found.to_be_made = true;
            } else {
                continue;
            }
            if !named.next {
                break;
            }
        }
        self.found.insert(id, found.clone());
        found
    }

    fn exists(&mut self, path: &Path) -> bool {
        let (Some(folder), Some(name)) = (path.parent(), path.file_name().and_then(|name| name.to_str())) else {
            return false;
        };
        let names = self.folders.entry(folder.to_owned()).or_insert_with(|| {
            let entries = fs::read_dir(folder).into_iter().flatten().filter_map(Result::ok);
            let names = entries.filter(|entry| entry.file_type().is_ok_and(|kind| !kind.is_dir()));
            names.filter_map(|entry| entry.file_name().into_string().ok()).collect()
        });
        names.contains(name)
    }

    fn is_to_be_made(&self, path: &Path) -> bool {
        let relative = path.strip_prefix(self.tree).ok().and_then(Path::to_str);
        relative.is_some_and(|relative| self.plan.makes(relative))
    }

    fn number(&mut self, path: PathBuf) -> usize {
        let next = self.paths.len();
        let number = *self.numbers.entry(path.clone()).or_insert(next);
        if number == next {
            self.paths.push(path);
        }
        number
    }

    fn lines(&mut self, file: usize) -> Rc<Lines> {
        let path = self.paths.get(file).cloned().unwrap_or_default();
        let read = || Rc::new(lines(&String::from_utf8_lossy(&fs::read(path).unwrap_or_default())));
        Rc::clone(self.lines.entry(file).or_insert_with(read))
    }
}

impl Search {
    /// In the order of gcc's manual (Directory Options): `-iquote`, `-I`, `-isystem`, `-idirafter`.
    fn of(planned: &Planned, tree: &Path) -> Self {
        const OPTIONS: [&str; 4] = ["-iquote", "-I", "-isystem", "-idirafter"];
        let mut by_option: [Vec<PathBuf>; 4] = Default::default();
        let mut before = Vec::new();
        let mut words = planned.command.words().peekable();
        while let Some(word) = words.next() {
            for (option, folders) in OPTIONS.iter().zip(&mut by_option) {
                if let Some(path) = word.strip_prefix(option) {
                    let path = if path.is_empty() {
                        words.next().unwrap_or_default()
                    } else {
                        path
                    };
                    folders.extend(normal(&tree.join(path)));
                    break;
                }
            }
            if ["-include", "-imacros"].contains(&word) {
                before.extend(words.next().and_then(|path| normal(&tree.join(path))));
            }
        }
        let [quoted, rest @ ..] = by_option;
        Self {
            quoted,
            folders: rest.concat(),
            before,
        }
    }
}

/// An absolute path without `.` and `..`.
fn normal(path: &Path) -> Option<PathBuf> {
    let path = path.to_str()?;
    Some(PathBuf::from(format!("/{}", plain(path)?)))
}

/// Reads a text's lines.
fn lines(text: &str) -> Lines {
    let mut lines = Lines::default();
    let joined;
    let text = if text.contains("include \\\n") {
        joined = text.replace("\\\n", " ");
        joined.as_str()
    } else {
        text
    };
    for line in text.lines() {
        // A comment may stand before it.
        let line = line
            .rsplit_once("*/")
            .filter(|(_, rest)| rest.trim_start().starts_with('#'))
            .map_or(line, |(_, rest)| rest);
        let Some(rest) = line.trim_start().strip_prefix('#') else {
            continue;
        };
        let rest = rest.trim_start();
        if let Some(rest) = rest.strip_prefix("include").or_else(|| rest.strip_prefix("import")) {
            let next = rest.strip_prefix("_next");
            let rest = without_comment(next.unwrap_or(rest));
            match named(rest) {
                Some(named) => lines.named.push(Named {
                    next: next.is_some(),
                    ..named
                }),
                None => drop(lines.macros.insert(word(rest).to_owned())),
            }
        } else if let Some(rest) = rest.strip_prefix("define") {
            let rest = rest.trim_start();
            let name = word(rest);
            let value = rest.get(name.len()..).unwrap_or_default().trim();
            let is_of_trace = ["TRACE_INCLUDE_FILE", "TRACE_INCLUDE_PATH", "TRACE_SYSTEM"].contains(&name);
            let value = value.split_whitespace().next().unwrap_or_default();
            if is_of_trace || (named(value).is_some() && value.ends_with(['>', '"'])) {
                lines.defined.push((name.to_owned(), value.to_owned()));
            }
        }
    }
    lines
}

fn without_comment(text: &str) -> &str {
    let text = text.trim_start();
    let rest = text.strip_prefix("/*").and_then(|rest| rest.split_once("*/"));
    rest.map_or(text, |(_, rest)| rest.trim_start())
}

fn word(text: &str) -> &str {
    text.get(..run_of(text.as_bytes(), is_word)).unwrap_or_default()
}

/// The name at the start of a text.
fn named(text: &str) -> Option<Named> {
    let end = match text.as_bytes().first()? {
        b'"' => '"',
        b'<' => '>',
        _ => return None,
    };
    let (path, _) = text.get(1..)?.split_once(end)?;
    Some(Named {
        path: path.to_owned(),
        quoted: end == '"',
        next: false,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A source and a tree with these files.
    struct Made(PathBuf);

    impl Made {
        fn new(test: &str, files: &[(&str, &str)]) -> Self {
            let root = std::env::temp_dir().join(format!("vmpatch-includers-{}-{test}", std::process::id()));
            drop(fs::remove_dir_all(&root));
            for (file, text) in files {
                let path = root.join(file);
                fs::create_dir_all(path.parent().unwrap()).unwrap();
                fs::write(path, text).unwrap();
            }
            Self(root)
        }

        /// The sources of the objects that may read one of those files, and those for which that is unknown.
        fn reading(&self, objects: &[(&str, &str)], made: &str, changed: &[&str]) -> (Vec<String>, Vec<String>) {
            let all = self.reads(objects, made, changed);
            let sources = |wanted: fn(&Read) -> bool| -> Vec<String> {
                let wanted = all.iter().filter(|(_, read)| wanted(read));
                wanted.map(|(source, _)| source.clone()).collect()
            };
            (sources(|read| !read.changed.is_empty()), sources(|read| read.unknown))
        }

        /// What each object may read.
        fn reads(&self, objects: &[(&str, &str)], made: &str, changed: &[&str]) -> Vec<(String, Read)> {
            let source = self.0.join("source");
            let mut text: String = made.split_whitespace().map(|file| format!("made\t{file}\n")).collect();
            for (file, flags) in objects {
                let flags = flags.replace("SRC", &source.display().to_string());
                let root = if made.contains(file) {
                    String::new()
                } else {
                    format!("{}/", source.display())
                };
                text.push_str(&format!(
                    "object\tx.o\t{root}{file}\tgcc -I {} {flags}\n",
                    source.join("include").display()
                ));
            }
            let plan = Plan::parse(&text, &source);
            let tree = self.0.join("tree");
            let mut index = Index::new(&source, &tree, &plan);
            let all = plan.objects.iter();
            all.map(|planned| (planned.source.clone(), index.read(planned, changed)))
                .collect()
        }
    }

    impl Drop for Made {
        fn drop(&mut self) {
            drop(fs::remove_dir_all(&self.0));
        }
    }

    #[test]
    fn a_private_header_is_found_in_other_folders_and_told_from_others_of_its_name() {
        let made = Made::new(
            "private",
            &[
                ("source/fs/internal.h", ""),
                ("source/fs/open.c", "#include \"internal.h\"\n"),
                ("source/fs/proc/internal.h", ""),
                ("source/fs/proc/base.c", "#include \"internal.h\"\n"),
                ("source/io_uring/fs.c", "#include \"../fs/internal.h\"\n"),
                ("source/block/blk.h", ""),
                ("source/include/linux/own.h", "#include <linux/low.h>\n"),
                ("source/include/linux/low.h", "#include \"../../block/blk.h\"\n"),
                ("source/kernel/trace/b.c", " # include <linux/own.h> /* x */\n"),
                ("source/kernel/trace/s.S", "/* x */ #include \"../../block/blk.h\"\n"),
            ],
        );
        let files = [
            "fs/open.c",
            "fs/proc/base.c",
            "io_uring/fs.c",
            "kernel/trace/b.c",
            "kernel/trace/s.S",
        ];
        let objects = files.map(|file| (file, ""));
        let none: Vec<String> = Vec::new();
        let of = |changed: &str| made.reading(&objects, "", &[changed]);
        assert_eq!(
            of("fs/internal.h"),
            (vec!["fs/open.c".to_owned(), "io_uring/fs.c".to_owned()], none.clone())
        );
        assert_eq!(
            of("fs/proc/internal.h"),
            (vec!["fs/proc/base.c".to_owned()], none.clone())
        );
        assert_eq!(
            of("block/blk.h"),
            (vec!["kernel/trace/b.c".to_owned(), "kernel/trace/s.S".to_owned()], none)
        );
    }

    #[test]
    fn folders_of_the_command_are_searched_in_its_order() {
        let made = Made::new(
            "folders",
            &[
                ("source/a/x.c", "#include \"y.h\"\n"),
                ("source/one/y.h", ""),
                ("source/two/y.h", ""),
                ("source/first.h", ""),
            ],
        );
        let flags = "-include SRC/first.h -ISRC/one -I SRC/two";
        let of = |flags: &str, changed: &str| made.reading(&[("a/x.c", flags)], "", &[changed]).0.len();
        assert_eq!(
            (of(flags, "one/y.h"), of(flags, "two/y.h"), of(flags, "first.h")),
            (1, 0, 1)
        );
        let flags = "-I SRC/one -iquote SRC/two";
        assert_eq!(
            (of(flags, "one/y.h"), of(flags, "two/y.h"), of(flags, "a/x.c")),
            (0, 1, 1)
        );
    }

    #[test]
    fn trace_headers_are_found_behind_their_macros() {
        let made = Made::new(
            "trace",
            &[
                (
                    "source/include/trace/define_trace.h",
                    "#include TRACE_INCLUDE(TRACE_INCLUDE_FILE)\n#include MAGIC\n",
                ),
                (
                    "source/d/x.c",
                    "#define MAGIC <linux/m.h>\n#define TRACE_INCLUDE_FILE t\n#define TRACE_INCLUDE_PATH ../../d /* x */\n#include <trace/define_trace.h>\n",
                ),
                ("source/d/t.h", ""),
                ("source/include/linux/m.h", ""),
                ("source/d/y.c", "#include NOBODY_KNOWS\n"),
            ],
        );
        let objects = [("d/x.c", ""), ("d/y.c", "")];
        let unknown = vec!["d/y.c".to_owned()];
        for changed in ["d/t.h", "include/linux/m.h"] {
            assert_eq!(
                made.reading(&objects, "", &[changed]),
                (vec!["d/x.c".to_owned()], unknown.clone()),
                "{changed}"
            );
        }
    }

    #[test]
    fn what_the_build_has_yet_to_make_may_include_anything() {
        let files = [
            (
                "source/a/x.c",
                "#include \"made.h\"\n#ifdef OTHER\n#include <asm/nowhere.h>\n#endif\n",
            ),
            ("source/a/z.h", ""),
            ("tree/a/there.c", "#include \"../a/z.h\"\n"),
        ];
        let made = Made::new("made", &files);
        let objects = [("a/x.c", "-I ./a"), ("a/gone.c", ""), ("a/there.c", "-I SRC/a")];
        let (reading, unknown) = made.reading(&objects, "a/made.h a/gone.c a/there.c", &["a/z.h"]);
        assert_eq!(unknown, ["a/x.c", "a/gone.c"]);
        let to_be_made = |file: &str, text: &str| {
            fs::write(made.0.join("source/a/x.c"), text).unwrap();
            let (_, read) = made
                .reads(&[(file, "-I ./a")], "a/made.h a/gone.c", &["a/z.h"])
                .remove(0);
            (read.unknown, read.to_be_made)
        };
        assert_eq!(
            to_be_made("a/x.c", "#define MADE \"made.h\"\n#include MADE\n"),
            (true, true)
        );
        assert_eq!(to_be_made("a/gone.c", ""), (true, true));
        assert_eq!(to_be_made("a/x.c", "#include NOBODY_KNOWS\n"), (true, false));
        assert_eq!(to_be_made("a/x.c", "#include \"z.h\"\n"), (false, false));
        assert!(reading.is_empty() || reading == ["a/there.c"], "{reading:?}");
    }

    #[test]
    fn includes_are_read_in_every_spelling() {
        let text = "#include <a.h>\n # include \"b/c.h\" /* x */\n#include MACRO(x)\n#define include\n#include \\\n\"d.h\"\n#include/**/\"e.h\"\n#include_next <f.h>\n";
        let lines = lines(text);
        let names: Vec<&str> = lines.named.iter().map(|named| named.path.as_str()).collect();
        assert_eq!(names, ["a.h", "b/c.h", "d.h", "e.h", "f.h"]);
        assert_eq!(lines.macros.into_iter().collect::<Vec<_>>(), ["MACRO"]);
    }
}
