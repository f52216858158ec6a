//! A QMP monitor that libvirt holds: libvirt passes each command on to QEMU (`virDomainQemuMonitorCommand`), and gives back its reply.
//!
//! libvirt marks the guest as tainted by its first command (`custom-monitor`), in its log and in the guest's status; that has no other effect. Events do not
//! come this way.

mod rpc;
mod xdr;

use super::descriptor::send_line;
use super::error::CommandError;
use super::transport::{Answer, Command, Transport};
use super::wire::{self, Event, Message, Refusal};
use rpc::{Procedure, RpcError};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::io::{self, ErrorKind};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;
use tokio::sync::{broadcast, mpsc, oneshot};
use tokio::task::JoinHandle;
use xdr::{Decoder, Encoder};

/// Most requests that wait for the task that owns the socket.
const REQUEST_QUEUE_LEN: usize = 16;
/// Bytes of one read from the socket.
const READ_BYTES: usize = 64 << 10;
/// Codes of libvirt's errors (`virErrorNumber` in `include/libvirt/virterror.h`).
const ERR_NO_DOMAIN: u32 = 42;
const ERR_AUTH_FAILED: u32 = 45;
const ERR_AUTH_UNAVAILABLE: u32 = 79;
const ERR_ACCESS_DENIED: u32 = 88;

/// A running guest, as libvirt knows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LibvirtGuest {
    /// The socket of libvirt's daemon.
    pub socket: PathBuf,
    /// What libvirt calls its hypervisor there: `qemu:///system` or `qemu:///session`.
    pub uri: String,
    /// The guest's UUID.
    pub uuid: [u8; 16],
}

/// Why libvirt did not lead to a guest's monitor.
#[derive(Debug, thiserror::Error)]
pub enum LibvirtError {
    /// There is no such socket, or nobody listens there.
    #[error("libvirt's daemon does not listen on {socket}")]
    NotRunning {
        /// The socket.
        socket: PathBuf,
    },
    /// This user may not connect, or libvirt asks who it is.
    #[error("libvirt does not let this user manage its guests ({socket}); run vmpatch as root")]
    Permission {
        /// The socket.
        socket: PathBuf,
    },
    /// libvirt has no running guest of that UUID.
    #[error("libvirt at {socket} has no running guest with the UUID of this QEMU")]
    NoGuest {
        /// The socket.
        socket: PathBuf,
    },
    /// libvirt refused.
    #[error("libvirt at {socket} refused to {what}: {cause}")]
    Refused {
        /// The socket.
        socket: PathBuf,
        /// What it was asked for.
        what: &'static str,
        /// Its answer.
        cause: String,
    },
    /// The connection broke off, or libvirt's answer is not understood.
    #[error("the connection to libvirt at {socket} failed")]
    Lost {
        /// The socket.
        socket: PathBuf,
        /// How.
        #[source]
        cause: io::Error,
    },
}

impl LibvirtError {
    fn of_connect(socket: &Path, cause: io::Error) -> Self {
        let socket = socket.to_owned();
        match cause.kind() {
            ErrorKind::NotFound | ErrorKind::ConnectionRefused => Self::NotRunning { socket },
            ErrorKind::PermissionDenied => Self::Permission { socket },
            _ => Self::Lost { socket, cause },
        }
    }

    fn of_rpc(socket: &Path, what: &'static str, cause: &RpcError) -> Self {
        let socket = socket.to_owned();
        match cause.code {
            ERR_NO_DOMAIN => Self::NoGuest { socket },
            ERR_AUTH_FAILED | ERR_AUTH_UNAVAILABLE | ERR_ACCESS_DENIED => Self::Permission { socket },
            _ => Self::Refused {
                socket,
                what,
                cause: cause.to_string(),
            },
        }
    }
}

/// A call on its way to libvirt.
#[derive(Debug)]
struct Request {
    procedure: Procedure,
    payload: Vec<u8>,
    fd: Option<OwnedFd>,
    reply: oneshot::Sender<Result<Vec<u8>, RpcError>>,
}

