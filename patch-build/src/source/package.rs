//! The kernel's source out of a `linux-source` package, whose archive of 130 MB takes some ten seconds to read.

use std::path::{Path, PathBuf};

use super::Source;
use crate::cache::Cache;
use crate::command;
use crate::digest;
use crate::packages::{self, Package};

/// Reads the named files out of the archive in a package, all of them where none is named: package file, archive's path
/// in it, target folder, archive's top folder, files. All stages must succeed, hence bash.
const EXTRACT: &str = r#"set -o pipefail
deb=$1 archive=$2 target=$3 top=$4; shift 4
dpkg-deb --fsys-tarfile "$deb" | tar -xO "./usr/src/$archive" | xz -dc -T0 |
    tar -x -C "$target" --strip-components=1 "${@/#/$top/}""#;

/// The whole source in one version of a `linux-source` package.
pub fn whole(cache: &Cache, name: &str, version: &str) -> Result<Source, packages::Error> {
    let id = format!("{name}_{version}");
    let folder = cache.folder(&format!("sources/{id}"), |folder| {
        let package = packages::fetch_into(cache, name, Some(version))?;
        extract(&package, folder, &[])
    })?;
    Ok(Source {
        folder,
        id,
        fixed: true,
    })
}

/// The folder that holds `files` (paths in the kernel's source) of one version of a `linux-source` package.
pub fn files(cache: &Cache, name: &str, version: &str, files: &[&str]) -> Result<PathBuf, packages::Error> {
    let whole = cache.root().join(format!("sources/{name}_{version}"));
    if whole.is_dir() {
        return Ok(whole);
    }
    let key = format!("kernel-files/{name}_{version}/{}", digest(files));
    cache.folder(&key, |folder| {
        let package = packages::fetch_into(cache, name, Some(version))?;
        extract(&package, folder, files)
    })
}

fn extract(package: &Package, folder: &Path, files: &[&str]) -> Result<(), packages::Error> {
    let (deb, target) = (package.deb(), folder.to_string_lossy());
    let archive = format!("{}.tar.xz", package.name());
    let mut args = vec!["-c", EXTRACT, "bash"];
    let deb = deb.to_string_lossy();
    args.extend([&*deb, &archive, &target, package.name()]);
    args.extend(files);
    command::output("bash", &args, Path::new("/"))?;
    Ok(())
}
