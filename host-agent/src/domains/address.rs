//! Where a QMP monitor can be reached, as QEMU was told.

use super::params::Params;
use std::ffi::OsStr;
use std::fmt;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

/// Where a QMP monitor is, as the command line says; a path is still the one that the process itself would use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum QmpAddress {
    /// QEMU listens at a path.
    Unix(PathBuf),
    /// QEMU listens at a name in Linux's abstract namespace.
    Abstract {
        /// The name, without the zero byte before it.
        name: Vec<u8>,
        /// Whether the name ends with its last byte (`tight=on`, the default), or is filled up with zero bytes.
        tight: bool,
    },
    /// QEMU listens at a TCP port: `host:port`. vmpatch needs QEMU's process, so it speaks only to Unix sockets.
    Tcp(String),
    /// A descriptor that QEMU inherited from its starter, by number or by name.
    Descriptor(String),
    /// QEMU connects to it, rather than let others connect to QEMU.
    Outgoing(String),
    /// Something that is no plain socket: `stdio`, `pty`, a telnet or TLS server, …
    Other(String),
}

impl QmpAddress {
    /// What a `-chardev` with these parameters is. QEMU's `chardev/char-socket.c` (10.0).
    pub(super) fn of_chardev(params: &Params) -> Self {
        let backend = params.text("backend").unwrap_or_default();
        if backend != "socket" {
            return Self::Other(backend);
        }
        let (path, host, port) = (params.get("path"), params.text("host"), params.text("port"));
        let tcp = host.map(|host| format!("{host}:{}", port.unwrap_or_default()));
        let wrapped = ["telnet", "tn3270", "websocket"]
            .into_iter()
            .find(|key| params.is_on(key, false));
        let wrapped = wrapped.or_else(|| params.get("tls-creds").map(|_| "TLS"));
        if let Some(protocol) = wrapped {
            let at = tcp.or_else(|| params.text("path")).unwrap_or_default();
            return Self::Other(format!("{protocol}:{at}"));
        }
        match (path, tcp) {
            (Some(path), _) if !params.is_on("server", false) => {
                Self::Outgoing(format!("unix:{}", String::from_utf8_lossy(path)))
            }
            (Some(name), _) if params.is_on("abstract", false) => Self::Abstract {
                name: name.to_vec(),
                tight: params.is_on("tight", true),
            },
            (Some(path), _) => Self::Unix(PathBuf::from(OsStr::from_bytes(path))),
            (None, Some(at)) if params.is_on("server", false) => Self::Tcp(at),
            (None, Some(at)) => Self::Outgoing(format!("tcp:{at}")),
            (None, None) => Self::Descriptor(params.text("fd").unwrap_or_default()),
        }
    }
}

/// The parameters of the chardev that an old-style device string means, as in `-qmp unix:PATH,server=on`.
/// QEMU's `chardev/char.c` (10.0).
pub(super) fn chardev_of_device(text: &[u8]) -> Params {
    let text = text.strip_prefix(b"mon:").unwrap_or(text);
    let colon = text.iter().position(|&byte| byte == b':').unwrap_or(text.len());
    let (scheme, after) = text.split_at(colon);
    let after = after.strip_prefix(b":").unwrap_or(after);
    let mut params = match scheme {
        b"unix" => Params::parse(after, Some("path")),
        b"tcp" | b"telnet" | b"tn3270" | b"websocket" => {
            let end = after.iter().position(|&byte| byte == b',').unwrap_or(after.len());
            let (at, options) = after.split_at(end);
            let mut params = Params::parse(options.strip_prefix(b",").unwrap_or(options), None);
            let colon = at.iter().rposition(|&byte| byte == b':').unwrap_or(at.len());
            let (host, port) = at.split_at(colon);
            params.set(b"host", host);
            params.set(b"port", port.strip_prefix(b":").unwrap_or(port));
            params.set(scheme, b"on");
            params
        }
        _ => {
            let mut params = Params::default();
            params.set(b"backend", text);
            return params;
        }
    };
    params.set(b"backend", b"socket");
    params
}

