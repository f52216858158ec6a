//! How a VM is reached, in a form that another process can be given.

use super::kvm::KvmGuest;
use super::monitorless::Monitorless;
use super::qemu::Qemu;
use super::{Accelerator, Hypervisor, Meaning, ReachError};
use crate::domains::Uuid;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::ffi::OsString;
use std::fmt;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How a VM is reached. Each kind leads to one implementation of [`Hypervisor`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Route {
    /// QEMU, by a QMP socket.
    Qmp {
        /// The socket.
        #[serde(serialize_with = "write_path", deserialize_with = "read_path")]
        socket: PathBuf,
        /// How its vCPUs are paused.
        #[serde(default, skip_serializing_if = "PauseMethod::is_auto")]
        pause: PauseMethod,
        /// How long QEMU may take for each answer, if not as long as by default.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        reply_timeout: Option<Duration>,
    },
    /// QEMU, by the monitor that libvirt holds.
    Libvirt {
        /// The guest's UUID.
        uuid: Uuid,
        /// Its QEMU.
        pid: i32,
        /// How its vCPUs are paused.
        #[serde(default, skip_serializing_if = "PauseMethod::is_auto")]
        pause: PauseMethod,
        /// How long QEMU may take for each answer, if not as long as by default.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        reply_timeout: Option<Duration>,
    },
    /// Any program that runs it under KVM, without asking that program.
    Process {
        /// The process.
        pid: i32,
        /// When it started, in clock ticks since the host's boot.
        start_time: u64,
        /// How its vCPUs are paused: by their threads.
        #[serde(default, skip_serializing_if = "PauseMethod::is_auto")]
        pause: PauseMethod,
    },
}

/// How the vCPUs of a QEMU are paused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PauseMethod {
    /// By their threads where KVM runs the guest and they are understood; else through QEMU.
    #[default]
    Auto,
    /// By their threads alone. Under KVM.
    Ptrace,
    /// Through QEMU: its GDB stub, which a QMP command opens.
    Qmp,
}

impl PauseMethod {
    fn is_auto(&self) -> bool {
        *self == Self::Auto
    }
}

/// A guest whose vCPUs have no threads to pause it by.
#[derive(Debug, thiserror::Error)]
#[error(
    "--pause ptrace is for guests under KVM; QEMU translates this one's code (TCG), and would not notice what is written beside it"
)]
struct Translated;

/// A text that is no [`Route`].
#[derive(Debug, thiserror::Error)]
#[error("{text:?} does not say how to reach a guest")]
pub struct RouteError {
    text: String,
    source: serde_json::Error,
}

impl Route {
    /// To a QEMU by its QMP socket. The guest is paused by what fits.
    pub fn qmp(socket: PathBuf) -> Self {
        Self::Qmp {
            socket,
            pause: PauseMethod::Auto,
            reply_timeout: None,
        }
    }

    /// To a QEMU of libvirt's, by libvirt. The guest is paused by what fits.
    pub fn libvirt(uuid: Uuid, pid: i32) -> Self {
        Self::Libvirt {
            uuid,
            pid,
            pause: PauseMethod::Auto,
            reply_timeout: None,
        }
    }

    /// To a guest by the process that runs it alone. It is paused by its vCPUs' threads.
    pub fn process(pid: i32, start_time: u64) -> Self {
        let pause = PauseMethod::Auto;
        Self::Process { pid, start_time, pause }
    }

    /// To the same guest, which is paused by that method.
    #[must_use]
    pub fn paused_by(mut self, method: PauseMethod) -> Self {
        match &mut self {
            Self::Qmp { pause, .. } | Self::Libvirt { pause, .. } | Self::Process { pause, .. } => *pause = method,
        }
        self
    }

    /// To the same guest, whose QEMU may take that long for each answer. Nothing is asked on the way to a process alone.
    #[must_use]
    pub fn answered_within(mut self, within: Duration) -> Self {
        match &mut self {
            Self::Qmp { reply_timeout, .. } | Self::Libvirt { reply_timeout, .. } => *reply_timeout = Some(within),
            Self::Process { .. } => {}
        }
        self
    }

    /// How long QEMU may take for each answer, if not as long as by default.
    pub(super) fn reply_timeout(&self) -> Option<Duration> {
        match self {
            Self::Qmp { reply_timeout, .. } | Self::Libvirt { reply_timeout, .. } => *reply_timeout,
            Self::Process { .. } => None,
        }
    }

