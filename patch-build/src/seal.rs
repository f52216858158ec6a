//! Whether what a tree was made with once is still what it was. A prepared tree is used for months: a changed configuration, header or
//! program in it would change what each file is compiled to, and nobody would see it.
//!
//! The seal names each file with the digest of its content. Notes that are made later carry their own.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use crate::cache::Error;

/// The file with the seal; it is the last one that is made. Its first line is the digest of all others, which are `DIGEST PATH` each.
const FILE: &str = "vmpatch-seal";

/// Seals those files and folders of a tree (relative to it), as far as they are there.
pub(crate) fn seal(tree: &Path, parts: &[&str]) -> Result<(), Error> {
    let lines: String = digests(tree, parts)?
        .iter()
        .map(|(path, digest)| format!("{digest} {path}\n"))
        .collect();
    write_note(tree, FILE, &lines)
}

/// The first of the sealed files that is not what it was, or the seal where it is not whole; `None` where all is as it was.
///
/// New files are none of it: the kernel's build makes some when it compiles.
pub(crate) fn broken(tree: &Path) -> Option<String> {
    let Some(lines) = note(tree, FILE) else {
        return Some(FILE.to_owned());
    };
    let is_broken = |line: &&str| match line.split_once(' ') {
        Some((digest, path)) => digest_of(&tree.join(path)).as_deref() != Some(digest),
        None => true,
    };
    let broken = lines.lines().find(is_broken)?;
    Some(broken.split_once(' ').map_or(FILE, |(_, path)| path).to_owned())
}

/// Whether the tree has a seal, whole or not: it was ready once.
pub(crate) fn has(tree: &Path) -> bool {
    tree.join(FILE).exists()
}

/// Writes a note with the digest of its text.
pub(crate) fn write_note(tree: &Path, name: &str, text: &str) -> Result<(), Error> {
    let path = tree.join(name);
    let partial = path.with_extension("partial");
    let sealed = format!("{}\n{text}", hex(text.as_bytes()));
    fs::write(&partial, sealed).map_err(Error::io("write", &partial))?;
    fs::rename(&partial, &path).map_err(Error::io("rename", &partial))
}

/// The text of a note; `None` where it is not there, or not as it was written.
pub(crate) fn note(tree: &Path, name: &str) -> Option<String> {
    let sealed = fs::read_to_string(tree.join(name)).ok()?;
    let (digest, text) = sealed.split_once('\n')?;
    (digest == hex(text.as_bytes())).then(|| text.to_owned())
}

fn digests(tree: &Path, parts: &[&str]) -> Result<BTreeMap<String, String>, Error> {
    let mut all = BTreeMap::new();
    let mut wanted: Vec<PathBuf> = parts.iter().map(|part| tree.join(part)).collect();
    while let Some(path) = wanted.pop() {
        if path.is_dir() && !path.is_symlink() {
            let entries = fs::read_dir(&path).map_err(Error::io("list", &path))?;
            for entry in entries {
                wanted.push(entry.map_err(Error::io("list", &path))?.path());
            }
            continue;
        }
        let name = path.strip_prefix(tree).ok().and_then(Path::to_str);
        if let (Some(name), Some(digest)) = (name, digest_of(&path)) {
            all.insert(name.to_owned(), digest);
        }
    }
    Ok(all)
}

/// Of a file its content, of a link where it leads; `None` where there is neither.
fn digest_of(path: &Path) -> Option<String> {
    match fs::read_link(path) {
        Ok(target) => Some(hex(format!("to {}", target.display()).as_bytes())),
        Err(_) => Some(hex(&fs::read(path).ok()?)),
    }
}

fn hex(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn tree(test: &str) -> PathBuf {
        let tree = std::env::temp_dir().join(format!("vmpatch-seal-{}-{test}", std::process::id()));
        drop(fs::remove_dir_all(&tree));
        fs::create_dir_all(tree.join("include/generated")).unwrap();
        fs::write(tree.join(".config"), "CONFIG_A=y\n").unwrap();
        fs::write(tree.join("include/generated/autoconf.h"), "#define CONFIG_A 1\n").unwrap();
        symlink("/src", tree.join("source")).unwrap();
        seal(&tree, &[".config", "include", "source", "not-there"]).unwrap();
        tree
    }

    #[test]
    fn a_file_that_changed_or_is_gone_is_named() {
        let tree = tree("named");
        assert_eq!(broken(&tree), None);
        fs::write(tree.join("include/generated/new.h"), "").unwrap();
        assert_eq!(broken(&tree), None);
        fs::write(tree.join("include/generated/autoconf.h"), "").unwrap();
        assert_eq!(broken(&tree).as_deref(), Some("include/generated/autoconf.h"));
        fs::write(tree.join(".config"), "CONFIG_A=m\n").unwrap();
        assert_eq!(broken(&tree).as_deref(), Some(".config"));
        fs::remove_file(tree.join(".config")).unwrap();
        assert_eq!(broken(&tree).as_deref(), Some(".config"));
        fs::remove_dir_all(&tree).unwrap();
    }

    #[test]
    fn a_link_that_leads_elsewhere_is_named() {
        let tree = tree("link");
        fs::remove_file(tree.join("source")).unwrap();
        symlink("/other", tree.join("source")).unwrap();
        assert_eq!(broken(&tree).as_deref(), Some("source"));
        fs::remove_dir_all(&tree).unwrap();
    }

    #[test]
    fn a_seal_that_is_cut_off_seals_nothing() {
        let tree = tree("cut");
        let path = tree.join(FILE);
        let whole = fs::read_to_string(&path).unwrap();
        for text in ["", &whole[..whole.len() - 1], &whole[65..]] {
            fs::write(&path, text).unwrap();
            assert_eq!(broken(&tree).as_deref(), Some(FILE));
        }
        fs::remove_file(&path).unwrap();
        assert_eq!((broken(&tree).as_deref(), has(&tree)), (Some(FILE), false));
        fs::remove_dir_all(&tree).unwrap();
    }

    #[test]
    fn a_note_that_was_changed_is_none() {
        let tree = tree("note");
        write_note(&tree, "plan", "one\ntwo\n").unwrap();
        assert_eq!(note(&tree, "plan").as_deref(), Some("one\ntwo\n"));
        let text = fs::read_to_string(tree.join("plan")).unwrap();
        fs::write(tree.join("plan"), text.replace("two", "tow")).unwrap();
        assert_eq!(note(&tree, "plan"), None);
        fs::remove_dir_all(&tree).unwrap();
    }
}