impl fmt::Display for QmpAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Abstract { name, .. } => write!(f, "abstract:{}", String::from_utf8_lossy(name)),
            Self::Tcp(at) => write!(f, "tcp:{at}"),
            Self::Descriptor(fd) => write!(f, "descriptor {fd}"),
            Self::Outgoing(to) => write!(f, "{to}, where QEMU is the client"),
            Self::Other(what) => write!(f, "{what}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Params, QmpAddress, chardev_of_device};
    use std::path::PathBuf;

    fn device(text: &str) -> QmpAddress {
        QmpAddress::of_chardev(&chardev_of_device(text.as_bytes()))
    }

    fn chardev(text: &str) -> QmpAddress {
        QmpAddress::of_chardev(&Params::parse(text.as_bytes(), Some("backend")))
    }

    fn unix(path: &str) -> QmpAddress {
        QmpAddress::Unix(PathBuf::from(path))
    }

    #[test]
    fn a_listening_unix_socket_is_read_in_every_spelling() {
        for text in [
            "unix:/run/q.sock,server=on,wait=off",
            "unix:/run/q.sock,server,nowait",
            "unix:/run/q.sock,wait=off,server=yes,reconnect=0",
            "unix:path=/run/q.sock,server",
        ] {
            assert_eq!(device(text), unix("/run/q.sock"), "{text}");
        }
        for text in [
            "socket,id=m,path=/run/q.sock,server=on,wait=off",
            "socket,path=/run/q.sock,server,nowait,id=m",
            "server=on,path=/run/q.sock,id=m,backend=socket",
        ] {
            assert_eq!(chardev(text), unix("/run/q.sock"), "{text}");
        }
        assert_eq!(device("unix:a,,b.sock,server"), unix("a,b.sock"));
    }

    #[test]
    fn an_abstract_name_knows_its_length() {
        let name = b"vm42".to_vec();
        let padded = QmpAddress::Abstract {
            name: name.clone(),
            tight: false,
        };
        assert_eq!(device("unix:vm42,abstract=on,tight=off,server=on,wait=off"), padded);
        let tight = QmpAddress::Abstract { name, tight: true };
        assert_eq!(chardev("socket,id=m,path=vm42,abstract=on,server=on"), tight);
    }

    #[test]
    fn what_vmpatch_cannot_connect_to_is_told_apart() {
        assert_eq!(
            device("tcp:127.0.0.1:4444,server,nowait"),
            QmpAddress::Tcp("127.0.0.1:4444".into())
        );
        assert_eq!(device("tcp:[::1]:4444,server=on"), QmpAddress::Tcp("[::1]:4444".into()));
        assert_eq!(device("tcp::4444,server=on"), QmpAddress::Tcp(":4444".into()));
        assert_eq!(
            chardev("socket,id=m,host=h,port=1,server=on"),
            QmpAddress::Tcp("h:1".into())
        );
        assert_eq!(
            chardev("socket,id=charmonitor,fd=24,server=on"),
            QmpAddress::Descriptor("24".into())
        );
        assert_eq!(
            device("unix:/run/mgr.sock"),
            QmpAddress::Outgoing("unix:/run/mgr.sock".into())
        );
        assert_eq!(device("tcp:h:1"), QmpAddress::Outgoing("tcp:h:1".into()));
        assert_eq!(device("stdio"), QmpAddress::Other("stdio".into()));
        assert_eq!(device("telnet:h:1,server=on"), QmpAddress::Other("telnet:h:1".into()));
        let tls = "socket,id=m,path=/q,server=on,tls-creds=t0";
        assert_eq!(chardev(tls), QmpAddress::Other("TLS:/q".into()));
        assert_eq!(chardev("pipe,id=m,path=/q"), QmpAddress::Other("pipe".into()));
    }
}
