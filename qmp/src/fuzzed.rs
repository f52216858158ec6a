//! Readers of QEMU's bytes that only this crate uses, as its fuzz targets call them. Nobody else needs them.

use crate::client::read_all;
use crate::cpu::CpuState;
use crate::gdb::{Layout, Receiver, from_hex, includes};

/// Reads bytes from a QMP socket as far as they are messages, and counts those.
pub fn messages(bytes: &[u8]) -> usize {
    read_all(bytes)
}

/// Cuts bytes from the GDB stub, which come in pieces of that length, into packets, and reads each as hexadecimal.
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

/// Reads the GDB stub's description of its registers, and the registers that a reply has.
pub fn registers(target: &str, features: &[String], reply: &[u8]) -> Option<CpuState> {
    let _ = includes(target);
    Layout::parse(features).ok()?.decode(reply).ok()
}
