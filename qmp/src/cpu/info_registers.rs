//! The registers of all vCPUs while they run: HMP `info registers -a`.
//!
//! Seen with QEMU 7.2.22 and 10.0.2, in real, protected and long mode; QEMU's `target/i386/cpu-dump.c`. Under TCG the
//! values of a running vCPU may be out of date, so that they serve to find things (the IDT, a page table), never to unwind a stack.

use crate::text::{TextError, hex};
use guest_core::Registers;

const SOURCE: &str = "info registers -a";

/// Most vCPUs that are read. QEMU's q35 has at most 4096.
const VCPUS_MAX: usize = 4096;

/// General registers in the order of [`Registers::general`], with their names in long mode and in the other modes.
const GENERAL: [(&str, &str); 16] = [
    ("RAX", "EAX"),
    ("RCX", "ECX"),
    ("RDX", "EDX"),
    ("RBX", "EBX"),
    ("RSP", "ESP"),
    ("RBP", "EBP"),
    ("RSI", "ESI"),
    ("RDI", "EDI"),
    ("R8 ", ""),
    ("R9 ", ""),
    ("R10", ""),
    ("R11", ""),
    ("R12", ""),
    ("R13", ""),
    ("R14", ""),
    ("R15", ""),
];

/// Parses the registers of each vCPU, in the order of their numbers.
///
/// # Errors
///
/// There is no vCPU, or a register is missing.
pub fn parse(text: &str) -> Result<Vec<Registers>, TextError> {
    let sections: Vec<&str> = text.split("CPU#").skip(1).take(VCPUS_MAX).collect();
    if sections.is_empty() {
        return Err(TextError::new(SOURCE, "at least one vCPU", text));
    }
    let missing = |section| TextError::new(SOURCE, "the registers of a vCPU", section);
    sections
        .iter()
        .map(|section| parse_vcpu(section).ok_or_else(|| missing(section)))
        .collect()
}

fn parse_vcpu(section: &str) -> Option<Registers> {
    let either = |long, short| value(section, long).or_else(|| value(section, short));
    let mut general = [0; 16];
    for (slot, (long, short)) in general.iter_mut().zip(GENERAL) {
        // r8 to r15 are not shown outside long mode.
        *slot = if short.is_empty() {
            value(section, long).unwrap_or(0)
        } else {
            either(long, short)?
        };
    }
    Some(Registers {
        general,
        rip: either("RIP", "EIP")?,
        rflags: either("RFL", "EFL")?,
        cs: u16::try_from(value(section, "CS ")?).ok()?,
        cr0: value(section, "CR0")?,
        cr3: value(section, "CR3")?,
        cr4: value(section, "CR4")?,
        efer: value(section, "EFER")?,
        gs_base: base(section, "GS ")?,
        kernel_gs_base: None,
        idt_base: Some(base(section, "IDT")?),
    })
}

/// The text behind `name=`, which is at the beginning of a line or behind a blank.
fn after<'a>(section: &'a str, name: &str) -> Option<&'a str> {
    section.match_indices(name).find_map(|(at, _)| {
        let starts = section.get(..at)?.chars().next_back().is_none_or(char::is_whitespace);
        section
            .get(at..)?
            .strip_prefix(name)?
            .strip_prefix('=')
            .filter(|_| starts)
    })
}

/// The number behind `name=`. For a segment, this is its selector.
fn value(section: &str, name: &str) -> Option<u64> {
    hex(after(section, name)?.split_whitespace().next()?)
}

/// The base address of a segment (`GS =selector base limit …`) or table (`IDT=     base limit`).
fn base(section: &str, name: &str) -> Option<u64> {
    let line = after(section, name)?.lines().next()?;
    let words: Vec<&str> = line.split_whitespace().collect();
    match words.as_slice() {
        [base, _limit] => hex(base),
        [_selector, base, _limit, _flags, ..] => hex(base),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vcpus_in_user_mode_and_idle_in_the_kernel_are_read() {
        let vcpus = parse(include_str!("../testdata/registers-10.0.2-linux.txt")).unwrap();
        let user = Registers {
            general: [
                0,
                0,
                1,
                0x5e_22c0,
                0x7fff_c678_5de0,
                1,
                0x2b47_2b48,
                0x5e_aed0,
                0,
                0,
                0x88a2_7d93_ddae_da54,
                0,
                0,
                0x7fff_c678_5de0,
                0x5e_aeb0,
                0x2b47_13c0,
            ],
            rip: 0x42_ed4a,
            rflags: 0x206,
            cs: 0x33,
            cr0: 0x8005_0033,
            cr3: 0x105_8000,
            cr4: 0x75_1eb0,
            efer: 0xd01,
            gs_base: 0,
            kernel_gs_base: None,
            idt_base: Some(0xffff_fe00_0000_0000),
        };
        assert_eq!(vcpus.len(), 2);
        assert_eq!(vcpus[0], user);
        assert_eq!((vcpus[1].cs, vcpus[1].gs_base), (0x10, 0xff2e_6002_0f70_0000));
    }

    #[test]
    fn vcpus_in_real_and_protected_mode_are_read() {
        let vcpus = parse(include_str!("../testdata/registers-7.2.22-firmware.txt")).unwrap();
        assert_eq!((vcpus[0].rip, vcpus[0].cs, vcpus[0].efer), (0xb7ee, 0xf000, 0));
        assert_eq!(
            (vcpus[1].rip, vcpus[1].cs, vcpus[1].idt_base),
            (0xf_d0cf, 8, Some(0xf_61be))
        );
    }

    #[test]
    fn a_vcpu_with_a_register_missing_is_refused() {
        let text = include_str!("../testdata/registers-10.0.2-linux.txt");
        assert!(parse("").is_err());
        for name in ["RAX=", "RIP=", "CS =", "GS =", "IDT=", "CR3=", "EFER="] {
            assert!(parse(&text.replace(name, "XX=")).is_err(), "{name}");
        }
        assert!(parse(&text.replace("CS =0033", "CS =10033")).is_err());
    }
}
