//! Single files out of a `linux-source` package, whose 130 MB of archive are read once.

use std::path::{Path, PathBuf};

use super::{Error, digest};
use crate::cache::Cache;
use crate::{command, packages};

/// Reads the named files out of the archive in a package: package file, archive's path in it, target folder, archive's
/// top folder, files. All stages must succeed, hence bash.
const EXTRACT: &str = r#"set -o pipefail
deb=$1 archive=$2 target=$3 top=$4; shift 4
dpkg-deb --fsys-tarfile "$deb" | tar -xO "./usr/src/$archive" | xz -dc -T0 |
    tar -x -C "$target" --strip-components=1 "${@/#/$top/}""#;

/// The folder that holds `files` (paths in the kernel's source) of one version of a `linux-source` package.
pub(super) fn kernel_files(cache: &Cache, package: &str, version: &str, files: &[&str]) -> Result<PathBuf, Error> {
    let key = format!("kernel-files/{package}_{version}/{}", digest(files));
    cache.folder(&key, |folder| {
        let fetched = packages::fetch_into(cache, package, Some(version))?;
        let (deb, target) = (fetched.deb(), folder.to_string_lossy());
        let archive = format!("{package}.tar.xz");
        let mut args = vec!["-c", EXTRACT, "bash"];
        let deb = deb.to_string_lossy();
        args.extend([&*deb, &archive, &target, package]);
        args.extend(files);
        command::output("bash", &args, Path::new("/"))?;
        Ok(())
    })
}

/// Reads a text file.
pub(super) fn read_text(path: &Path) -> Result<String, Error> {
    let bytes = std::fs::read(path).map_err(crate::cache::Error::io("read", path))?;
    String::from_utf8(bytes).map_err(|_| Error::NotText { path: path.to_owned() })
}
