//! Spoils a sound guest: the input is a list of words to write into the tables that vmpatch reads.

use super::common::guest::{CAVE, DATA, DIRECT, END, ENTRY, FUNCTIONS, Guest, IMAGE, RODATA, heap, per_cpu_area};
use super::common::tasks::{INIT_TASK, process};

/// Bytes of one write.
const WRITE_BYTES: usize = 12;
/// More writes add nothing.
const WRITES_MAX: usize = 64;

/// What there is to spoil: start and bytes, guest-virtual.
const PLACES: [(u64, u64); 24] = [
    (RODATA, 0x800),
    (RODATA + 0x1000, 0x1000),
    (RODATA + 0x1_0000, 0x40),
    (RODATA + 0x1_2000, 0x200),
    (RODATA + 0x3_0000, 0x40),
    (RODATA + 0x3_1000, 0x40),
    (RODATA + 0x4_0000, 0x8000),
    (DATA, 0x2000),
    (DATA + 0x2000, 0x3000),
    (DATA + 0x3480, 0x40),
    (DATA + 0x8000, 0x200),
    (DATA + 0x1_0000, 0x100),
    (DATA + 0x1_2000, 0x20),
    (DATA + 0x2_0000, 0x40),
    (DATA + 0x2_0800, 0x80),
    (DATA + 0x2_1000, 0x700),
    (DATA + 0x2_2000, 0x200),
    (DATA + 0x4_0000, 0x40),
    (DATA + 0x4_1000, 0x800),
    (INIT_TASK, 0x200),
    (per_cpu_area(0) + 0x1000, 0xc00),
    (FUNCTIONS, 0x400),
    (CAVE, 0x1000),
    (heap(0), 0x1_0000),
];

/// What a written word may be an address in.
const BASES: [u64; 10] = [
    0,
    IMAGE,
    RODATA,
    DATA,
    DATA + 0x2_0000,
    END,
    DIRECT,
    ENTRY,
    INIT_TASK,
    heap(0x8_0000),
];

/// Makes the writes that `data` says: place, base, offset in the place, and a word that is added to the base.
pub fn spoil(guest: &Guest, data: &[u8]) {
    for write in data.chunks_exact(WRITE_BYTES).take(WRITES_MAX) {
        let (place, base) = (usize::from(write[0]), usize::from(write[1]));
        let offset = u64::from(u16::from_le_bytes([write[2], write[3]]));
        let word = u64::from_le_bytes(write[4..12].try_into().expect("8 bytes"));
        let (start, len) = match place.checked_sub(PLACES.len()) {
            None => PLACES[place],
            Some(number) if number < 4 => (process(number as u64).at, 0x1000),
            Some(number) if number < 8 => (process(number as u64 - 4).stack + 0x3000, 0x1000),
            Some(_) => (heap(0), 0x10_0000),
        };
        guest.put_u64(start + offset % (len - 7), BASES[base % BASES.len()].wrapping_add(word));
    }
}
