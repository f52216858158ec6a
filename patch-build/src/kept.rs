//! What was made with a tree, kept under a digest of all that went into it, so that the same fix again compiles nothing.
//!
//! The key names what is known beforehand: the tools, the command, the texts of changed files. An entry names the files that were read
//! besides, each with the digest of its content, and is taken only while they are the same. So it is never older than what it was made
//! of. An entry that is damaged is none.

use std::collections::HashMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::SystemTime;

use sha2::{Digest, Sha256};

use crate::cache::Error;

/// The first line of an entry's file; another one for another format.
const FORMAT: &str = "vmpatch-kept 1";
/// Entries of one tree take no more room than this, give or take one [bytes]. The oldest go first.
const BYTES_MAX: u64 = 256 << 20;

/// A SHA-256.
type Sum = [u8; 32];

/// The results that are kept of one tree.
#[derive(Debug)]
pub(crate) struct Kept {
    folder: PathBuf,
    /// Digests of files that were read in this process. Nobody changes a tree meanwhile: its lock is held.
    sums: Mutex<HashMap<PathBuf, Option<Sum>>>,
}

/// What was made: as many parts as its maker likes.
pub(crate) type Parts = Vec<Vec<u8>>;

impl Kept {
    /// In that folder, which need not exist.
    pub(crate) fn at(folder: PathBuf) -> Self {
        Self {
            folder,
            sums: Mutex::default(),
        }
    }

    /// What was made of these, if it is kept, whole, and all files that it was made of are what they were.
    pub(crate) fn get(&self, key: &[&[u8]]) -> Option<Parts> {
        let path = self.path(key);
        let bytes = fs::read(&path).ok()?;
        let Some((inputs, parts)) = entry(&bytes) else {
            drop(fs::remove_file(&path));
            return None;
        };
        let is_same = |(sum, file): &(Sum, &Path)| self.sum(file) == Some(*sum);
        if !inputs.iter().all(is_same) {
            return None;
        }
        // The oldest go first; nothing else depends on it.
        drop(File::open(&path).and_then(|file| file.set_modified(SystemTime::now())));
        Some(parts)
    }

    /// Keeps what was made of these and of the content of `inputs`. What can't be read is not kept.
    pub(crate) fn put(&self, key: &[&[u8]], inputs: &[PathBuf], parts: &[&[u8]]) -> Result<(), Error> {
        let mut body = Vec::new();
        body.extend(number(inputs.len()));
        for file in inputs {
            let (Some(sum), Some(name)) = (self.sum(file), file.to_str()) else {
                return Ok(());
            };
            body.extend(sum);
            push(&mut body, name.as_bytes());
        }
        body.extend(number(parts.len()));
        for part in parts {
            push(&mut body, part);
        }
        fs::create_dir_all(&self.folder).map_err(Error::io("make the folder", &self.folder))?;
        let path = self.path(key);
        // Other threads keep other entries meanwhile.
        let partial = path.with_extension("partial");
        let bytes = [FORMAT.as_bytes(), &Sha256::digest(&body), &body].concat();
        fs::write(&partial, bytes).map_err(Error::io("write", &partial))?;
        fs::rename(&partial, &path).map_err(Error::io("rename", &partial))?;
        self.shrink(BYTES_MAX)
    }

    /// Removes the oldest entries until the others take no more than that.
    fn shrink(&self, bytes_max: u64) -> Result<(), Error> {
        let entries = fs::read_dir(&self.folder).map_err(Error::io("list", &self.folder))?;
        let mut all: Vec<(SystemTime, u64, PathBuf)> = entries
            .filter_map(|entry| {
                let entry = entry.ok()?;
                let about = entry.metadata().ok()?;
                Some((about.modified().ok()?, about.len(), entry.path()))
            })
            .collect();
        all.sort();
        let mut bytes: u64 = all.iter().map(|(_, bytes, _)| bytes).sum();
        for (_, own, path) in all {
            if bytes <= bytes_max {
                break;
            }
            // Another thread may have removed it.
            drop(fs::remove_file(path));
            bytes = bytes.saturating_sub(own);
        }
        Ok(())
    }

    fn path(&self, key: &[&[u8]]) -> PathBuf {
        self.folder.join(digest(key))
    }

    /// The digest of a file's content; `None` where it can't be read.
    fn sum(&self, file: &Path) -> Option<Sum> {
        let known = |sums: &HashMap<PathBuf, Option<Sum>>| sums.get(file).copied();
        if let Some(sum) = self.sums.lock().ok().and_then(|sums| known(&sums)) {
            return sum;
        }
        let sum = fs::read(file).ok().map(|content| Sha256::digest(content).into());
        if let Ok(mut sums) = self.sums.lock() {
            sums.insert(file.to_owned(), sum);
        }
        sum
    }
}

