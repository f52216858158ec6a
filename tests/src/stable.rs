//! Fixes out of stable updates, chosen by a rule and by nobody's hand: what Debian's kernel source changes from one version to a later
//! one, file by file.
//!
//! The rule: of the C files that the kernel's own build compiles into the kernel or its modules, those that differ between the two
//! versions, in the order of the SHA-256 of their paths. A fix is all that differs in one file: Debian has the source, not the single
//! commits. Where that does not compile by itself, the headers that the file includes in quotation marks and that differ
//! go with it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use patch_build::cache::Cache;
use patch_build::facts::{Config, Modules};
use patch_build::plan::Plan;
use patch_build::source::package;
use patch_build::target::Target;
use patch_build::tree::Tree;
use sha2::{Digest, Sha256};

/// A kernel, and the source that has the fixes.
#[derive(Clone, Copy, Debug)]
pub struct Update {
    /// What it is called in a table.
    pub label: &'static str,
    /// The package with the kernel.
    pub kernel: &'static str,
    /// The package with its source.
    pub from: &'static str,
    /// The one with the newer source.
    pub to: &'static str,
}

/// Those that Debian offers.
pub const UPDATES: [Update; 3] = [
    Update {
        label: "6.1",
        kernel: "linux-image-6.1.0-47-cloud-amd64=6.1.170-3",
        from: "linux-source-6.1=6.1.170-3",
        to: "linux-source-6.1=6.1.192-2",
    },
    Update {
        label: "6.12",
        kernel: "linux-image-6.12.107+deb13-cloud-amd64=6.12.107-1",
        from: "linux-source-6.12=6.12.107-1",
        to: "linux-source-6.12=6.12.117-1",
    },
    Update {
        label: "7.2",
        kernel: "linux-image-7.2.6+deb13-cloud-amd64=7.2.6-1~bpo13+1",
        from: "linux-source-7.2=7.2.6-1~bpo13+1",
        to: "linux-source-7.2=7.2.13-1",
    },
];

/// Anything that keeps the fixes from being had.
type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// The sources of an update, unpacked, and what differs.
#[derive(Debug)]
pub struct Sources {
    old: PathBuf,
    new: PathBuf,
    /// The C files that differ, in the order in which they are tried.
    pub files: Vec<String>,
}

impl Sources {
    /// Fetches both, and asks the kernel's build what it compiles.
    ///
    /// # Errors
    ///
    /// If a package can't be had, or the build does not say.
    pub fn of(update: &Update) -> Result<Self> {
        let cache = Cache::from_env()?;
        let progress = |what: &str| eprintln!("{what}");
        let target = Target::package(&cache, update.kernel, &progress)?;
        let config = Config::parse(&fs::read_to_string(&target.config)?);
        let (name, version) = update.to.split_once('=').ok_or("a package without its version")?;
        let new = package::whole(&cache, name, version, &config)?.folder;
        let tree = Tree::prepare(&cache, &target, &progress)?;
        let names = Modules::new(target.modules.clone()).names()?;
        let plan = Plan::of(&tree, &target.release, &names, &progress)?;
        let old = target.source.folder;
        let compiled = plan
            .objects
            .into_iter()
            .filter(|planned| !planned.made && planned.is_of_running_kernel() && planned.source.ends_with(".c"));
        let mut files: Vec<String> = compiled.map(|planned| planned.source).collect();
        files.retain(|file| differs(&old, &new, file));
        in_order(&mut files);
        Ok(Self { old, new, files })
    }

    /// All that differs in some files, as a unified diff.
    ///
    /// # Errors
    ///
    /// If `diff` can't be run.
    pub fn diff(&self, files: &[String]) -> Result<String> {
        let mut text = String::new();
        for file in files {
            let labels = [format!("--label=a/{file}"), format!("--label=b/{file}")];
            let output = Command::new("diff")
                .arg("-u")
                .args(labels)
                .args([self.old.join(file), self.new.join(file)])
                .output()?;
            text.push_str(&String::from_utf8(output.stdout)?);
        }
        Ok(text)
    }

    /// The headers that go with a file: those that it includes in quotation marks and that differ.
    ///
    /// # Errors
    ///
    /// If the file can't be read.
    pub fn headers(&self, file: &str) -> Result<Vec<String>> {
        let text = fs::read_to_string(self.new.join(file))?;
        let folder = Path::new(file).parent().unwrap_or(Path::new(""));
        let headers = quoted(&text).filter_map(|name| plain(&folder.join(name)));
        Ok(headers.filter(|name| differs(&self.old, &self.new, name)).collect())
    }
}

/// Whether both versions have the file, and not the same one.
fn differs(old: &Path, new: &Path, file: &str) -> bool {
    let read = |folder: &Path| fs::read(folder.join(file)).ok();
    matches!((read(old), read(new)), (Some(old), Some(new)) if old != new)
}

fn in_order(files: &mut Vec<String>) {
    files.sort_by_cached_key(|file| digest_of(file));
    files.dedup();
}

fn digest_of(file: &str) -> String {
    Sha256::digest(file).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// What a C file includes in quotation marks.
fn quoted(text: &str) -> impl Iterator<Item = &str> {
    text.lines().filter_map(|line| {
        let rest = line.trim_start().strip_prefix('#')?.trim_start();
        rest.strip_prefix("include")?
            .trim_start()
            .strip_prefix('"')?
            .split('"')
            .next()
    })
}

/// A path without `..`; none where it leads out of the source.
fn plain(path: &Path) -> Option<String> {
    let mut parts: Vec<&str> = Vec::new();
    for part in path.to_str()?.split('/') {
        match part {
            "" | "." => {}
            ".." => drop(parts.pop()?),
            part => parts.push(part),
        }
    }
    Some(parts.join("/"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_in_the_order_of_their_digests_each_once() {
        let mut files = ["b", "a", "b"].map(str::to_owned).to_vec();
        in_order(&mut files);
        // SHA-256: 3e23e8… of "b", ca9781… of "a".
        assert_eq!(files, ["b", "a"]);
    }

    #[test]
    fn headers_in_quotation_marks_are_found_beside_the_file_or_above_it() {
        let text = "#include <linux/fs.h>\n#include \"a.h\"\n # include \"../b.h\"\n";
        let found: Vec<_> = quoted(text)
            .filter_map(|name| plain(&Path::new("fs/x").join(name)))
            .collect();
        assert_eq!(found, ["fs/x/a.h", "fs/b.h"]);
        assert_eq!(plain(Path::new("../a.h")), None);
    }
}
