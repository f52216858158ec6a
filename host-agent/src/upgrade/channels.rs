//! The folder with the sockets of a migration.

use super::error::UpgradeError;
use super::prepare::Prepared;
use std::fs::{self, DirBuilder};
use std::os::unix::fs::{DirBuilderExt, chown};
use std::path::PathBuf;

/// A folder for the sockets of a migration, which only the guest's user can enter. It is removed when dropped.
#[derive(Debug)]
pub(super) struct ChannelFolder(PathBuf);

impl ChannelFolder {
    pub(super) fn make(prepared: &Prepared) -> Result<Self, UpgradeError> {
        let path = std::env::temp_dir().join(format!("vmpatch-move-{}", prepared.old.pid));
        let failed = || UpgradeError::host(format!("making {}", path.display()));
        // A killed vmpatch may have left it. We hold the lock, so nobody uses it.
        let _ = fs::remove_dir_all(&path);
        DirBuilder::new().mode(0o700).create(&path).map_err(failed())?;
        let folder = Self(path.clone());
        let [_, user, _] = prepared.process_context.users;
        let [_, group, _] = prepared.process_context.groups;
        if nix::unistd::Uid::effective().is_root() {
            chown(&path, Some(user), Some(group)).map_err(failed())?;
        }
        Ok(folder)
    }

    /// The socket for the descriptors of guest RAM.
    pub(super) fn ram(&self) -> PathBuf {
        self.0.join("ram")
    }

    /// The socket for the migration stream.
    pub(super) fn main(&self) -> PathBuf {
        self.0.join("main")
    }
}

impl Drop for ChannelFolder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}
