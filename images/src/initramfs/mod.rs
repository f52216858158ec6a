//! The guest's root file system, all of it in the initramfs: busybox, the guest agent, kernel modules, the caller's files.

mod newc;

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use object::elf::FileHeader64;
use object::read::elf::{FileHeader, ProgramHeader};

use crate::cache;
use crate::modules::Module;
use newc::Newc;
pub use newc::TooLong;

/// Debian's busybox-static, which `setup.sh` installs.
const BUSYBOX: &str = "/bin/busybox";
/// What answers the host in the guest (`images/agent`), built by this crate's build script.
const GUEST_AGENT: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/guest-agent"));
/// The guest's first process.
const INIT: &[u8] = include_bytes!("init.sh");
/// Folders that init mounts on, or that programs expect.
const FOLDERS: [&str; 10] = [
    "bin",
    "dev",
    "etc",
    "lib",
    "lib/modules",
    "proc",
    "root",
    "sys",
    "tmp",
    "usr",
];

/// Why an initramfs could not be made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A program needs a loader and libraries, which the guest has not.
    #[error("{} is dynamically linked, and the guest has no {loader}: link it with -static, or add its libraries", path.display())]
    Dynamic {
        /// The program on the host.
        path: PathBuf,
        /// The loader that the program names.
        loader: String,
    },
    /// A file of the guest has a name that the archive can't hold.
    #[error("{guest:?} is not an absolute path of plain parts")]
    BadPath {
        /// The path in the guest.
        guest: String,
    },
    /// A file is too long.
    #[error(transparent)]
    TooLong(#[from] TooLong),
    /// A file of the host could not be read.
    #[error(transparent)]
    Files(#[from] cache::Error),
}

/// A file of the host that the guest gets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExtraFile {
    /// Its absolute path in the guest.
    pub guest: String,
    /// Its path on the host; it keeps its permissions.
    pub host: PathBuf,
}

/// Makes an initramfs whose init loads `modules` in their order.
pub fn build(modules: &[Module], extra: &[ExtraFile]) -> Result<Vec<u8>, Error> {
    let mut archive = Newc::default();
    let mut folders: BTreeSet<String> = BTreeSet::new();
    for folder in FOLDERS {
        archive.folder(folder)?;
        folders.insert(folder.to_owned());
    }
    archive.character_device("dev/console", 5, 1)?;
    archive.file("init", 0o755, INIT)?;
    archive.file("bin/busybox", 0o755, &read_program(Path::new(BUSYBOX), &[])?)?;
    archive.file("bin/guest-agent", 0o755, GUEST_AGENT)?;
    archive.file(
        "etc/passwd",
        0o644,
        b"root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/sh\n",
    )?;
    for module in modules {
        archive.file(&format!("lib/modules/{}.ko", module.name), 0o644, &module.bytes)?;
    }
    let names: String = modules.iter().map(|module| format!("{}\n", module.name)).collect();
    archive.file("etc/modules", 0o644, names.as_bytes())?;
    for file in extra {
        let name = archive_name(&file.guest).ok_or_else(|| Error::BadPath {
            guest: file.guest.clone(),
        })?;
        for folder in parents(name) {
            if folders.insert(folder.to_owned()) {
                archive.folder(folder)?;
            }
        }
        let content = read_program(&file.host, extra)?;
        let metadata = fs::metadata(&file.host).map_err(cache::Error::io("read", &file.host))?;
        archive.file(name, metadata.permissions().mode(), &content)?;
    }
    Ok(archive.finish()?)
}

/// A guest's absolute path as the archive spells it.
fn archive_name(guest: &str) -> Option<&str> {
    let name = guest.strip_prefix('/')?;
    let plain = |part: &str| !matches!(part, "" | "." | "..");
    (name.split('/').all(plain) && !name.contains('\0')).then_some(name)
}

/// The folders that `name` lies in, outermost first.
fn parents(name: &str) -> impl Iterator<Item = &str> {
    name.match_indices('/').filter_map(|(at, _)| name.get(..at))
}

/// A file's content; a program that could not start in the guest is refused here, where its name is known.
fn read_program(path: &Path, extra: &[ExtraFile]) -> Result<Vec<u8>, Error> {
    let content = fs::read(path).map_err(cache::Error::io("read", path))?;
    match loader(&content) {
        Some(loader) if !extra.iter().any(|file| file.guest == loader) => Err(Error::Dynamic {
            path: path.to_owned(),
            loader,
        }),
        _ => Ok(content),
    }
}

/// The loader that a dynamically linked program names; `None` for any other file.
fn loader(content: &[u8]) -> Option<String> {
    let header = FileHeader64::<object::Endianness>::parse(content).ok()?;
    let endian = header.endian().ok()?;
    let mut headers = header.program_headers(endian, content).ok()?.iter();
    let name = headers.find_map(|header| header.interpreter(endian, content).ok()?)?;
    Some(String::from_utf8_lossy(name).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_path_must_be_absolute_and_plain() {
        assert_eq!(archive_name("/opt/test"), Some("opt/test"));
        for bad in ["opt", "/", "/a//b", "/../b", "/a/."] {
            assert_eq!(archive_name(bad), None, "{bad}");
        }
    }

    #[test]
    fn the_folders_of_a_file_come_outermost_first() {
        assert_eq!(parents("a/b/c").collect::<Vec<_>>(), ["a", "a/b"]);
    }

    #[test]
    fn a_dynamically_linked_program_is_refused_by_name() {
        let file = ExtraFile {
            guest: "/bin/tool".into(),
            host: "/bin/sh".into(),
        };
        let error = build(&[], &[file]).unwrap_err();
        assert!(
            error.to_string().starts_with("/bin/sh is dynamically linked"),
            "{error}"
        );
    }

    #[test]
    fn a_dynamically_linked_program_is_taken_with_its_libraries() {
        let program = Path::new("/bin/sh");
        let file = |path: &Path| ExtraFile {
            guest: path.display().to_string(),
            host: path.to_owned(),
        };
        let libraries = crate::host::libraries(program).unwrap();
        assert!(libraries.len() >= 2, "a loader and the C library: {libraries:?}");
        let files: Vec<ExtraFile> = libraries
            .iter()
            .map(PathBuf::as_path)
            .chain([program])
            .map(file)
            .collect();
        assert!(build(&[], &files).unwrap().len() > 1 << 20);
    }

    #[test]
    fn the_guest_agent_is_a_static_program() {
        assert!(GUEST_AGENT.starts_with(b"\x7fELF"));
        assert_eq!(loader(GUEST_AGENT), None);
    }
}
