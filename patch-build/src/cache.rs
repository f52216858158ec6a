//! The folder that keeps what was fetched and made. Tests run in parallel, so each entry is made once, under a lock, and
//! appears under its name only when it is whole.

use std::fs::{self, File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};

/// Why the cache could not be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No folder to keep it in is known.
    #[error("no place for the cache: set VMPATCH_CACHE (neither it, nor XDG_CACHE_HOME, nor HOME is set)")]
    NoPlace,
    /// The file system refused.
    #[error("can't {action} {}", path.display())]
    Io {
        /// What was being done.
        action: &'static str,
        /// To which file or folder.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
}

impl Error {
    /// Makes an [`Error::Io`] out of the file system's answer, for `map_err`.
    pub fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { action, path, source }
    }
}

/// A folder of entries, shared by all processes of a user.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cache {
    root: PathBuf,
}

impl Cache {
    /// The cache in the folder `root`, which need not exist yet.
    pub fn at(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// The cache where the environment wants it: `$VMPATCH_CACHE`, else `$XDG_CACHE_HOME/vmpatch`, else
    /// `$HOME/.cache/vmpatch`.
    pub fn from_env() -> Result<Self, Error> {
        root_from(|name| {
            std::env::var_os(name)
                .filter(|value| !value.is_empty())
                .map(PathBuf::from)
        })
        .map(Self::at)
        .ok_or(Error::NoPlace)
    }

    /// The folder itself.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Takes the lock of the entry `key` (a relative path), and makes the folder that holds the entry. Waits while
    /// another process or thread has the lock; dropped, it is free again.
    pub fn lock(&self, key: &str) -> Result<Lock, Error> {
        self.lock_or_wait(key, || {})
    }

    /// As [`Cache::lock`]. Calls `waiting` first where another process or thread has the lock.
    pub fn lock_or_wait(&self, key: &str, waiting: impl FnOnce()) -> Result<Lock, Error> {
        let entry = self.root.join(key);
        let path = suffixed(&entry, ".lock");
        let folder = path.parent().unwrap_or(&self.root);
        fs::create_dir_all(folder).map_err(Error::io("make the cache folder", folder))?;
        let file = File::create(&path).map_err(Error::io("open the lock", &path))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                waiting();
                file.lock().map_err(Error::io("take the lock", &path))?;
            }
            Err(TryLockError::Error(source)) => return Err(Error::io("take the lock", &path)(source)),
        }
        Ok(Lock { entry, _file: file })
    }

    /// The folder `key` (a relative path) of the cache, filled by `fill` if it does not exist yet. `fill` is given an
    /// empty folder beside it, which gets the entry's name only after `fill` has succeeded.
    pub fn folder<E: From<Error>>(&self, key: &str, fill: impl FnOnce(&Path) -> Result<(), E>) -> Result<PathBuf, E> {
        let lock = self.lock(key)?;
        let entry = lock.entry();
        if entry.is_dir() {
            return Ok(entry.to_owned());
        }
        let partial = suffixed(entry, ".partial");
        if partial.exists() {
            fs::remove_dir_all(&partial).map_err(Error::io("remove what an interrupted run left in", &partial))?;
        }
        fs::create_dir(&partial).map_err(Error::io("make the folder", &partial))?;
        fill(&partial)?;
        fs::rename(&partial, entry).map_err(Error::io("rename into its place", &partial))?;
        Ok(entry.to_owned())
    }
}

/// The lock of one entry, held until it is dropped.
#[derive(Debug)]
pub struct Lock {
    entry: PathBuf,
    _file: File,
}

impl Lock {
    /// The path of the locked entry; whether it exists is for the holder to see.
    pub fn entry(&self) -> &Path {
        &self.entry
    }
}

/// The cache's folder according to the variables that `variable` knows.
fn root_from(variable: impl Fn(&str) -> Option<PathBuf>) -> Option<PathBuf> {
    variable("VMPATCH_CACHE")
        .or_else(|| Some(variable("XDG_CACHE_HOME")?.join("vmpatch")))
        .or_else(|| Some(variable("HOME")?.join(".cache/vmpatch")))
}

/// `path` with `suffix` appended to its last part (`with_extension` would cut a version number off).
fn suffixed(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    PathBuf::from(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scratch(name: &str) -> Cache {
        let root = std::env::temp_dir().join(format!("vmpatch-cache-{}-{name}", std::process::id()));
        drop(fs::remove_dir_all(&root));
        Cache::at(root)
    }

    #[test]
    fn the_most_specific_variable_says_where_the_cache_is() {
        let all = |name: &str| Some(PathBuf::from(format!("/{name}")));
        assert_eq!(root_from(all), Some(PathBuf::from("/VMPATCH_CACHE")));
        let home = |name: &str| (name == "HOME").then(|| PathBuf::from("/root"));
        assert_eq!(root_from(home), Some(PathBuf::from("/root/.cache/vmpatch")));
        assert_eq!(root_from(|_| None), None);
    }

    #[test]
    fn a_folder_is_filled_once_even_by_many_threads() {
        let cache = scratch("once");
        let fills = std::sync::atomic::AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    let folder = cache.folder::<Error>("kind/entry_1.0", |partial| {
                        fills.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
                        fs::write(partial.join("file"), "whole").map_err(Error::io("write", partial))
                    });
                    assert_eq!(fs::read_to_string(folder.unwrap().join("file")).unwrap(), "whole");
                });
            }
        });
        assert_eq!(fills.into_inner(), 1);
        fs::remove_dir_all(cache.root()).unwrap();
    }

    #[test]
    fn who_waits_for_a_lock_says_so() {
        let cache = scratch("waits");
        let first = cache.lock_or_wait("entry", || panic!("nobody has it")).unwrap();
        let (told, hears) = std::sync::mpsc::channel();
        std::thread::scope(|scope| {
            let waits = scope.spawn(|| cache.lock_or_wait("entry", || told.send("waiting").unwrap()).map(drop));
            assert_eq!(hears.recv(), Ok("waiting"));
            drop(first);
            waits.join().unwrap().unwrap();
        });
        fs::remove_dir_all(cache.root()).unwrap();
    }

    #[test]
    fn a_folder_whose_filling_failed_does_not_exist_and_is_filled_anew() {
        let cache = scratch("failed");
        let failed = cache.folder("entry", |partial| {
            fs::write(partial.join("half"), "").unwrap();
            Err(Error::NoPlace)
        });
        assert!(matches!(failed, Err(Error::NoPlace)));
        assert!(!cache.root().join("entry").exists());
        let folder = cache.folder::<Error>("entry", |_| Ok(())).unwrap();
        assert_eq!(fs::read_dir(folder).unwrap().count(), 0);
        fs::remove_dir_all(cache.root()).unwrap();
    }
}