/// A guest's monitor, through libvirt. When it is dropped, it closes the connection; a command that QEMU has not answered by then stays with libvirt.
#[derive(Debug)]
pub(super) struct LibvirtMonitor {
    requests: mpsc::Sender<Request>,
    task: JoinHandle<()>,
    /// Why the connection ended, once it has.
    ended: Arc<OnceLock<String>>,
    /// The guest, as libvirt's procedures want it: `remote_nonnull_domain` in XDR.
    guest: Vec<u8>,
    pid: i32,
}

impl LibvirtMonitor {
    /// Connects to libvirt and finds the guest. `pid` is its QEMU.
    pub async fn connect(guest: &LibvirtGuest, pid: i32) -> Result<Self, LibvirtError> {
        let socket = &guest.socket;
        let stream = UnixStream::connect(socket).await;
        let stream = stream.map_err(|cause| LibvirtError::of_connect(socket, cause))?;
        let (requests, queue) = mpsc::channel(REQUEST_QUEUE_LEN);
        let ended = Arc::new(OnceLock::new());
        let reason = Arc::clone(&ended);
        let mut monitor = Self {
            requests,
            // Callers see the end by their channels, so the reason is set before these are dropped.
            task: tokio::spawn(async move { run(stream, queue, &reason).await }),
            ended,
            guest: Vec::new(),
            pid,
        };
        let unlike = || LibvirtError::Lost {
            socket: socket.clone(),
            cause: io::Error::new(ErrorKind::InvalidData, "its answer is not understood"),
        };
        let list = monitor.procedure(socket, "say how to authenticate", rpc::AUTH_LIST, Vec::new());
        if !allows_anybody(&list.await?).ok_or_else(unlike)? {
            return Err(LibvirtError::Permission { socket: socket.clone() });
        }
        // A name that is there, and no flags.
        let open = Encoder::default().u32(1).text(&guest.uri).u32(0).bytes();
        monitor
            .procedure(socket, "open its hypervisor", rpc::CONNECT_OPEN, open)
            .await?;
        let uuid = Encoder::default().fixed(&guest.uuid).bytes();
        let found = monitor.procedure(socket, "find a guest", rpc::DOMAIN_LOOKUP_BY_UUID, uuid);
        let found = found.await?;
        if !is_running(&found, &guest.uuid).ok_or_else(unlike)? {
            return Err(LibvirtError::NoGuest { socket: socket.clone() });
        }
        monitor.guest = found;
        Ok(monitor)
    }

    async fn procedure(
        &self,
        socket: &Path,
        what: &'static str,
        procedure: Procedure,
        payload: Vec<u8>,
    ) -> Result<Vec<u8>, LibvirtError> {
        match self.call_procedure(procedure, payload, None).await {
            Some(result) => result.map_err(|cause| LibvirtError::of_rpc(socket, what, &cause)),
            None => Err(LibvirtError::Lost {
                socket: socket.to_owned(),
                cause: io::Error::other(self.reason()),
            }),
        }
    }

    /// Why the connection has ended.
    fn reason(&self) -> String {
        self.ended
            .get()
            .cloned()
            .unwrap_or_else(|| "it had ended before".to_owned())
    }

    /// `None` if the connection has ended.
    async fn call_procedure(
        &self,
        procedure: Procedure,
        payload: Vec<u8>,
        fd: Option<OwnedFd>,
    ) -> Option<Result<Vec<u8>, RpcError>> {
        let (reply, answer) = oneshot::channel();
        let request = Request {
            procedure,
            payload,
            fd,
            reply,
        };
        self.requests.send(request).await.ok()?;
        answer.await.ok()
    }

    async fn command(&self, command: Command) -> Result<Value, CommandError> {
        let Command { name, arguments, fd } = command;
        let line = json!({ "execute": name, "arguments": arguments }).to_string();
        let mut payload = self.guest.clone();
        // No flags: the command is JSON.
        payload.extend(Encoder::default().text(&line).u32(0).bytes());
        let procedure = match fd {
            Some(_) => rpc::MONITOR_COMMAND_WITH_FILES,
            None => rpc::MONITOR_COMMAND,
        };
        match self.call_procedure(procedure, payload, fd).await {
            Some(Ok(result)) => result_of(&name, &result),
            Some(Err(cause)) => Err(CommandError::Manager {
                command: name,
                cause: cause.to_string(),
            }),
            None => Err(CommandError::Disconnected {
                command: name,
                cause: self.reason(),
            }),
        }
    }
}

