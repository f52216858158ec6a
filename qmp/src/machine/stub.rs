//! Opens and closes QEMU's GDB stub at run time.
//!
//! QEMU listens on a socket in a directory that only this user can enter. The name of the socket is removed at once, and this process reaches it
//! through `/proc/self/fd`, so that no other process connects. If QEMU cannot reach the directory (another user, a confined process), a listening
//! socket is passed as a descriptor. That is the second choice: QEMU 10.0 takes a descriptor on one thread and closes it with its connection on
//! another, without a lock, so that a client that is killed at this moment can make QEMU close a wrong one (seen: a descriptor of the next client).
//! Listening does not pause the guest; a connect does.

use crate::client::{Client, CommandError};
use serde::Deserialize;
use serde_json::{Value, json};
use std::fs::{DirBuilder, File};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, SystemTime};

/// The name of our character device in QEMU. It identifies a stub that a killed process has left.
const DEVICE: &str = "vmpatch-gdb";

/// The name that QEMU gives to the device of a stub opened by `-gdb`, `-s` or a monitor's `gdbserver`.
const OPERATORS_DEVICE: &str = "gdb";

/// Prefix of the names of our directories.
const DIRECTORY_PREFIX: &str = "vmpatch-gdb-";

/// The socket's name in its directory.
const SOCKET: &str = "s";

/// Age from which a directory counts as left behind, in seconds. It is used for milliseconds, and for ten seconds if QEMU hangs.
const STALE_S: u64 = 60;

/// Attempts to find a free directory name.
const DIRECTORY_TRIES: u32 = 64;

/// Why the stub cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum StubOpenError {
    /// The operator has opened a stub of the guest.
    #[error("the guest has a GDB stub of its own at {at}; close it in QEMU's monitor (`gdbserver none`)")]
    Foreign {
        /// Its address, as QEMU shows it.
        at: String,
    },
    /// QEMU did not accept the socket.
    #[error(transparent)]
    Command(#[from] CommandError),
    /// The monitor's `gdbserver` gave an unexpected reply.
    #[error("QEMU did not open its GDB stub: {said:?}")]
    Refused {
        /// QEMU's reply.
        said: String,
    },
    /// A private directory or socket cannot be created.
    #[error("cannot make a socket in {directory}")]
    Socket {
        /// The directory.
        directory: PathBuf,
        /// The host's error.
        #[source]
        cause: io::Error,
    },
}

#[derive(Deserialize)]
struct Chardev {
    label: String,
    filename: String,
}

/// A listening stub of ours. [`close`] ends it.
#[derive(Debug)]
pub struct ListeningStub {
    /// The socket as an open file, without a connection.
    socket: OwnedFd,
}

impl ListeningStub {
    /// Lets QEMU listen, after it has closed a stub that a killed process may have left.
    pub async fn open(client: &Client) -> Result<Self, StubOpenError> {
        let devices = close_left(client).await?;
        if let Some(foreign) = devices.into_iter().find(|device| device.label == OPERATORS_DEVICE) {
            return Err(StubOpenError::Foreign { at: foreign.filename });
        }
        let name = SocketName::new(&std::env::temp_dir())?;
        if add_device(client, json!({"type": "unix", "data": {"path": name.path}}))
            .await
            .is_err()
        {
            add_device_by_descriptor(client, &name).await?;
        }
        let socket = name.open()?;
        let said = client.hmp(&format!("gdbserver chardev:{DEVICE}")).await?;
        // 7.2 and 10.0: "Waiting for gdb connection on device 'chardev:vmpatch-gdb'", else "Could not open gdbserver …".
        if !said.starts_with("Waiting for gdb connection") {
            close(client).await?;
            return Err(StubOpenError::Refused { said });
        }
        Ok(Self { socket })
    }

    /// The address to connect to.
    pub fn socket(&self) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}", self.socket.as_raw_fd()))
    }
}

