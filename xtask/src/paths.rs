//! Every path that a comment or a document names exists.

use crate::repository;

/// Files that are ours wherever they are named: the kernel and QEMU have none of them but `.sh` and `.patch`, which are named with
/// their folder there.
const OURS: [&str; 5] = ["rs", "md", "sh", "toml", "patch"];
/// First folders of paths in the sources of the kernel, QEMU, binutils and libvirt.
const THEIRS: [&str; 7] = [
    "tools",
    "scripts",
    "docs/devel",
    "docs/interop",
    "docs/system",
    "tests/qtest",
    "gas",
];
/// Names that stand for a file of the reader's, or for one that a program writes.
const EXAMPLES: [&str; 12] = [
    "fix.patch",
    "fix.sh",
    "a.patch",
    "b.patch",
    "main.rs",
    "lib.rs",
    "mod.rs",
    "tests.rs",
    "build.rs",
    "one.patch",
    "two.patch",
    "x.patch",
];

/// What prose begins with in the lines of a file: nothing in a document, in code the mark of a comment. `None` for a file without prose.
fn comment_mark(path: &str) -> Option<&'static str> {
    match path.rsplit('.').next() {
        Some("md") => Some(""),
        Some("rs" | "c" | "h") => Some("//"),
        Some("sh" | "toml") => Some("#"),
        _ => None,
    }
}

/// True for a file that has prose.
pub fn is_prose(path: &str) -> bool {
    comment_mark(path).is_some()
}

/// The parts of a file that are prose: a document as a whole, of code its comments.
pub fn prose(path: &str, text: &str) -> Vec<(usize, String)> {
    let Some(comment) = comment_mark(path) else {
        return Vec::new();
    };
    let lines = text.lines().enumerate().map(|(at, line)| (at + 1, line));
    lines
        .filter_map(|(number, line)| Some((number, line.get(line.find(comment)?..)?.to_owned())))
        .collect()
}

/// What looks like a path of ours in a line.
fn paths(line: &str) -> Vec<&str> {
    let is_of_path = |char: char| char.is_ascii_alphanumeric() || "._-/*".contains(char);
    line.split(|char| !is_of_path(char))
        .map(|word| word.trim_end_matches(['.', '/']))
        .filter(|word| {
            let (folder, extension) = (
                word.split('/').next().unwrap_or_default(),
                word.rsplit('.').next().unwrap_or_default(),
            );
            let is_file = word.contains('.') && OURS.contains(&extension) && !word.starts_with('.');
            let is_ours = word.contains('/') && FOLDERS.contains(&folder);
            (is_file || is_ours) && !word.starts_with('/') && !word.ends_with('*')
        })
        .filter(|word| {
            !THEIRS
                .iter()
                .any(|theirs| word.strip_prefix(theirs).is_some_and(|rest| rest.starts_with('/')))
        })
        .filter(|word| !EXAMPLES.contains(word))
        .collect()
}

/// Folders of the repository whose names begin paths of ours.
const FOLDERS: [&str; 10] = [
    "docs",
    "guest-core",
    "process",
    "kvm",
    "qmp",
    "patch-build",
    "host-agent",
    "images",
    "findings",
    "xtask",
];

/// True where `path`, named in the file `by`, is one of `entries`: from the repository's folder, from that of the file or of its
/// crate, or as the end of a path.
fn exists(path: &str, by: &str, entries: &[String]) -> bool {
    let folders = by.match_indices('/').map(|(at, _)| &by[..at]);
    let from_above = folders
        .map(|folder| format!("{folder}/{path}"))
        .chain([path.to_owned()]);
    let mut wanted = from_above.map(|path| path.replace("/./", "/"));
    let parts: Vec<_> = path.split('*').collect();
    let fits = |entry: &str| match parts.as_slice() {
        [start, end] => entry.starts_with(start) && entry.ends_with(end),
        _ => false,
    };
    wanted.any(|wanted| entries.contains(&wanted))
        || entries
            .iter()
            .any(|entry| fits(entry) || entry.strip_suffix(path).is_some_and(|rest| rest.ends_with('/')))
}

#[test]
fn every_path_in_comments_and_documents_exists() {
    let entries = repository::entries();
    let mut missing = Vec::new();
    for by in entries.iter().filter(|entry| !repository::root().join(entry).is_dir()) {
        let is_text = ["rs", "md", "sh", "toml", "c", "h"].contains(&by.rsplit('.').next().unwrap_or_default());
        if !is_text || by == "xtask/src/paths.rs" {
            continue;
        }
        for (number, line) in prose(by, &repository::text(by)) {
            for path in paths(&line).into_iter().filter(|path| !exists(path, by, &entries)) {
                missing.push(format!("{by}:{number}: {path}"));
            }
        }
    }
    assert!(missing.is_empty(), "paths that do not exist:\n{}", missing.join("\n"));
}

#[test]
fn a_path_is_found_from_the_root_the_crate_and_by_its_end() {
    let entries = [
        "docs/json.md",
        "qmp/src/client/wire.rs",
        "qmp/fuzz/src/lib.rs",
        "tests/tests/upgrade_kill.rs",
    ]
    .map(str::to_owned);
    let found = |path| exists(path, "qmp/src/client/mod.rs", &entries);
    for path in [
        "docs/json.md",
        "wire.rs",
        "client/wire.rs",
        "src/client/wire.rs",
        "fuzz/src/lib.rs",
        "tests/tests/upgrade*.rs",
    ] {
        assert!(found(path), "{path}");
    }
    for path in ["docs/cli.md", "ire.rs", "docs/wire.rs", "tests/tests/demo*.rs"] {
        assert!(!found(path), "{path}");
    }
}

#[test]
fn paths_are_told_from_other_words_and_from_those_of_other_projects() {
    assert_eq!(
        paths("see `docs/cli.md`, and client/wire.rs."),
        ["docs/cli.md", "client/wire.rs"]
    );
    assert_eq!(
        paths("QEMU's `docs/interop/qmp-spec.rst`, kernel/module/main.c, `host-agent → qmp`"),
        Vec::<&str>::new()
    );
    assert_eq!(prose("a.rs", "let x = \"docs/no.md\"; // docs/yes.md").len(), 1);
}
