//! Opening QEMU's GDB stub at run time, and closing it.
//!
//! The stub listens on a socket that is handed to QEMU as a descriptor, so QEMU needs no access to any directory of
//! ours. Its name is removed at once; this process keeps a way to it through `/proc/self/fd`, so nobody else connects,
//! and nothing is left behind however it ends. Listening does not pause the guest; connecting does.

use crate::client::{Client, CommandError};
use serde::Deserialize;
use serde_json::{Value, json};
use std::fs::{DirBuilder, File};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

/// The name of our character device and descriptor in QEMU; by it a left-over of a killed process is recognised.
const DEVICE: &str = "vmpatch-gdb";

/// The name that QEMU gives to the device of a stub opened by `-gdb`, `-s` or a monitor's `gdbserver`.
const OPERATORS_DEVICE: &str = "gdb";

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

/// A stub of ours that listens. [`close`] ends it.
#[derive(Debug)]
pub struct ListeningStub {
    /// The socket as a file, opened without being connected to.
    socket: OwnedFd,
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
        let (socket_file, listener) = listen().map_err(|cause| StubOpenError::Socket {
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
        let said = client.hmp(&format!("gdbserver chardev:{DEVICE}")).await?;
        // 7.2 and 10.0: "Waiting for gdb connection on device 'chardev:vmpatch-gdb'", else "Could not open gdbserver …".
        if !said.starts_with("Waiting for gdb connection") {
            close(client).await?;
            return Err(StubOpenError::Refused { said });
        }
        Ok(Self { socket: socket_file })
    }

    /// Where to connect.
    pub fn socket(&self) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}", self.socket.as_raw_fd()))
    }
}

/// Closes a stub of ours, if there is one, of this process or of one that was killed. Does not touch an operator's.
pub async fn close(client: &Client) -> Result<(), CommandError> {
    let ours = |devices: Vec<Chardev>| devices.iter().any(|device| device.label == DEVICE);
    if !ours(chardevs(client).await?) {
        return Ok(());
    }
    // Ends the stub and removes its device, unless the process was killed before the stub took the device.
    client.hmp("gdbserver none").await?;
    if ours(chardevs(client).await?) {
        client
            .execute(qapi::qmp::chardev_remove { id: DEVICE.to_owned() })
            .await?;
    }
    Ok(())
}

async fn chardevs(client: &Client) -> Result<Vec<Chardev>, CommandError> {
    client.execute_as("query-chardev", json!({})).await
}

/// A listening socket without a name, and a way to connect to it.
fn listen() -> io::Result<(OwnedFd, UnixListener)> {
    let directory = private_dir(&std::env::temp_dir())?;
    let path = directory.join("gdb");
    let made = UnixListener::bind(&path).and_then(|listener| Ok((open_socket_file(&path)?, listener)));
    // A failure to remove leaves a name that only this user reaches.
    let _ = std::fs::remove_file(&path);
    let _ = std::fs::remove_dir(&directory);
    made
}

/// The socket as a file, without connecting.
fn open_socket_file(path: &Path) -> io::Result<OwnedFd> {
    let flags = nix::libc::O_PATH | nix::libc::O_NOFOLLOW;
    Ok(File::options().read(true).custom_flags(flags).open(path)?.into())
}

/// Makes a directory that only this user can enter.
fn private_dir(parent: &Path) -> io::Result<PathBuf> {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    for _ in 0..DIRECTORY_TRIES {
        let name = format!(
            "vmpatch-{}-{}",
            std::process::id(),
            COUNT.fetch_add(1, Ordering::Relaxed)
        );
        let path = parent.join(name);
        match DirBuilder::new().mode(0o700).create(&path) {
            Err(cause) if cause.kind() == io::ErrorKind::AlreadyExists => {}
            result => return result.map(|()| path),
        }
    }
    Err(io::ErrorKind::AlreadyExists.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;

    #[test]
    fn a_socket_without_a_name_is_connected_to_again_and_again() {
        let (socket, listener) = listen().unwrap();
        assert!(!listener.local_addr().unwrap().as_pathname().unwrap().exists());
        let stub = ListeningStub { socket };
        for _ in 0..2 {
            UnixStream::connect(stub.socket()).unwrap();
            listener.accept().unwrap();
        }
    }
}
