//! Packets of libvirt's RPC.
//!
//! Format: libvirt's `src/rpc/virnetprotocol.x`, `src/remote/remote_protocol.x` and `src/remote/qemu_protocol.x`. libvirt calls it internal, and
//! has kept each number since it was given; those here were checked on the wire with 9.0.0.

use super::xdr::{Decoder, Encoder};
use std::fmt;

/// A procedure that can be called.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Procedure {
    program: u32,
    number: u32,
}

const REMOTE_PROGRAM: u32 = 0x2000_8086;
const QEMU_PROGRAM: u32 = 0x2000_8087;
/// Version of both programs.
const PROGRAM_VERSION: u32 = 1;

const fn remote(number: u32) -> Procedure {
    Procedure {
        program: REMOTE_PROGRAM,
        number,
    }
}

const fn qemu(number: u32) -> Procedure {
    Procedure {
        program: QEMU_PROGRAM,
        number,
    }
}

/// REMOTE_PROC_CONNECT_OPEN.
pub const CONNECT_OPEN: Procedure = remote(1);
/// REMOTE_PROC_DOMAIN_LOOKUP_BY_UUID.
pub const DOMAIN_LOOKUP_BY_UUID: Procedure = remote(24);
/// REMOTE_PROC_AUTH_LIST.
pub const AUTH_LIST: Procedure = remote(66);
/// QEMU_PROC_DOMAIN_MONITOR_COMMAND.
pub const MONITOR_COMMAND: Procedure = qemu(1);
/// QEMU_PROC_DOMAIN_MONITOR_COMMAND_WITH_FILES, since libvirt 8.2.
pub const MONITOR_COMMAND_WITH_FILES: Procedure = qemu(7);

/// REMOTE_AUTH_NONE.
pub const AUTH_NONE: u32 = 0;

/// Types of packets (`virNetMessageType`).
const CALL: u32 = 0;
const REPLY: u32 = 1;
const CALL_WITH_FDS: u32 = 4;
const REPLY_WITH_FDS: u32 = 5;

/// Statuses (`virNetMessageStatus`).
const OK: u32 = 0;
const ERROR: u32 = 1;

/// Bytes of a header, with the length before it.
const HEADER_LEN: usize = 28;
/// Longest packet that is accepted, in bytes. libvirt's own limit is 32 MiB; the longest replies that QEMU gives have a few.
const PACKET_LEN_MAX: usize = 16 << 20;

/// A reply that breaks the format.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("libvirt's RPC sent {0}")]
pub struct FormatError(pub &'static str);

/// libvirt's answer that something cannot be done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RpcError {
    /// Its code (`virErrorNumber`).
    pub code: u32,
    /// What it says.
    pub message: String,
}

impl fmt::Display for RpcError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (libvirt error {})", self.message, self.code)
    }
}

/// The answer to a call.
#[derive(Debug, PartialEq, Eq)]
pub struct Reply {
    /// The number of the call.
    pub serial: u32,
    /// What the procedure gives, in XDR.
    pub result: Result<Vec<u8>, RpcError>,
}

/// A call. With `fds`, so many descriptors must follow the packet, each with one byte.
pub fn call(procedure: Procedure, serial: u32, fds: usize, payload: &[u8]) -> Vec<u8> {
    let header = Encoder::default()
        .u32(procedure.program)
        .u32(PROGRAM_VERSION)
        .u32(procedure.number)
        .u32(if fds > 0 { CALL_WITH_FDS } else { CALL })
        .u32(serial)
        .u32(OK);
    let header = match u32::try_from(fds) {
        Ok(fds) if fds > 0 => header.u32(fds),
        _ => header,
    };
    let mut body = header.bytes();
    body.extend(payload);
    let len = u32::try_from(body.len() + 4).unwrap_or(u32::MAX);
    [&len.to_be_bytes()[..], &body].concat()
}

/// Takes the first packet out of `received`. `None`: it is not complete yet.
///
/// # Errors
///
/// It is no packet, or longer than [`PACKET_LEN_MAX`].
pub fn take_packet(received: &mut Vec<u8>) -> Result<Option<Vec<u8>>, FormatError> {
    let Some(len) = Decoder::new(received).u32() else {
        return Ok(None);
    };
    let len = usize::try_from(len).unwrap_or(usize::MAX);
    if !(HEADER_LEN..=PACKET_LEN_MAX).contains(&len) {
        return Err(FormatError("a packet of a length that it cannot have"));
    }
    if received.len() < len {
        return Ok(None);
    }
    let rest = received.split_off(len);
    Ok(Some(std::mem::replace(received, rest)))
}

