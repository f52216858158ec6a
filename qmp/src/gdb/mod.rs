//! A client of QEMU's GDB stub for pauses: registers and guest-physical memory.
//!
//! QMP can also stop a guest. But only writes through the stub change code that TCG has already translated, and one write to the stub's socket
//! stops the guest *and* requests all registers.
//! Protocol: the GDB manual, "GDB Remote Serial Protocol"; QEMU's `gdbstub/` (10.0) and `gdbstub.c` (7.2).
//!
//! Behaviour of QEMU that the protocol does not specify:
//! - a client that connects stops the guest;
//! - any byte that comes while the guest runs stops it, and is discarded: send nothing after a resume, not even `+`;
//! - `D` (detach) resumes the guest, and replies when it runs; `c` has no reply;
//! - up to 7.2 a stop reply (`T02…`) comes whenever the guest stops, later only when one is due;
//! - there is no `QStartNoAckMode`, but a `$` acknowledges the reply before it, so packets can be sent in a row;
//! - a physical write outside RAM is answered `OK`, or goes to a device: check the address beforehand.

mod connection;
mod error;
mod exchange;
mod layout;
mod packet;

pub use connection::{Connection, Stopped};
pub use error::StubError;
pub(crate) use layout::includes;
pub use layout::{Layout, LayoutError};
pub(crate) use packet::{Receiver, from_hex};
