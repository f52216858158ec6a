//! Tells the guest of its CPUs and interrupts: Intel's MultiProcessor Specification 1.4, chapter 4.

use super::{Result, boot};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

const IO_APIC: u32 = 0xfec0_0000;
const LOCAL_APIC: u32 = 0xfee0_0000;
const APIC_VERSION: u8 = 0x14;
/// Interrupts of the ISA bus.
const LINES: u8 = 16;
/// Kinds of interrupts: vectored, NMI, from the old controller.
const VECTORED: u8 = 0;
const NMI: u8 = 1;
const EXTERNAL: u8 = 3;

/// Writes it where base memory ends.
pub(super) fn write(ram: &GuestMemoryMmap, vcpus: u8) -> Result<()> {
    let io_apic_id = vcpus;
    let mut entries: Vec<Vec<u8>> = Vec::new();
    for id in 0..vcpus {
        // Usable; the first one boots. Family 6, with an APIC.
        let flags = if id == 0 { 3 } else { 1 };
        let mut cpu = vec![0, id, APIC_VERSION, flags, 0, 6, 0, 0];
        cpu.extend(0x201u32.to_le_bytes());
        cpu.extend([0; 8]);
        entries.push(cpu);
    }
    entries.push([&[1, 0][..], b"ISA   "].concat());
    entries.push([&[2, io_apic_id, 0x11, 1][..], &IO_APIC.to_le_bytes()].concat());
    for line in 0..LINES {
        entries.push(vec![3, VECTORED, 0, 0, 0, line, io_apic_id, line]);
    }
    entries.push(vec![4, EXTERNAL, 0, 0, 0, 0, 0, 0]);
    entries.push(vec![4, NMI, 0, 0, 0, 0, 0xff, 1]);
    let body = entries.concat();

    let len = u16::try_from(44 + body.len())?;
    let mut table = b"PCMP".to_vec();
    table.extend(len.to_le_bytes());
    table.extend([4, 0]);
    table.extend(b"VMPATCH SMALL VMM   ");
    table.extend([0; 6]);
    table.extend(u16::try_from(entries.len())?.to_le_bytes());
    table.extend(LOCAL_APIC.to_le_bytes());
    table.extend([0; 4]);
    table.extend(body);
    table[7] = checksum(&table);

    let at = u32::try_from(boot::BASE_END)? + 16;
    let mut pointer = b"_MP_".to_vec();
    pointer.extend(at.to_le_bytes());
    pointer.extend([1, 4, 0, 0, 0, 0, 0, 0]);
    pointer[10] = checksum(&pointer);
    ram.write_slice(&[pointer, table].concat(), GuestAddress(boot::BASE_END))?;
    Ok(())
}

/// What makes the sum of all bytes 0.
fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum: u8, byte| sum.wrapping_sub(*byte))
}