/// Reads a packet. `None` for one that answers no call: an event, or a part of a stream.
///
/// # Errors
///
/// It has another form than a reply has.
pub fn reply(packet: &[u8]) -> Result<Option<Reply>, FormatError> {
    const SHORT: FormatError = FormatError("a packet that is too short");
    let mut decoder = Decoder::new(packet);
    let mut word = || decoder.u32().ok_or(SHORT);
    let [_len, program, _version, _procedure, kind, serial, status] =
        [word()?, word()?, word()?, word()?, word()?, word()?, word()?];
    if ![REMOTE_PROGRAM, QEMU_PROGRAM].contains(&program) || ![REPLY, REPLY_WITH_FDS].contains(&kind) {
        return Ok(None);
    }
    if kind == REPLY_WITH_FDS && word()? > 0 {
        return Err(FormatError("descriptors that nobody asked for"));
    }
    let result = match status {
        OK => Ok(decoder.rest().to_vec()),
        ERROR => Err(error(decoder).ok_or(FormatError("an error of another form"))?),
        _ => return Err(FormatError("a reply that is not complete")),
    };
    Ok(Some(Reply { serial, result }))
}

/// `remote_error`: code, domain, message; more follows.
fn error(mut decoder: Decoder<'_>) -> Option<RpcError> {
    let (code, _domain) = (decoder.u32()?, decoder.u32()?);
    let message = decoder.optional_text()?.unwrap_or("it gives no reason").to_owned();
    Some(RpcError { code, message })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn packet(words: &[u32], rest: &[u8]) -> Vec<u8> {
        let body: Vec<u8> = words
            .iter()
            .flat_map(|word| word.to_be_bytes())
            .chain(rest.iter().copied())
            .collect();
        let len = u32::try_from(body.len() + 4).unwrap();
        [&len.to_be_bytes()[..], &body].concat()
    }

    #[test]
    fn a_call_has_its_length_its_header_and_the_number_of_descriptors() {
        let sent = call(AUTH_LIST, 3, 0, &[]);
        assert_eq!(sent, packet(&[0x2000_8086, 1, 66, 0, 3, 0], &[]));
        let sent = call(MONITOR_COMMAND_WITH_FILES, 4, 1, b"abcd");
        assert_eq!(sent, packet(&[0x2000_8087, 1, 7, 4, 4, 0, 1], b"abcd"));
    }

    #[test]
    fn packets_are_taken_one_by_one_once_they_are_complete() {
        let whole = call(AUTH_LIST, 1, 0, b"1234");
        let mut received = [&whole[..], &whole[..10]].concat();
        assert_eq!(take_packet(&mut received).unwrap().as_ref(), Some(&whole));
        assert_eq!(take_packet(&mut received), Ok(None));
        received.extend(&whole[10..]);
        assert_eq!(take_packet(&mut received).unwrap(), Some(whole));
        assert_eq!(take_packet(&mut received), Ok(None));
        for len in [0_u32, 27, 17 << 20, u32::MAX] {
            assert!(take_packet(&mut len.to_be_bytes().to_vec()).is_err(), "{len}");
        }
    }

    #[test]
    fn a_reply_is_read_with_its_result_or_its_error() {
        let found = reply(&packet(&[0x2000_8086, 1, 66, 1, 9, 0], &[0, 0, 0, 0])).unwrap();
        assert_eq!(
            found,
            Some(Reply {
                serial: 9,
                result: Ok(vec![0; 4])
            })
        );
        let text = Encoder::default().u32(42).u32(10).u32(1).text("no domain").bytes();
        let found = reply(&packet(&[0x2000_8086, 1, 24, 1, 9, 1], &text)).unwrap().unwrap();
        assert_eq!(found.result.unwrap_err().to_string(), "no domain (libvirt error 42)");
        let found = reply(&packet(&[0x2000_8087, 1, 7, 5, 9, 0, 0], b"abcd"))
            .unwrap()
            .unwrap();
        assert_eq!(found.result, Ok(b"abcd".to_vec()));
    }

    #[test]
    fn events_are_passed_over_and_broken_replies_are_errors() {
        assert_eq!(reply(&packet(&[0x2000_8086, 1, 107, 2, 0, 0], &[])), Ok(None));
        assert_eq!(reply(&packet(&[0x6b65_6570, 1, 1, 2, 0, 0], &[])), Ok(None));
        assert!(reply(&packet(&[0x2000_8086, 1], &[])).is_err());
        assert!(reply(&packet(&[0x2000_8086, 1, 24, 1, 9, 1], &[0; 4])).is_err());
        assert!(reply(&packet(&[0x2000_8086, 1, 24, 1, 9, 2], &[])).is_err());
        assert!(reply(&packet(&[0x2000_8087, 1, 7, 5, 9, 0, 1], &[])).is_err());
    }
}
