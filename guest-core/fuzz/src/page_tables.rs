//! Page tables, interrupt table and registers.

use super::common::ram::Ram;
use guest_core::kernel::image::{IMAGE_RANGE, Image};
use guest_core::paging::{AddressSpace, MappedMemory};
use guest_core::{Gva, Registers, VirtMemory};

/// Most RAM that is made of an input.
const BYTES_MAX: usize = 1 << 20;

/// The input is CR3, CR4, the base of the interrupt table, an address, and the guest's RAM.
pub fn run(data: &[u8]) {
    let Some((words, bytes)) = data.split_at_checked(32) else {
        return;
    };
    let word = |index: usize| u64::from_le_bytes(words[8 * index..8 * index + 8].try_into().expect("8 bytes"));
    let ram = Ram::new(bytes[..bytes.len().min(BYTES_MAX)].to_vec());
    let registers = Registers {
        cr3: word(0),
        cr4: word(1),
        idt_base: Some(word(2)),
        efer: 0xd01,
        ..Registers::default()
    };
    let space = AddressSpace::from_control_registers(registers.cr3, registers.cr4);
    let at = Gva(word(3));
    if let Ok(there) = space.translate(&ram, at) {
        assert!(there.page_size.is_power_of_two());
    }
    let _ = space.directory_entry(&ram, at);
    let mut buffer = [0; 9000];
    let _ = MappedMemory { memory: &ram, space }.read(at, &mut buffer);
    ram.count_from_here();
    if let Ok(image) = Image::find(&ram, &[registers]) {
        assert!(IMAGE_RANGE.start <= image.start() && image.end() <= IMAGE_RANGE.end);
        assert!(image.segments.is_sorted_by(|one, next| one.end <= next.start));
        for segment in &image.segments {
            assert!(segment.start < segment.end);
            assert_eq!(image.segment(segment.start), Some(segment));
        }
    }
    assert!(ram.counted().0 < 4000);
}
