//! The files of the repository.

use std::fs;
use std::path::{Path, PathBuf};

/// Folders that hold no text of ours: what is built, what is fetched, inputs of fuzzers.
const SKIPPED: [&str; 6] = ["target", "cache", "corpus", "artifacts", ".git", "coverage"];

/// The repository's folder.
pub fn root() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent()
        .expect("this crate is in a folder of the repository")
        .to_owned()
}

/// The text of a file, by its path from the repository's folder.
pub fn text(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// True for a file, by its path from the repository's folder.
pub fn is_file(path: &str) -> bool {
    root().join(path).is_file()
}

/// All files and folders, by their paths from the repository's folder, sorted.
pub fn entries() -> Vec<String> {
    let root = root();
    let (mut found, mut folders) = (Vec::new(), vec![root.clone()]);
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            if SKIPPED.contains(&name) {
                continue;
            }
            if path.is_dir() {
                folders.push(path.clone());
            }
            found.extend(path.strip_prefix(&root).unwrap().to_str().map(str::to_owned));
        }
    }
    found.sort();
    found
}
