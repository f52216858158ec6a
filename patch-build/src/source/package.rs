//! The kernel's source out of a `linux-source` package, whose archive of 130 MB takes some ten seconds to read.

use std::fs;
use std::path::{Path, PathBuf};

use super::Source;
use super::archive::Archive;
use crate::cache::{self, Cache};
use crate::command;
use crate::digest;
use crate::facts::Config;
use crate::packages::{self, Package};

/// Reads files out of the archive in a package, below the archive's top folder: package file, archive's path in it, target folder,
/// and what tells tar which. All stages must succeed, hence bash.
const EXTRACT: &str = r#"set -o pipefail
deb=$1 archive=$2 target=$3; shift 3
dpkg-deb --fsys-tarfile "$deb" | tar -xO "./usr/src/$archive" | xz -dc -T0 |
    tar -x -C "$target" --strip-components=1 "$@""#;
/// Writes the archive in a package.
const ARCHIVE: &str = r#"set -o pipefail
dpkg-deb --fsys-tarfile "$1" | tar -xO "./usr/src/$2""#;

/// Kinds of files that nothing of the kernel is compiled from, and that are a good part of the source: text for people, descriptions of
/// boards.
const KINDS: [&str; 5] = [".rst", ".yaml", ".svg", ".dts", ".dtsi"];
/// The same of text and of tools that the build does not use, as tar takes patterns, below the top folder.
const UNUSED: [&str; 3] = ["Documentation/*.txt", "tools/perf/*", "tools/testing/*"];
/// What only kernels with one of these settings read, and is much: headers that list all registers of a family of chips.
const LARGE: &str = "drivers/gpu/drm/amd/include";
const LARGE_IS_OF: [&str; 2] = ["DRM_AMDGPU", "HSA_AMD"];

/// The source in one version of a `linux-source` package, with all that a kernel of that configuration is compiled from.
pub fn whole(cache: &Cache, name: &str, version: &str, config: &Config) -> Result<Source, packages::Error> {
    let id = format!("{name}_{version}");
    let fetch = || packages::fetch_into(cache, name, Some(version));
    let folder = cache.folder(&format!("sources/{id}"), |folder| {
        let kinds = KINDS.iter().map(|kind| format!("*{kind}"));
        let left_out = kinds.chain([&[LARGE], &UNUSED[..]].concat().into_iter().map(str::to_owned));
        let patterns = left_out.map(|pattern| format!("--exclude={name}/{pattern}"));
        extract(&fetch()?, folder, &patterns.collect::<Vec<_>>())
    })?;
    if LARGE_IS_OF.iter().any(|setting| config.value(setting).is_some()) {
        add(cache, &folder, &id, LARGE, &fetch)?;
    }
    Ok(Source {
        folder,
        id,
        fixed: true,
    })
}

/// Why a file of a source from [`whole`], or of any other, is none that its kernel is compiled from; `None` where it may be.
pub fn why_unused(source: &Source, file: &str) -> Option<&'static str> {
    let is_large = file.strip_prefix(LARGE).is_some_and(|rest| rest.starts_with('/'));
    if KINDS.iter().any(|kind| file.ends_with(kind)) {
        Some("no kernel is compiled from files of its kind")
    } else if is_large && source.fixed && !source.folder.join(LARGE).is_dir() {
        Some("this kernel has none of the drivers that read it")
    } else {
        None
    }
}

/// Adds a folder that was left out.
fn add(
    cache: &Cache,
    source: &Path,
    id: &str,
    part: &str,
    fetch: &dyn Fn() -> Result<Package, packages::Error>,
) -> Result<(), packages::Error> {
    let _lock = cache.lock(&format!("sources/{id}-part"))?;
    let (there, partial) = (
        source.join(part),
        cache.root().join(format!("sources/{id}-part.partial")),
    );
    if there.is_dir() {
        return Ok(());
    }
    let io = |action| cache::Error::io(action, &partial);
    if partial.exists() {
        fs::remove_dir_all(&partial).map_err(io("remove what an interrupted run left in"))?;
    }
    fs::create_dir(&partial).map_err(io("make the folder"))?;
    let package = fetch()?;
    extract(&package, &partial, &[format!("{}/{part}", package.name())])?;
    fs::rename(partial.join(part), &there).map_err(cache::Error::io("rename into its place", &there))?;
    fs::remove_dir_all(&partial).map_err(io("remove"))?;
    Ok(())
}

/// The folder that holds `files` (paths in the kernel's source) of one version of a `linux-source` package.
pub fn files(cache: &Cache, name: &str, version: &str, files: &[&str]) -> Result<PathBuf, packages::Error> {
    let whole = cache.root().join(format!("sources/{name}_{version}"));
    if files.iter().all(|file| whole.join(file).is_file()) {
        return Ok(whole);
    }
    let key = format!("kernel-files/{name}_{version}/{}", digest(files));
    cache.folder(&key, |folder| {
        let package = packages::fetch_into(cache, name, Some(version))?;
        if !look_up(&package, folder, files)? {
            let names = files.iter().map(|file| format!("{name}/{file}"));
            extract(&package, folder, &names.collect::<Vec<_>>())?;
        }
        Ok(())
    })
}

/// Writes some files of a package's archive into a folder. False where they could not be looked up.
fn look_up(package: &Package, folder: &Path, files: &[&str]) -> Result<bool, packages::Error> {
    let (deb, archive) = (package.deb(), format!("{}.tar.xz", package.name()));
    let args = ["-c", ARCHIVE, "bash", &deb.to_string_lossy(), &archive];
    let names: Vec<String> = files.iter().map(|file| format!("{}/{file}", package.name())).collect();
    let archive = Archive::open(command::output("bash", &args, Path::new("/"))?);
    let Some(found) = archive.and_then(|archive| archive.files(&names)) else {
        return Ok(false);
    };
    for (file, name) in files.iter().zip(&names) {
        let path = folder.join(file);
        let parent = path.parent().unwrap_or(folder);
        fs::create_dir_all(parent).map_err(cache::Error::io("make the folder", parent))?;
        let text = found.get(name).map(Vec::as_slice).unwrap_or_default();
        fs::write(&path, text).map_err(cache::Error::io("write", &path))?;
    }
    Ok(true)
}

fn extract(package: &Package, folder: &Path, which: &[String]) -> Result<(), packages::Error> {
    let (deb, target) = (package.deb(), folder.to_string_lossy());
    let archive = format!("{}.tar.xz", package.name());
    let deb = deb.to_string_lossy();
    let mut args = vec!["-c", EXTRACT, "bash", &*deb, &archive, &target];
    args.extend(which.iter().map(String::as_str));
    command::output("bash", &args, Path::new("/"))?;
    Ok(())
}