    /// Reaches the VM. The guest is not paused.
    ///
    /// # Errors
    ///
    /// It can't be reached.
    pub fn open(&self) -> Result<Box<dyn Hypervisor>, ReachError> {
        let pause = match self {
            Self::Process { pid, start_time, pause } => {
                return Ok(Box::new(Monitorless::open(self, *pid, *start_time, *pause)?));
            }
            Self::Qmp { pause, .. } | Self::Libvirt { pause, .. } => pause,
        };
        let qemu = Qemu::open(self)?;
        match (qemu.identity().accelerator, pause) {
            (Accelerator::Tcg, PauseMethod::Ptrace) => Err(ReachError::new(Meaning::Permanent, Translated)),
            (Accelerator::Kvm, PauseMethod::Auto | PauseMethod::Ptrace) => Ok(Box::new(KvmGuest::new(qemu, *pause))),
            (Accelerator::Tcg, PauseMethod::Auto | PauseMethod::Qmp) | (Accelerator::Kvm, PauseMethod::Qmp) => {
                Ok(Box::new(qemu))
            }
        }
    }

    /// The QMP socket that only one client can have at a time, where it leads through one.
    pub fn qmp_socket(&self) -> Option<&Path> {
        match self {
            Self::Qmp { socket, .. } => Some(socket),
            Self::Libvirt { .. } | Self::Process { .. } => None,
        }
    }

    /// As one argument of a program.
    pub fn to_argument(&self) -> String {
        // Text and bytes alone, which always fit.
        serde_json::to_string(self).unwrap_or_default()
    }

    /// From what [`Route::to_argument`] gave.
    ///
    /// # Errors
    ///
    /// It is something else.
    pub fn from_argument(text: &str) -> Result<Self, RouteError> {
        serde_json::from_str(text).map_err(|source| RouteError {
            text: text.to_owned(),
            source,
        })
    }
}

/// For a person.
impl fmt::Display for Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Qmp { socket, .. } => socket.display().fmt(f),
            Self::Libvirt { uuid, .. } => write!(f, "libvirt, {uuid}"),
            Self::Process { pid, .. } => write!(f, "process {pid}"),
        }
    }
}

/// A path in JSON. File names on Linux are bytes, and JSON has text only.
#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum PathText {
    Text(String),
    Bytes(Vec<u8>),
}

fn write_path<S: Serializer>(path: &Path, serializer: S) -> Result<S::Ok, S::Error> {
    let text = match path.to_str() {
        Some(text) => PathText::Text(text.to_owned()),
        None => PathText::Bytes(path.as_os_str().as_bytes().to_vec()),
    };
    text.serialize(serializer)
}

fn read_path<'de, D: Deserializer<'de>>(deserializer: D) -> Result<PathBuf, D::Error> {
    Ok(match PathText::deserialize(deserializer)? {
        PathText::Text(text) => PathBuf::from(text),
        PathText::Bytes(bytes) => PathBuf::from(OsString::from_vec(bytes)),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_route_survives_as_an_argument_whatever_bytes_its_path_has() {
        for (bytes, argument) in [
            (&b"/run/a b\".sock"[..], r#"{"qmp":{"socket":"/run/a b\".sock"}}"#),
            (b"/\xff", r#"{"qmp":{"socket":[47,255]}}"#),
        ] {
            let socket = PathBuf::from(OsString::from_vec(bytes.to_vec()));
            let route = Route::qmp(socket);
            assert_eq!(route.to_argument(), argument);
            assert_eq!(Route::from_argument(argument).unwrap(), route);
        }
        let route = Route::qmp("/q".into()).paused_by(PauseMethod::Ptrace);
        assert_eq!(route.to_argument(), r#"{"qmp":{"socket":"/q","pause":"ptrace"}}"#);
        assert_eq!(Route::from_argument(&route.to_argument()).unwrap(), route);
        let slow = Route::qmp("/q".into()).answered_within(Duration::from_secs(60));
        assert_eq!(Route::from_argument(&slow.to_argument()).unwrap(), slow);
        assert_ne!(slow, Route::qmp("/q".into()));
        let route = Route::libvirt(Uuid([0x5a; 16]), 42);
        let argument = r#"{"libvirt":{"uuid":"5a5a5a5a-5a5a-5a5a-5a5a-5a5a5a5a5a5a","pid":42}}"#;
        assert_eq!(route.to_argument(), argument);
        assert_eq!(Route::from_argument(argument).unwrap(), route);
        let route = Route::process(42, 7);
        assert_eq!(route.to_argument(), r#"{"process":{"pid":42,"start_time":7}}"#);
        assert_eq!(Route::from_argument(&route.to_argument()).unwrap(), route);
        assert_eq!(route.clone().answered_within(Duration::from_secs(60)), route);
        for text in ["", "/run/a.sock", r#"{"ssh":{}}"#, r#"{"qmp":{"socket":1}}"#] {
            assert!(Route::from_argument(text).is_err(), "{text}");
        }
    }
}
