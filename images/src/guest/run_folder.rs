//! The folder of a running guest's files, removed with the guest.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::cache::Error;
use crate::host::Host;

/// A folder of its own for one guest, on the machine that the guest's QEMU runs on; dropped, it is removed.
#[derive(Debug)]
pub(super) struct RunFolder {
    host: Arc<dyn Host>,
    path: PathBuf,
    number: u32,
}

impl RunFolder {
    /// Makes a new one.
    pub(super) fn new(host: Arc<dyn Host>) -> Result<Self, Error> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = format!("{}-{number}", std::process::id());
        let path = host
            .make_folder(&name)
            .map_err(Error::io("make the folder of the guest", Path::new(&name)))?;
        Ok(Self { host, path, number })
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
        // Left behind on this machine, it is removed by a later run; in a box, with the box.
        drop(self.host.remove_folder(&self.path));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::ThisMachine;

    #[test]
    fn a_folder_is_removed_with_its_guest() {
        let folder = RunFolder::new(Arc::new(ThisMachine)).unwrap();
        let path = folder.path().to_owned();
        assert!(path.is_dir());
        drop(folder);
        assert!(!path.exists());
    }
}
