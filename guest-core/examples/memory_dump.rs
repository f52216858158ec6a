//! Names the kernel in a memory dump of a guest, and the patches that it holds. It shows what an embedder has to give to the core: guest
//! memory by guest-physical address, and the registers of the vCPUs.
//!
//! usage: cargo run --release --package guest-core --example memory_dump FILE
//!
//! FILE is an ELF core of a whole x86-64 guest, as QEMU's `dump-guest-memory FILE` and `virsh dump --memory-only` write it. The
//! registers are in its notes (`QEMUCPUState`, target/i386/arch_dump.c of QEMU; tried with 10.0.2).

use guest_core::registry::{Registry, cave};
use guest_core::{Gpa, Kernel, MemoryError, PhysMemory, Registers};
use object::ReadCache;
use object::elf::{FileHeader64, PT_LOAD, PT_NOTE};
use object::endian::Endianness;
use object::read::elf::{FileHeader, ProgramHeader};
use std::error::Error;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;

/// Guest-physical memory in a file. Reads are the file's; there is nothing to write to.
struct Dump {
    file: File,
    ranges: Vec<Range<Gpa>>,
    /// Where the first byte of each range is in the file.
    offsets: Vec<u64>,
}

impl PhysMemory for Dump {
    fn read(&self, at: Gpa, buf: &mut [u8]) -> Result<(), MemoryError> {
        let holds = |range: &Range<Gpa>| range.contains(&at) && buf.len() as u64 <= range.end.0 - at.0;
        let found = self.ranges.iter().zip(&self.offsets).find(|(range, _)| holds(range));
        let len = buf.len();
        let (range, offset) = found.ok_or(MemoryError::NotRam { at, len })?;
        let read = self.file.read_exact_at(buf, offset + (at.0 - range.start.0));
        read.map_err(|error| MemoryError::Host {
            at,
            len,
            cause: error.to_string(),
        })
    }

    fn write(&self, at: Gpa, bytes: &[u8]) -> Result<(), MemoryError> {
        Err(MemoryError::Host {
            at,
            len: bytes.len(),
            cause: "a dump is not written to".to_owned(),
        })
    }

    fn ram(&self) -> &[Range<Gpa>] {
        &self.ranges
    }
}

/// One vCPU of `QEMUCPUState`: `version`, `size`, 16 general registers, `rip`, `rflags`, ten segments of 24 bytes (selector, limit, flags,
/// padding, base), `cr[5]`, `kernel_gs_base`.
fn registers(note: &[u8]) -> Option<Registers> {
    /// From the instruction set's order of general registers to QEMU's.
    const GENERAL: [usize; 16] = [0, 2, 3, 1, 6, 7, 4, 5, 8, 9, 10, 11, 12, 13, 14, 15];
    const GENERAL_AT: usize = 8;
    const SEGMENTS_AT: usize = GENERAL_AT + 18 * 8;
    const SEGMENT_BYTES: usize = 24;
    const CONTROL_AT: usize = SEGMENTS_AT + 10 * SEGMENT_BYTES;
    /// LMA and NXE: what EFER of a Linux in 64-bit mode holds that matters here.
    const EFER: u64 = 1 << 10 | 1 << 11;
    let word = |at: usize| Some(u64::from_le_bytes(*note.get(at..)?.first_chunk()?));
    let base = |segment: usize| word(SEGMENTS_AT + segment * SEGMENT_BYTES + 16);
    let mut general = [0; 16];
    for (register, index) in general.iter_mut().zip(GENERAL) {
        *register = word(GENERAL_AT + index * 8)?;
    }
    let control = |index: usize| word(CONTROL_AT + index * 8);
    Some(Registers {
        general,
        rip: word(GENERAL_AT + 16 * 8)?,
        rflags: word(GENERAL_AT + 17 * 8)?,
        cs: u16::from_le_bytes(*note.get(SEGMENTS_AT..)?.first_chunk()?),
        cr0: control(0)?,
        cr3: control(3)?,
        cr4: control(4)?,
        // The dump has no EFER. A kernel that runs without NXE is not found, as its page tables would not be read as it means them.
        efer: EFER,
        gs_base: base(4)?,
        kernel_gs_base: Some(control(5)?),
        idt_base: Some(base(9)?),
    })
}

fn open(path: &str) -> Result<(Dump, Vec<Registers>), Box<dyn Error>> {
    let file = File::open(path)?;
    let (mut ranges, mut vcpus) = (Vec::new(), Vec::new());
    let cache = ReadCache::new(&file);
    let header = FileHeader64::<Endianness>::parse(&cache)?;
    let endian = header.endian()?;
    for segment in header.program_headers(endian, &cache)? {
        let (start, len) = (segment.p_paddr(endian), segment.p_filesz(endian));
        match segment.p_type(endian) {
            PT_LOAD => ranges.push((Gpa(start)..Gpa(start + len), segment.p_offset(endian))),
            PT_NOTE => {
                for note in segment.notes(endian, &cache)?.into_iter().flatten() {
                    let note = note?;
                    if note.name() == b"QEMU" {
                        vcpus.extend(registers(note.desc()));
                    }
                }
            }
            _ => {}
        }
    }
    ranges.sort_by_key(|(range, _)| range.start);
    let (ranges, offsets) = ranges.into_iter().unzip();
    Ok((Dump { file, ranges, offsets }, vcpus))
}

fn main() -> Result<(), Box<dyn Error>> {
    let path = std::env::args().nth(1).ok_or("usage: memory_dump FILE")?;
    let (memory, vcpus) = open(&path)?;
    let kernel = Kernel::find(&memory, &vcpus)?;
    println!("{}", kernel.banner);
    let live = kernel.live(&memory);
    let registry = Registry::find(&live, &cave::find(&live)?)?;
    for entry in &registry.entries {
        let record = entry.record();
        let id = record.map_or("(no record)", |record| &record.id);
        println!("patch {id}: {:?}", entry.state);
        for function in record.iter().flat_map(|record| &record.functions) {
            println!("  {} {:#x} -> {:#x}", function.name, function.old, function.new);
        }
    }
    if registry.entries.is_empty() {
        println!("no patches");
    }
    Ok(())
}
