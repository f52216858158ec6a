//! A client of QEMU's GDB stub, as far as a pause needs it: registers, and physical memory.
//!
//! The stub is used, although QMP can stop a guest too, because it alone writes guest memory so that code which TCG has
//! translated already changes, and because one write to its socket stops the guest *and* asks for all registers.
//! Protocol: the GDB manual, "GDB Remote Serial Protocol"; QEMU's `gdbstub/` (10.0) and `gdbstub.c` (7.2).
//!
//! What QEMU does that the protocol does not say:
//! - a client that connects stops the guest;
//! - any byte that comes while the guest runs stops it, and is swallowed: send nothing after a resume, not even `+`;
//! - `D` (detach) resumes it, and answers when it runs; `c` has no answer;
//! - up to 7.2 a stop reply (`T02…`) comes whenever the guest stops, later only where one is due;
//! - there is no `QStartNoAckMode`, but a `$` acknowledges the reply before it, so packets can be sent in a row;
//! - a physical write outside RAM is answered `OK`, or goes to a device: check the address beforehand.

mod connection;
mod error;
mod exchange;
mod layout;
mod packet;

pub use connection::Connection;
pub use error::StubError;
pub(crate) use layout::includes;
pub use layout::{Layout, LayoutError};
pub(crate) use packet::{Receiver, from_hex};
