//! Loads a bzImage by the 32-bit boot protocol: Documentation/arch/x86/boot.rst.

use super::{Config, Result};
use std::fs;
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

/// `struct boot_params`.
pub(super) const PARAMS: u64 = 0x7000;
const COMMAND_LINE: u64 = 0x2_0000;
/// Where the kernel is loaded, and entered.
pub(super) const KERNEL: u64 = 0x10_0000;
/// Above what the kernel leaves to the firmware: base memory ends there.
pub(super) const BASE_END: u64 = 0x9_fc00;

/// Offsets in the file and in `boot_params`, which are the same.
const E820_COUNT: usize = 0x1e8;
const HEADER: usize = 0x1f1;
const HEADER_LEN: usize = 0x201;
const MAGIC: usize = 0x202;
const LOADER: usize = 0x210;
const RAMDISK: usize = 0x218;
const RAMDISK_LEN: usize = 0x21c;
const COMMAND_LINE_AT: usize = 0x228;
const E820: usize = 0x2d0;
const PARAMS_LEN: usize = 4096;
/// A loader without a number of its own.
const UNKNOWN_LOADER: u8 = 0xff;
const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;

pub(super) fn load(ram: &GuestMemoryMmap, config: &Config) -> Result<()> {
    let image = fs::read(&config.kernel)?;
    if image.get(MAGIC..MAGIC + 4) != Some(b"HdrS") {
        return Err("the kernel is no bzImage".into());
    }
    let sectors = match image[HEADER] {
        0 => 4,
        sectors => usize::from(sectors),
    };
    let code = image.get((sectors + 1) * 512..).ok_or("the kernel is cut off")?;
    ram.write_slice(code, GuestAddress(KERNEL))?;

    let initrd = fs::read(&config.initrd)?;
    let low = ram.iter().filter(|region| region.start_addr().raw_value() < 1 << 32);
    let low_end = low.map(|region| region.last_addr().raw_value() + 1).max().unwrap_or(0);
    let initrd_at = (low_end - initrd.len() as u64) & !0xfff;
    ram.write_slice(&initrd, GuestAddress(initrd_at))?;

    let line = [config.command_line.as_bytes(), &[0]].concat();
    ram.write_slice(&line, GuestAddress(COMMAND_LINE))?;

    let mut params = vec![0; PARAMS_LEN];
    let header_end = MAGIC + usize::from(image[HEADER_LEN]);
    params[HEADER..header_end].copy_from_slice(&image[HEADER..header_end]);
    params[LOADER] = UNKNOWN_LOADER;
    let mut put = |at: usize, value: u64| -> Result<()> {
        params[at..at + 4].copy_from_slice(&u32::try_from(value)?.to_le_bytes());
        Ok(())
    };
    put(RAMDISK, initrd_at)?;
    put(RAMDISK_LEN, initrd.len() as u64)?;
    put(COMMAND_LINE_AT, COMMAND_LINE)?;
    let mut ranges = vec![
        (0, BASE_END, E820_RAM),
        (BASE_END, KERNEL, E820_RESERVED),
        (KERNEL, low_end, E820_RAM),
    ];
    let high = ram.iter().map(|region| (region.start_addr().raw_value(), region.len()));
    ranges.extend(
        high.filter(|(start, _)| *start >= 1 << 32)
            .map(|(start, len)| (start, start + len, E820_RAM)),
    );
    params[E820_COUNT] = u8::try_from(ranges.len())?;
    for (entry, (start, end, kind)) in params[E820..].chunks_exact_mut(20).zip(ranges) {
        let bytes = [
            &u64::to_le_bytes(start)[..],
            &(end - start).to_le_bytes(),
            &kind.to_le_bytes(),
        ]
        .concat();
        entry.copy_from_slice(&bytes);
    }
    ram.write_slice(&params, GuestAddress(PARAMS))?;
    Ok(())
}
