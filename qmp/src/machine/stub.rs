//! Opening QEMU's GDB stub at run time, and closing it.
//!
//! The stub listens on a socket that is handed to QEMU as a descriptor, so QEMU needs no access to any directory of
//! ours, and nothing but this process has a way to the socket. Listening does not pause the guest; connecting does.

use crate::client::{Client, CommandError};
use serde::Deserialize;
use serde_json::{Value, json};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

/// The name of our character device and descriptor in QEMU; by it a left-over of a killed process is recognised.
const DEVICE: &str = "vmpatch-gdb";

/// The name that QEMU gives to the device of a stub opened by `-gdb`, `-s` or a monitor's `gdbserver`.
const OPERATORS_DEVICE: &str = "gdb";

/// How the names of our directories begin.
const DIRECTORY_PREFIX: &str = "vmpatch-";

/// Tries to find a directory name that is free.
const DIRECTORY_TRIES: u32 = 64;

/// Why the stub could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum StubOpenError {
    /// The guest has a stub already, of its operator.
    #[error("the guest has a GDB stub of its own at {at}; close it in QEMU's monitor (`gdbserver none`)")]
    Foreign {
        /// Where it listens, in QEMU's words.
        at: String,
    },
    /// QEMU did not take the socket.
    #[error(transparent)]
    Command(#[from] CommandError),
    /// The monitor's `gdbserver` said something unexpected.
    #[error("QEMU did not open its GDB stub: {said:?}")]
    Refused {
        /// QEMU's words.
        said: String,
    },
    /// No private directory or socket could be made.
    #[error("cannot make a socket in {directory}")]
    Socket {
        /// The directory for temporary files.
        directory: PathBuf,
        /// What the host said.
        #[source]
        cause: io::Error,
    },
}

#[derive(Deserialize)]
struct Chardev {
    label: String,
    filename: String,
}

/// A stub of ours that listens. Dropping it removes the socket's directory; [`close`] tells QEMU.
#[derive(Debug)]
pub struct ListeningStub {
    directory: PrivateDir,
}

impl ListeningStub {
    /// Has QEMU listen, after closing what a killed process may have left.
    pub async fn open(client: &Client) -> Result<Self, StubOpenError> {
        close(client).await?;
        if let Some(foreign) = chardevs(client)
            .await?
            .into_iter()
            .find(|device| device.label == OPERATORS_DEVICE)
        {
            return Err(StubOpenError::Foreign { at: foreign.filename });
        }
        let (directory, listener) = listen().map_err(|cause| StubOpenError::Socket {
            directory: std::env::temp_dir(),
            cause,
        })?;
        client
            .execute_with_fd(
                qapi::qmp::getfd {
                    fdname: DEVICE.to_owned(),
                },
                listener.into(),
            )
            .await?;
        let address = json!({"type": "fd", "data": {"str": DEVICE}});
        let socket = json!({"type": "socket", "data": {"addr": address, "server": true, "wait": false}});
        let _: Value = client
            .execute_as("chardev-add", json!({"id": DEVICE, "backend": socket}))
            .await?;
        let stub = Self { directory };
        let said = client.hmp(&format!("gdbserver chardev:{DEVICE}")).await?;
        // 7.2 and 10.0: "Waiting for gdb connection on device 'chardev:vmpatch-gdb'", else "Could not open gdbserver …".
        if said.starts_with("Waiting for gdb connection") {
            Ok(stub)
        } else {
            Err(StubOpenError::Refused { said })
        }
    }

    /// Where to connect.
    pub fn socket(&self) -> PathBuf {
        self.directory.socket()
    }
}

/// Closes a stub of ours, if there is one, of this process or of one that was killed. Does not touch an operator's.
pub async fn close(client: &Client) -> Result<(), CommandError> {
    let ours = |devices: Vec<Chardev>| devices.into_iter().find(|device| device.label == DEVICE);
    let Some(device) = ours(chardevs(client).await?) else {
        return Ok(());
    };
    // Ends the stub and removes its device, unless the process was killed before the stub took the device.
    client.hmp("gdbserver none").await?;
    if ours(chardevs(client).await?).is_some() {
        client
            .execute(qapi::qmp::chardev_remove { id: DEVICE.to_owned() })
            .await?;
    }
    drop(directory_of(&device.filename, &std::env::temp_dir()));
    Ok(())
}

/// The directory behind `disconnected:unix:/tmp/vmpatch-1-0/gdb,server=on`, if it has a name such as we give.
fn directory_of(filename: &str, parent: &Path) -> Option<PrivateDir> {
    let (_, address) = filename.split_once("unix:")?;
    let (socket, _) = address.split_once(',')?;
    let directory = Path::new(socket).parent()?;
    let is_ours = directory.file_name()?.to_str()?.starts_with(DIRECTORY_PREFIX) && directory.parent()? == parent;
    is_ours.then(|| PrivateDir(directory.to_owned()))
}

async fn chardevs(client: &Client) -> Result<Vec<Chardev>, CommandError> {
    client.execute_as("query-chardev", json!({})).await
}

/// A directory that only this user can enter, with one socket in it.
#[derive(Debug)]
struct PrivateDir(PathBuf);

impl PrivateDir {
    fn socket(&self) -> PathBuf {
        self.0.join("gdb")
    }
}

impl Drop for PrivateDir {
    fn drop(&mut self) {
        // QEMU removes the socket itself on closing the stub. Nothing to do about a failure: an empty directory stays.
        let _ = std::fs::remove_file(self.socket());
        let _ = std::fs::remove_dir(&self.0);
    }
}

fn listen() -> io::Result<(PrivateDir, UnixListener)> {
    let directory = private_dir(&std::env::temp_dir())?;
    let listener = UnixListener::bind(directory.socket())?;
    Ok((directory, listener))
}

fn private_dir(parent: &Path) -> io::Result<PrivateDir> {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    for _ in 0..DIRECTORY_TRIES {
        let name = format!(
            "vmpatch-{}-{}",
            std::process::id(),
            COUNT.fetch_add(1, Ordering::Relaxed)
        );
        let path = parent.join(name);
        match std::fs::DirBuilder::new().mode(0o700).create(&path) {
            Err(cause) if cause.kind() == io::ErrorKind::AlreadyExists => {}
            result => return result.map(|()| PrivateDir(path)),
        }
    }
    Err(io::ErrorKind::AlreadyExists.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_left_over_is_removed_only_where_its_name_is_ours() {
        let parent = private_dir(&std::env::temp_dir()).unwrap();
        let left = private_dir(&parent.0).unwrap();
        let path = left.0.clone();
        std::mem::forget(left);
        let filename = format!("disconnected:unix:{}/gdb,server=on", path.display());
        for other in [Path::new("/"), &path] {
            assert!(directory_of(&filename, other).is_none());
        }
        assert!(directory_of("unix:/etc/gdb,server=on", Path::new("/")).is_none());
        assert!(directory_of("null", &parent.0).is_none());
        assert!(path.exists());
        drop(directory_of(&filename, &parent.0).unwrap());
        assert!(!path.exists());
    }
}