impl Transport for LibvirtMonitor {
    fn call(&self, command: Command) -> Answer<'_> {
        Box::pin(self.command(command))
    }

    fn events(&self) -> broadcast::Receiver<Event> {
        broadcast::channel(1).1
    }

    fn peer_pid(&self) -> Option<i32> {
        Some(self.pid)
    }

    fn close(&mut self) -> Pin<Box<dyn Future<Output = ()> + Send + '_>> {
        self.task.abort();
        Box::pin(async {
            // The socket is closed when the task has ended.
            let _ = (&mut self.task).await;
        })
    }
}

impl Drop for LibvirtMonitor {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// The calls that wait for their replies, by number.
type Waiting = HashMap<u32, oneshot::Sender<Result<Vec<u8>, RpcError>>>;

/// Sends calls and distributes replies until the monitor is dropped or the connection ends. Then every waiting call fails, with the reason in `ended`.
async fn run(stream: UnixStream, mut queue: mpsc::Receiver<Request>, ended: &OnceLock<String>) {
    let mut waiting = Waiting::new();
    if let Err(reason) = serve(stream, &mut queue, &mut waiting).await {
        let _ = ended.set(reason);
    }
}

async fn serve(
    mut stream: UnixStream,
    queue: &mut mpsc::Receiver<Request>,
    waiting: &mut Waiting,
) -> Result<(), String> {
    let mut received = Vec::new();
    let mut serial = 0_u32;
    loop {
        while let Some(packet) = rpc::take_packet(&mut received).map_err(|error| error.to_string())? {
            let reply = rpc::reply(&packet).map_err(|error| error.to_string())?;
            // A reply whose caller gave up has a closed channel, and is dropped.
            if let Some((reply, caller)) = reply.and_then(|reply| Some((reply.result, waiting.remove(&reply.serial)?)))
            {
                drop(caller.send(reply));
            }
        }
        received.reserve(READ_BYTES);
        tokio::select! {
            request = queue.recv() => {
                let Some(Request { procedure, payload, fd, reply }) = request else { return Ok(()) };
                serial = serial.wrapping_add(1);
                waiting.retain(|_, caller| !caller.is_closed());
                waiting.insert(serial, reply);
                send(&stream, procedure, serial, &payload, fd).await.map_err(|error| error.to_string())?;
            }
            read = stream.read_buf(&mut received) => {
                if read.map_err(|error| error.to_string())? == 0 {
                    return Err("libvirt closed the connection".to_owned());
                }
            }
        }
    }
}

/// Sends a call. A descriptor follows its packet, with one byte (`virNetSocketSendFD`).
async fn send(
    stream: &UnixStream,
    procedure: Procedure,
    serial: u32,
    payload: &[u8],
    fd: Option<OwnedFd>,
) -> io::Result<()> {
    let packet = rpc::call(procedure, serial, usize::from(fd.is_some()), payload);
    send_line(stream, &packet, None).await?;
    match fd {
        Some(fd) => send_line(stream, &[0], Some(fd)).await,
        None => Ok(()),
    }
}

/// Whether libvirt lets this user in without asking for a name: `remote_auth_list_ret`.
fn allows_anybody(payload: &[u8]) -> Option<bool> {
    let mut decoder = Decoder::new(payload);
    let count = decoder.u32()?;
    // `REMOTE_AUTH_TYPE_LIST_MAX` is 20.
    let kinds = (0..count.min(20)).map(|_| decoder.u32()).collect::<Option<Vec<_>>>()?;
    Some(kinds.is_empty() || kinds.contains(&rpc::AUTH_NONE))
}

/// Whether the guest of `remote_nonnull_domain` runs: one that does not has the id -1. `None` where it is another guest.
fn is_running(payload: &[u8], uuid: &[u8; 16]) -> Option<bool> {
    let mut decoder = Decoder::new(payload);
    let _name = decoder.text()?;
    let found = decoder.fixed(uuid.len())?;
    let id = decoder.u32()?;
    (found == uuid && decoder.rest().is_empty()).then_some(id != u32::MAX)
}

/// The value that QEMU returned, in what libvirt gives back: a text, QEMU's own message.
fn result_of(command: &str, payload: &[u8]) -> Result<Value, CommandError> {
    let unlike = |found: &[u8]| CommandError::Reply {
        command: command.to_owned(),
        cause: "neither a value nor an error".to_owned(),
        found: wire::excerpt(found),
    };
    let text = Decoder::new(payload).text().ok_or_else(|| unlike(payload))?;
    let Ok(Value::Object(mut message)) = serde_json::from_str(text) else {
        return Err(unlike(text.as_bytes()));
    };
    // libvirt counts its commands in texts.
    message.insert("id".to_owned(), json!(0));
    match wire::parse_message(json!(message).to_string().as_bytes()) {
        Some(Message::Reply { result: Ok(value), .. }) => Ok(value),
        Some(Message::Reply {
            result: Err(Refusal { class, description }),
            ..
        }) => Err(CommandError::Refused {
            command: command.to_owned(),
            class,
            description,
        }),
        _ => Err(unlike(text.as_bytes())),
    }
}

/// Reads all packets in `bytes`, up to the first that is none, each reply as what a guest's lookup and a command give; counts the packets.
pub(crate) fn read_all(bytes: &[u8]) -> usize {
    let (mut received, mut count) = (bytes.to_vec(), 0);
    while let Ok(Some(packet)) = rpc::take_packet(&mut received) {
        count += 1;
        if let Ok(Some(rpc::Reply {
            result: Ok(payload), ..
        })) = rpc::reply(&packet)
        {
            let _ = (
                allows_anybody(&payload),
                is_running(&payload, &[0; 16]),
                result_of("x", &payload),
            );
        }
    }
    count
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(text: &str) -> Vec<u8> {
        Encoder::default().text(text).bytes()
    }

    #[test]
    fn what_qemu_returned_is_read_out_of_libvirts_text() {
        let value = result_of("query-status", &text(r#"{"return":{"running":true},"id":"libvirt-7"}"#));
        assert_eq!(value, Ok(json!({"running": true})));
        let refused = r#"{"id":"libvirt-8","error":{"class":"CommandNotFound","desc":"no such command"}}"#;
        let refused = result_of("x", &text(refused)).unwrap_err();
        assert_eq!(
            refused.to_string(),
            "QEMU refused `x`: no such command (CommandNotFound)"
        );
        for other in ["", "[]", r#"{"id":"libvirt-9"}"#] {
            assert!(
                matches!(result_of("x", &text(other)), Err(CommandError::Reply { .. })),
                "{other}"
            );
        }
        assert!(result_of("x", b"\0\0\0\x09{}").is_err());
    }

    #[test]
    fn only_the_running_guest_that_was_meant_is_taken() {
        let guest = |uuid, id| Encoder::default().text("vm42").fixed(&[uuid; 16]).u32(id).bytes();
        assert_eq!(is_running(&guest(7, 3), &[7; 16]), Some(true));
        assert_eq!(is_running(&guest(7, u32::MAX), &[7; 16]), Some(false));
        assert_eq!(is_running(&guest(8, 3), &[7; 16]), None);
        assert_eq!(is_running(&text("vm42"), &[7; 16]), None);
    }

    #[test]
    fn a_daemon_that_asks_for_a_name_lets_nobody_in() {
        let list = |kinds: &[u32]| {
            kinds
                .iter()
                .fold(Encoder::default().u32(kinds.len() as u32), |to, kind| to.u32(*kind))
                .bytes()
        };
        assert_eq!(allows_anybody(&list(&[0])), Some(true));
        assert_eq!(allows_anybody(&list(&[])), Some(true));
        assert_eq!(allows_anybody(&list(&[2])), Some(false));
        assert_eq!(allows_anybody(&list(&[2])[..4]), None);
    }
}
