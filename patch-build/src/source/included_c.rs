//! C files that others include: such a one may be compiled as part of another.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use crate::cache::Error;
use crate::tree::Tree;

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
/// Where a tree keeps the names.
const FILE: &str = "vmpatch-included-c";

/// Whether a file of the source may include one of these C files: some line includes one of that name, wherever it is.
///
/// All files of the source are read for it, once where it can't change.
pub fn may_be_included(tree: &Tree, files: &[&str]) -> Result<bool, Error> {
    let path = tree.folder().join(FILE);
    let names: BTreeSet<String> = if tree.is_fixed() && path.exists() {
        let text = fs::read_to_string(&path).map_err(Error::io("read", &path))?;
        text.lines().map(str::to_owned).collect()
    } else {
        let names = included(tree.source())?;
        let text: String = names.iter().map(|name| format!("{name}\n")).collect();
        let partial = path.with_extension("partial");
        fs::write(&partial, text).map_err(Error::io("write", &partial))?;
        fs::rename(&partial, &path).map_err(Error::io("rename", &partial))?;
        names
    };
    Ok(files.iter().any(|file| names.contains(base(file))))
}

/// Whether the Makefile of each file's own folder names its object. What a Makefile elsewhere compiles, it compiles with flags of its
/// own.
pub fn are_of_their_folders(source: &Path, files: &[&str]) -> bool {
    files.iter().all(|file| {
        let (folder, name) = file.rsplit_once('/').unwrap_or(("", file));
        let object = format!("{}.o", name.trim_end_matches(".c"));
        let texts = ["Makefile", "Kbuild"].map(|makefile| fs::read_to_string(source.join(folder).join(makefile)));
        texts.iter().flatten().any(|text| {
            let mut words = text.split(|c: char| c.is_whitespace() || c == '=');
            words.any(|word| word == object)
        })
    })
}

fn base(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or(path)
}

/// The names of all C files that a line of the source includes, without their folders.
fn included(source: &Path) -> Result<BTreeSet<String>, Error> {
    let mut names = BTreeSet::new();
    let mut folders = vec![String::new()];
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
                names.extend(names_in(&text));
            }
        }
    }
    Ok(names)
}

/// Whether a folder may have files of an x86-64 kernel.
fn is_inside(folder: &str) -> bool {
    !OUTSIDE.contains(&folder)
        && (!folder.starts_with("arch/") || folder == "arch/x86" || folder.starts_with("arch/x86/"))
}

/// The names of C files in quotes or angle brackets, wherever they stand: it may be a macro's value that a line includes.
fn names_in(text: &[u8]) -> Vec<String> {
    let mut names = Vec::new();
    let mut rest = text;
    while let Some(at) = find(rest, b".c") {
        let (before, behind) = rest.split_at(at);
        rest = behind.get(2..).unwrap_or_default();
        if !matches!(rest.first(), Some(b'"' | b'>')) {
            continue;
        }
        let start = before
            .iter()
            .rposition(|byte| b"\"</ \n".contains(byte))
            .map_or(0, |at| at + 1);
        let name = before.get(start..).unwrap_or_default();
        names.push(format!("{}.c", String::from_utf8_lossy(name)));
    }
    names
}

fn find(bytes: &[u8], wanted: &[u8; 2]) -> Option<usize> {
    bytes.windows(2).position(|two| two == wanted)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_included_c_files_are_found_in_every_spelling() {
        let text = b"#include \"binfmt_elf.c\"\n# include <lib/inat.c>\n#define X \"../x.c\"\na.c\n";
        assert_eq!(names_in(text), ["binfmt_elf.c", "inat.c", "x.c"]);
    }

    #[test]
    fn a_file_is_of_its_folder_where_the_makefile_there_names_it() {
        let root = std::env::temp_dir().join(format!("vmpatch-makefile-{}", std::process::id()));
        fs::create_dir_all(root.join("virt/kvm")).unwrap();
        fs::write(root.join("virt/Makefile"), "obj-y:=lib.o kvm/irq.o\n").unwrap();
        fs::write(root.join("virt/kvm/Makefile.kvm"), "kvm-y := $(KVM)/kvm_main.o\n").unwrap();
        let own = |file: &str| are_of_their_folders(&root, &[file]);
        assert!(own("virt/lib.c"));
        assert!(!own("virt/kvm/irq.c") && !own("virt/kvm/kvm_main.c"));
        fs::remove_dir_all(&root).unwrap();
    }

    #[test]
    fn other_architectures_are_outside() {
        assert!(is_inside("arch/x86/kernel") && is_inside("arch") && !is_inside("arch/arm64") && !is_inside("tools"));
    }
}