/// Adds the character device: a socket that listens at `address`.
async fn add_device(client: &Client, address: Value) -> Result<(), CommandError> {
    let socket = json!({"type": "socket", "data": {"addr": address, "server": true, "wait": false}});
    let _: Value = client
        .execute_as("chardev-add", json!({"id": DEVICE, "backend": socket}))
        .await?;
    Ok(())
}

/// Adds the character device with a socket that this process has created.
async fn add_device_by_descriptor(client: &Client, name: &SocketName) -> Result<(), StubOpenError> {
    let listener = UnixListener::bind(&name.path).map_err(|cause| name.error(cause))?;
    // The name is unique: if a name is used again, QEMU closes its former descriptor.
    let fdname = format!("{DEVICE}-{}", name.unique());
    client
        .execute_with_fd(qapi::qmp::getfd { fdname: fdname.clone() }, listener.into())
        .await?;
    Ok(add_device(client, json!({"type": "fd", "data": {"str": fdname}})).await?)
}

/// Closes a stub of ours, of this process or of a killed one, if there is one. Does not touch an operator's.
pub async fn close(client: &Client) -> Result<(), CommandError> {
    close_left(client).await.map(drop)
}

/// The same, and gives the devices that are left.
async fn close_left(client: &Client) -> Result<Vec<Chardev>, CommandError> {
    let ours = |devices: &[Chardev]| devices.iter().any(|device| device.label == DEVICE);
    let devices = chardevs(client).await?;
    if !ours(&devices) {
        return Ok(devices);
    }
    // Ends the stub and removes its device, unless the process was killed before the stub used the device.
    client.hmp("gdbserver none").await?;
    let devices = chardevs(client).await?;
    if !ours(&devices) {
        return Ok(devices);
    }
    client
        .execute(qapi::qmp::chardev_remove { id: DEVICE.to_owned() })
        .await?;
    chardevs(client).await
}

async fn chardevs(client: &Client) -> Result<Vec<Chardev>, CommandError> {
    client.execute_as("query-chardev", json!({})).await
}

/// A name for a socket, in a directory of its own that only this user can enter. When it is dropped, it removes both; the socket continues to exist.
#[derive(Debug)]
struct SocketName {
    directory: PathBuf,
    path: PathBuf,
}

impl SocketName {
    fn new(parent: &Path) -> Result<Self, StubOpenError> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        remove_stale(parent, Duration::from_secs(STALE_S));
        let mut result = Err(io::ErrorKind::AlreadyExists.into());
        for _ in 0..DIRECTORY_TRIES {
            let count = COUNT.fetch_add(1, Ordering::Relaxed);
            let directory = parent.join(format!("{DIRECTORY_PREFIX}{}-{count}", std::process::id()));
            match DirBuilder::new().mode(0o700).create(&directory) {
                Err(cause) if cause.kind() == io::ErrorKind::AlreadyExists => {}
                other => {
                    result = other.map(|()| Self {
                        path: directory.join(SOCKET),
                        directory,
                    });
                    break;
                }
            }
        }
        result.map_err(|cause| StubOpenError::Socket {
            directory: parent.to_owned(),
            cause,
        })
    }

    /// A name that identifies the directory among all others of this host, over its whole life.
    fn unique(&self) -> String {
        let made = std::fs::metadata(&self.directory).and_then(|data| data.modified()).ok();
        let since = made
            .and_then(|made| made.duration_since(SystemTime::UNIX_EPOCH).ok())
            .unwrap_or_default();
        format!("{}-{}", self.directory.display(), since.as_nanos())
    }

    /// The socket as an open file, without a connection.
    fn open(&self) -> Result<OwnedFd, StubOpenError> {
        let flags = nix::libc::O_PATH | nix::libc::O_NOFOLLOW;
        let file = File::options().read(true).custom_flags(flags).open(&self.path);
        file.map(OwnedFd::from).map_err(|cause| self.error(cause))
    }

    fn error(&self, cause: io::Error) -> StubOpenError {
        StubOpenError::Socket {
            directory: self.directory.clone(),
            cause,
        }
    }
}

