//! What the fuzz targets do, as plain functions: the fuzzer calls them, and so does the ordinary test
//! `tests/fuzz_replay.rs`, with every input under `corpus/`.
//!
//! Each takes any bytes, and must come back: with an error or without, never with a panic. What is understood must make sense.
//!
//!     cargo fuzz run --sanitizer none ramblock        # in qmp/; works with a stable compiler
//!
//! An input that was found worth keeping goes into `corpus/<target>/`, small.

use qmp::cpu::info_registers as cpu;
use qmp::fuzzed;
use qmp::memory::{devices, gpa2hva, mtree, ramblock as blocks};

/// The separator of the parts of an input that has several.
const BETWEEN_PARTS: &str = "\u{1}";

/// `x-query-ramblock`, and `gpa2hva`.
pub fn ramblock(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let _ = gpa2hva::parse(&text);
    let Ok(blocks) = blocks::parse(&text) else { return };
    assert!(blocks.len() <= text.lines().count());
}

/// `info mtree -f`.
pub fn info_mtree(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let Ok(ranges) = mtree::ram_ranges(&text) else { return };
    for range in ranges {
        assert!(
            range.len > 0 && range.gpa.0.checked_add(range.len - 1).is_some(),
            "{range:?}"
        );
    }
}

/// `info registers -a`.
pub fn info_registers(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let Ok(vcpus) = cpu::parse(&text) else { return };
    assert!(!vcpus.is_empty());
}

/// What comes from a QMP socket, and as `query-memory-devices`.
pub fn messages(data: &[u8]) {
    assert!(fuzzed::messages(data) <= data.len());
    let Ok(answer) = serde_json::from_slice::<Vec<devices::Answered>>(data) else {
        return;
    };
    for device in devices::placed(&answer) {
        let _ = device.holds(device.gpa, device.len);
    }
}

/// What comes from libvirt's socket.
pub fn libvirt_packets(data: &[u8]) {
    // A header has 28 bytes.
    assert!(fuzzed::libvirt_packets(data) <= data.len() / 28);
}

/// What comes from the GDB stub; the first byte says in what pieces.
pub fn gdb_packets(data: &[u8]) {
    let (piece_len, data) = data.split_first().unwrap_or((&1, &[]));
    let found = fuzzed::packets(data, usize::from(*piece_len));
    assert!(found.len() <= data.len() / 4);
    // However it is cut, it is the same.
    assert_eq!(found, fuzzed::packets(data, data.len()));
}

/// The stub's `target.xml`, a feature file, and a reply to `g`, with a byte 1 between them.
pub fn gdb_registers(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let mut parts = text.splitn(3, BETWEEN_PARTS);
    let mut part = || parts.next().unwrap_or_default();
    let (target, feature, reply) = (part(), part().to_owned(), part());
    let _ = fuzzed::registers(target, &[feature], reply.as_bytes());
}