/// The SHA-256 over all parts and their lengths, in hexadecimal digits.
pub(crate) fn digest<T: AsRef<[u8]>>(parts: &[T]) -> String {
    let mut hasher = Sha256::new();
    for part in parts.iter().map(AsRef::as_ref) {
        hasher.update(number(part.len()));
        hasher.update(part);
    }
    hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

fn number(value: usize) -> [u8; 8] {
    (value as u64).to_le_bytes()
}

fn push(body: &mut Vec<u8>, part: &[u8]) {
    body.extend(number(part.len()));
    body.extend(part);
}

/// The files that an entry was made of, with their digests, and what was made.
fn entry(bytes: &[u8]) -> Option<(Vec<(Sum, &Path)>, Parts)> {
    let rest = bytes.strip_prefix(FORMAT.as_bytes())?;
    let (sum, mut body) = rest.split_at_checked(32)?;
    if *Sha256::digest(body) != *sum {
        return None;
    }
    let mut inputs = Vec::new();
    for _ in 0..count(&mut body)? {
        let sum = take(&mut body, 32)?.try_into().ok()?;
        let name = part(&mut body)?;
        inputs.push((sum, Path::new(std::str::from_utf8(name).ok()?)));
    }
    let mut parts = Vec::new();
    for _ in 0..count(&mut body)? {
        parts.push(part(&mut body)?.to_vec());
    }
    Some((inputs, parts))
}

fn take<'a>(bytes: &mut &'a [u8], count: usize) -> Option<&'a [u8]> {
    let (taken, rest) = bytes.split_at_checked(count)?;
    *bytes = rest;
    Some(taken)
}

fn count(bytes: &mut &[u8]) -> Option<usize> {
    let number = u64::from_le_bytes(take(bytes, 8)?.try_into().ok()?);
    usize::try_from(number).ok()
}

fn part<'a>(bytes: &mut &'a [u8]) -> Option<&'a [u8]> {
    let length = count(bytes)?;
    take(bytes, length)
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: [&[u8]; 2] = [b"gcc -c", b"text"];

    /// A folder with a header, and an entry that was made of it.
    fn kept(test: &str) -> (PathBuf, PathBuf) {
        let root = std::env::temp_dir().join(format!("vmpatch-kept-{}-{test}", std::process::id()));
        drop(fs::remove_dir_all(&root));
        fs::create_dir_all(&root).unwrap();
        let header = root.join("a.h");
        fs::write(&header, "one").unwrap();
        let kept = Kept::at(root.join("kept"));
        kept.put(&KEY, std::slice::from_ref(&header), &[b"object", b""])
            .unwrap();
        (root, header)
    }

    fn get(root: &Path) -> Option<Parts> {
        Kept::at(root.join("kept")).get(&KEY)
    }

    #[test]
    fn what_was_made_is_found_by_all_that_it_was_made_of() {
        let (root, header) = kept("found");
        assert_eq!(get(&root), Some(vec![b"object".to_vec(), Vec::new()]));
        let other: [&[u8]; 2] = [b"gcc -ct", b"ext"];
        assert_eq!(Kept::at(root.join("kept")).get(&other), None);
        fs::write(&header, "two").unwrap();
        assert_eq!(get(&root), None);
        fs::write(&header, "one").unwrap();
        assert!(get(&root).is_some());
        fs::remove_file(&header).unwrap();
        assert_eq!(get(&root), None);
        fs::remove_dir_all(&root).unwrap();
    }

    #[test]
    fn an_entry_that_is_damaged_is_none() {
        let (root, _) = kept("damaged");
        let path = Kept::at(root.join("kept")).path(&KEY);
        let whole = fs::read(&path).unwrap();
        for at in [0, FORMAT.len(), FORMAT.len() + 33, whole.len() - 1] {
            let mut damaged = whole.clone();
            damaged[at] ^= 1;
            fs::write(&path, &damaged).unwrap();
            assert_eq!(get(&root), None, "{at}");
            assert!(!path.exists());
        }
        fs::write(&path, &whole[..whole.len() / 2]).unwrap();
        assert_eq!(get(&root), None);
        fs::write(&path, &whole).unwrap();
        assert!(get(&root).is_some());
        fs::remove_dir_all(&root).unwrap();
    }

    #[test]
    fn the_oldest_entries_make_room() {
        let (root, header) = kept("room");
        let kept = Kept::at(root.join("kept"));
        let older = File::open(kept.path(&KEY)).unwrap();
        older.set_modified(SystemTime::UNIX_EPOCH).unwrap();
        kept.put(&[b"newer"], &[header], &[b"object"]).unwrap();
        let size = fs::metadata(kept.path(&[b"newer"])).unwrap().len();
        kept.shrink(size).unwrap();
        assert_eq!((kept.get(&KEY), kept.get(&[b"newer"]).is_some()), (None, true));
        fs::remove_dir_all(&root).unwrap();
    }
}
