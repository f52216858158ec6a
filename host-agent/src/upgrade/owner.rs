//! Acting with the rights of the user that a QEMU runs as: its command line names files, that user may exchange folders on the way to them
//! for links, and vmpatch may be root.

use super::process_context::{ProcessContext, ProcessContextError};
use nix::libc;
use nix::unistd::{Gid, Uid, setfsgid, setfsuid};
use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::thread;

/// The user that a process runs as.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Owner {
    user: Uid,
    group: Gid,
    others: Vec<libc::gid_t>,
}

impl Owner {
    /// Of the process `pid`.
    pub(super) fn of(pid: i32) -> Result<Self, ProcessContextError> {
        Ok(Self::from(&ProcessContext::rights_of(pid)?))
    }

    /// Does `work` with no more rights to files than that user has. Only root can, so anybody else does it with their own.
    ///
    /// Errors: the rights can't be given up; nothing was done.
    pub(super) fn act<T: Send>(&self, work: impl FnOnce() -> T + Send) -> io::Result<T> {
        if !Uid::effective().is_root() || self.user.is_root() {
            return Ok(work());
        }
        // Rights to files belong to a thread; this one ends with its work.
        let give_up_and_work = || {
            self.give_up()?;
            Ok(work())
        };
        thread::scope(|scope| {
            let done = scope.spawn(give_up_and_work).join();
            done.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Has a program that is to be started run as that user, in no further groups.
    pub(super) fn own(&self, command: &mut Command) {
        if Uid::effective().is_root() && !self.user.is_root() {
            command.uid(self.user.as_raw()).gid(self.group.as_raw());
        }
    }

    fn give_up(&self) -> io::Result<()> {
        // SAFETY: the call reads as many numbers as there are. Not by the C library, which would change all threads.
        let changed = unsafe { libc::syscall(libc::SYS_setgroups, self.others.len(), self.others.as_ptr()) };
        if changed != 0 {
            return Err(io::Error::last_os_error());
        }
        setfsgid(self.group);
        // Leaving root's takes the capabilities that override permissions, too (`capabilities(7)`).
        setfsuid(self.user);
        // Both calls tell what was there before, and nothing of failure.
        if setfsgid(self.group) == self.group && setfsuid(self.user) == self.user {
            Ok(())
        } else {
            Err(io::ErrorKind::PermissionDenied.into())
        }
    }
}

impl From<&ProcessContext> for Owner {
    fn from(process_context: &ProcessContext) -> Self {
        let ([_, user, _], [_, group, _]) = (process_context.users, process_context.groups);
        Self {
            user: Uid::from_raw(user),
            group: Gid::from_raw(group),
            others: process_context.other_groups.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn what_another_user_may_not_is_not_done_for_them_and_rights_come_back() {
        if !Uid::effective().is_root() {
            return;
        }
        let folder = std::env::temp_dir().join(format!("vmpatch-owner-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        fs::set_permissions(&folder, fs::Permissions::from_mode(0o755)).unwrap();
        let (from, to) = (folder.join("from"), folder.join("to"));
        fs::write(&from, "").unwrap();
        let other = Owner {
            user: Uid::from_raw(4711),
            group: Gid::from_raw(4711),
            others: Vec::new(),
        };
        let refused = other.act(|| fs::rename(&from, &to)).unwrap().unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::PermissionDenied);
        fs::rename(&from, &to).unwrap();
        let root = Owner {
            user: Uid::from_raw(0),
            ..other
        };
        root.act(|| fs::remove_file(&to)).unwrap().unwrap();
        fs::remove_dir_all(folder).unwrap();
    }
}
