//! Private parsers of QEMU's bytes, for the fuzz targets alone.

use crate::client::{read_all, read_libvirt};
use crate::gdb::{Layout, Receiver, from_hex, includes};
use guest_core::Registers;

/// Parses the bytes of a QMP socket up to the first that are no message, and counts the messages.
pub fn messages(bytes: &[u8]) -> usize {
    read_all(bytes)
}

/// Parses the bytes of libvirt's socket up to the first that are no packet, and counts the packets.
pub fn libvirt_packets(bytes: &[u8]) -> usize {
    read_libvirt(bytes)
}

/// Splits bytes from the GDB stub, which arrive in fragments of that length, into packets, and decodes each as hexadecimal.
pub fn packets(bytes: &[u8], piece_len: usize) -> Vec<Option<Vec<u8>>> {
    let (mut receiver, mut found) = (Receiver::default(), Vec::new());
    for piece in bytes.chunks(piece_len.max(1)) {
        receiver.push(piece);
        loop {
            match receiver.next() {
                Ok(Some(body)) => found.push(from_hex(&body)),
                Ok(None) => break,
                Err(_) => return found,
            }
        }
    }
    found
}

/// Parses the GDB stub's description of its registers, and the registers of a reply.
pub fn registers(target: &str, features: &[String], reply: &[u8]) -> Option<Registers> {
    let _ = includes(target);
    Layout::parse(features).ok()?.decode(reply).ok()
}
