//! The folder of a running guest's files, removed with the guest.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use crate::cache::Error;

const PREFIX: &str = "vmpatch-guest-";

/// A folder of its own for one guest; dropped, it is removed.
#[derive(Debug)]
pub(super) struct RunFolder {
    path: PathBuf,
    number: u32,
}

impl RunFolder {
    /// Makes a new one. What programs left that were killed is removed first.
    pub(super) fn new() -> Result<Self, Error> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let parent = std::env::temp_dir();
        remove_leftovers(&parent);
        let path = parent.join(format!("{PREFIX}{}-{number}", std::process::id()));
        fs::create_dir(&path).map_err(Error::io("make the folder", &path))?;
        Ok(Self { path, number })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Different for each guest of this process.
    pub(super) fn number(&self) -> u32 {
        self.number
    }
}

impl Drop for RunFolder {
    fn drop(&mut self) {
        // Left behind, it is removed by a later run.
        drop(fs::remove_dir_all(&self.path));
    }
}

/// Removes the folders of processes that no longer exist. One that can't be removed harms nobody.
fn remove_leftovers(parent: &Path) {
    for entry in fs::read_dir(parent).into_iter().flatten().flatten() {
        let owner = entry.file_name().to_str().and_then(owner);
        if owner.is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists()) {
            drop(fs::remove_dir_all(entry.path()));
        }
    }
}

/// The process that made the folder of this name.
fn owner(name: &str) -> Option<u32> {
    name.strip_prefix(PREFIX)?.split('-').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_guests_folder_names_an_owner() {
        assert_eq!(owner("vmpatch-guest-17-0"), Some(17));
        assert_eq!(owner("vmpatch-guest-x-0"), None);
        assert_eq!(owner("other-17-0"), None);
    }

    #[test]
    fn a_folder_is_removed_with_its_guest() {
        let folder = RunFolder::new().unwrap();
        let path = folder.path().to_owned();
        assert!(path.is_dir());
        drop(folder);
        assert!(!path.exists());
    }
}