impl Drop for SocketName {
    fn drop(&mut self) {
        remove(&self.directory);
    }
}

/// Removes a socket's name. A name that cannot be removed stays until the next time.
fn remove(directory: &Path) {
    let _ = std::fs::remove_file(directory.join(SOCKET));
    let _ = std::fs::remove_dir(directory);
}

/// Removes names that a killed process has left. A name is needed for milliseconds.
fn remove_stale(parent: &Path, age: Duration) {
    for entry in std::fs::read_dir(parent).into_iter().flatten().flatten() {
        let named_as_ours = entry
            .file_name()
            .to_str()
            .is_some_and(|name| name.starts_with(DIRECTORY_PREFIX));
        if named_as_ours {
            remove_if_stale(&entry.path(), age);
        }
    }
}

/// Removes a directory and its socket if this user has created it, at least `age` ago. Any user can create such a name in a shared directory, also as a
/// link: links are not followed, and the socket is removed from the same directory that was checked.
fn remove_if_stale(path: &Path, age: Duration) {
    let flags = nix::libc::O_DIRECTORY | nix::libc::O_NOFOLLOW;
    let Ok(directory) = File::options().read(true).custom_flags(flags).open(path) else {
        return;
    };
    let stale = directory.metadata().is_ok_and(|data| {
        let passed = data.modified().ok().and_then(|made| made.elapsed().ok());
        data.uid() == nix::unistd::geteuid().as_raw() && passed.is_some_and(|passed| passed >= age)
    });
    if stale {
        let _ = std::fs::remove_file(format!("/proc/self/fd/{}/{SOCKET}", directory.as_raw_fd()));
        let _ = std::fs::remove_dir(path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;

    #[test]
    fn a_socket_without_a_name_is_connected_to_again_and_again() {
        let name = SocketName::new(&std::env::temp_dir()).unwrap();
        let listener = UnixListener::bind(&name.path).unwrap();
        let stub = ListeningStub {
            socket: name.open().unwrap(),
        };
        let directory = name.directory.clone();
        drop(name);
        assert!(!directory.exists());
        for _ in 0..2 {
            UnixStream::connect(stub.socket()).unwrap();
            listener.accept().unwrap();
        }
    }

    #[test]
    fn a_name_left_by_a_killed_process_is_removed_once_it_is_old() {
        let parent = SocketName::new(&std::env::temp_dir()).unwrap();
        let left = SocketName::new(&parent.directory).unwrap();
        let other = parent.directory.join("other");
        std::fs::create_dir(&other).unwrap();
        drop(UnixListener::bind(&left.path).unwrap());
        remove_stale(&parent.directory, Duration::from_secs(STALE_S));
        assert!(left.path.exists());
        remove_stale(&parent.directory, Duration::ZERO);
        assert!(!left.directory.exists() && other.exists());
        std::fs::remove_dir(&other).unwrap();
    }

    #[test]
    fn a_link_that_bears_the_name_of_a_left_over_is_not_followed() {
        let parent = SocketName::new(&std::env::temp_dir()).unwrap();
        let elsewhere = parent.directory.join("elsewhere");
        std::fs::create_dir(&elsewhere).unwrap();
        std::fs::write(elsewhere.join(SOCKET), "").unwrap();
        let link = parent.directory.join(format!("{DIRECTORY_PREFIX}1-0"));
        std::os::unix::fs::symlink(&elsewhere, &link).unwrap();
        remove_stale(&parent.directory, Duration::ZERO);
        assert!(elsewhere.join(SOCKET).exists());
        std::fs::remove_file(&link).unwrap();
        std::fs::remove_dir_all(&elsewhere).unwrap();
    }
}
