//! Names in the file system that only one process can have: its server sockets and its pid file. A process that takes over
//! a guest gets temporary ones beside them, which replace the real ones once it has the guest.

use std::ffi::OsStr;
use std::fs;
use std::io::{self, ErrorKind};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// What a temporary name ends with. It stays on the new process's command line, where vmpatch knows it again.
const SUFFIX: &str = "~vmpatch";
/// The room for a path in a socket address, with its closing zero byte (`unix(7)`).
const SUN_PATH_LEN: usize = 108;

/// One name: where the new process makes it, and where it belongs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Name {
    /// Beside the real one.
    pub(crate) temporary: PathBuf,
    /// The real one.
    pub(crate) own: PathBuf,
}

impl Name {
    /// For a path on a command line, which after an earlier upgrade is a temporary one itself.
    pub(crate) fn of(path: &Path) -> Self {
        let own = own(path);
        let mut temporary = own.clone().into_os_string();
        temporary.push(SUFFIX);
        Self {
            temporary: temporary.into(),
            own,
        }
    }

    /// Whether a socket address has room for the temporary name.
    pub(crate) fn fits(&self) -> bool {
        self.temporary.as_os_str().len() < SUN_PATH_LEN
    }

    /// With both paths read from this folder, where they are relative.
    pub(crate) fn in_folder(&self, folder: &Path) -> Self {
        Self {
            temporary: folder.join(&self.temporary),
            own: folder.join(&self.own),
        }
    }

    /// Gives the file its real name, in place of what had it. One that is not there has it already.
    pub(crate) fn take_over(&self) -> io::Result<()> {
        match fs::rename(&self.temporary, &self.own) {
            Err(cause) if cause.kind() == ErrorKind::NotFound => Ok(()),
            result => result,
        }
    }

    /// Removes the temporary name. That it is not there is as well.
    pub(crate) fn remove_temporary(&self) {
        let _ = fs::remove_file(&self.temporary);
    }
}

/// The real name for one that may be temporary.
pub(crate) fn own(path: &Path) -> PathBuf {
    let bytes = path.as_os_str().as_bytes();
    match bytes.strip_suffix(SUFFIX.as_bytes()) {
        Some(own) if !own.is_empty() => PathBuf::from(OsStr::from_bytes(own)),
        _ => path.to_owned(),
    }
}

/// Where a socket of that name on a command line is now: while its process waits for a guest, there; afterwards, at its
/// real name.
pub(crate) fn current(path: PathBuf) -> PathBuf {
    let own = own(&path);
    if own == path || fs::symlink_metadata(&path).is_ok() {
        path
    } else {
        own
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_earlier_upgrades_name_is_used_again() {
        let first = Name::of(Path::new("/run/q.sock"));
        assert_eq!(first.temporary, Path::new("/run/q.sock~vmpatch"));
        assert_eq!(Name::of(&first.temporary), first);
        assert_eq!(own(Path::new("~vmpatch")), Path::new("~vmpatch"));
    }

    #[test]
    fn a_path_that_has_no_room_for_the_suffix_is_noticed() {
        let path = |len: usize| PathBuf::from("/".repeat(len));
        assert!(Name::of(&path(99)).fits());
        assert!(!Name::of(&path(100)).fits());
    }

    #[test]
    fn a_name_is_taken_over_once_and_from_then_on_found_there() {
        let folder = std::env::temp_dir().join(format!("vmpatch-names-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let name = Name::of(Path::new("q.sock")).in_folder(&folder);
        fs::write(&name.own, "old").unwrap();
        fs::write(&name.temporary, "new").unwrap();
        assert_eq!(current(name.temporary.clone()), name.temporary);
        name.take_over().unwrap();
        name.take_over().unwrap();
        assert_eq!(fs::read_to_string(&name.own).unwrap(), "new");
        assert_eq!(current(name.temporary.clone()), name.own);
        fs::remove_dir_all(folder).unwrap();
    }
}
