//! Follows an address that code has in a register. The address does not escape if, on every path, it is passed to a function that is known not
//! to keep it, or is overwritten. Any other use counts as an escape.

use super::Image;
use super::sections::{Relocation, Section, SectionId, SymbolPlace};
use iced_x86::{
    Code as Opcode, ConstantOffsets, Decoder, DecoderOptions, FlowControl, Instruction, InstructionInfoFactory,
    Mnemonic, OpAccess, OpKind, Register,
};
use std::collections::BTreeSet;
use std::ops::Range;

/// Registers of integer arguments (System V ABI for x86-64). No caller reads them after a call.
const ARGUMENTS: [Register; 6] = [
    Register::RDI,
    Register::RSI,
    Register::RDX,
    Register::RCX,
    Register::R8,
    Register::R9,
];
/// Most instructions through which one address is followed.
const STEPS_MAX: usize = 200;

/// Functions that do not keep their pointer arguments when they return: what they print is formatted at once, or copied (`vprintk_store`, kernel/printk/printk.c; `set_dev_info`, drivers/base/core.c; lib/vsprintf.c; lib/string.c;
/// fs/seq_file.c), a static key is changed at once (kernel/jump_label.c), and so is a count of references to a module
/// (kernel/module/main.c; a revert checks that count), in 5.10 to 7.2. Functions that return an argument (`memcpy`, `strcpy` and the like) are
/// not among them: see [`RETURN_FIRST`].
const PASSED_THROUGH: [&str; 65] = [
    "_printk",
    "printk",
    "_printk_deferred",
    "printk_deferred",
    "__warn_printk",
    "__WARN_trap",
    "__SCT__WARN_trap",
    "panic",
    "_dev_printk",
    "_dev_emerg",
    "_dev_alert",
    "_dev_crit",
    "_dev_err",
    "_dev_warn",
    "_dev_notice",
    "_dev_info",
    "netdev_printk",
    "netdev_emerg",
    "netdev_alert",
    "netdev_crit",
    "netdev_err",
    "netdev_warn",
    "netdev_notice",
    "netdev_info",
    "__dynamic_pr_debug",
    "__dynamic_dev_dbg",
    "__dynamic_netdev_dbg",
    "seq_printf",
    "seq_puts",
    "__seq_puts",
    "seq_write",
    "sprintf",
    "snprintf",
    "scnprintf",
    "sscanf",
    "sysfs_emit",
    "sysfs_emit_at",
    "sysfs_streq",
    "kasprintf",
    "kstrtoint",
    "kstrtouint",
    "kstrtoll",
    "kstrtoull",
    "simple_strtol",
    "simple_strtoul",
    "strlen",
    "strnlen",
    "strcmp",
    "strncmp",
    "strcasecmp",
    "strncasecmp",
    "strlcpy",
    "strscpy",
    "sized_strscpy",
    "strlcat",
    "memcmp",
    "static_key_enable",
    "static_key_disable",
    "static_key_slow_inc",
    "static_key_slow_dec",
    "static_key_count",
    "try_module_get",
    "__module_get",
    "module_put",
    "module_refcount",
];

/// Functions that keep no argument, but return the first one, which must be followed further (lib/string.c).
const RETURN_FIRST: [&str; 8] = [
    "strcpy", "strncpy", "strcat", "strncat", "memcpy", "__memcpy", "memmove", "memset",
];

/// The instructions of a section of code, or of a part of it.
pub(super) struct Code<'a> {
    image: &'a Image<'a, 'a>,
    id: SectionId,
    section: &'a Section<'a>,
    /// The instructions, each with its offset in the section.
    instructions: Vec<(Instruction, ConstantOffsets)>,
}

/// Where code continues after an instruction, for an address in a register.
enum Step {
    /// Nowhere: the address is no longer in the register, and was not kept.
    Ends,
    /// At the next instruction.
    Next,
    /// Elsewhere in the section.
    Jumps(u64),
    /// At either of the two.
    Branches(u64),
    /// The address may have been kept.
    Keeps,
}

impl<'a> Code<'a> {
    /// Decodes a part of a section; `None` if a byte of it belongs to no instruction.
    pub fn decode(
        image: &'a Image<'a, 'a>,
        id: SectionId,
        section: &'a Section<'a>,
        range: Range<u64>,
    ) -> Option<Self> {
        let bounds = usize::try_from(range.start).ok()?..usize::try_from(range.end).ok()?;
        let mut decoder = Decoder::with_ip(64, section.data.get(bounds)?, range.start, DecoderOptions::NONE);
        let mut instructions = Vec::new();
        while decoder.can_decode() {
            let instruction = decoder.decode();
            if instruction.is_invalid() {
                return None;
            }
            instructions.push((instruction, decoder.get_constant_offsets(&instruction)));
        }
        Some(Self {
            image,
            id,
            section,
            instructions,
        })
    }

    /// The instructions; the address of each is its offset in the section.
    pub fn instructions(&self) -> impl Iterator<Item = &Instruction> {
        self.instructions.iter().map(|(instruction, _)| instruction)
    }

    /// The instruction that the byte at `offset` of the section belongs to.
    pub fn at(&self, offset: u64) -> Option<&Instruction> {
        let after = self.instructions.partition_point(|(one, _)| one.ip() <= offset);
        let (instruction, _) = self.instructions.get(after.checked_sub(1)?)?;
        (offset < instruction.next_ip()).then_some(instruction)
    }

    /// True if the instruction uses the address of its relocation in place: it branches there, or loads or stores there.
    pub fn uses_in_place(&self, index: usize, relocation: &Relocation) -> bool {
        let Some((instruction, fields)) = self.instructions.get(index) else {
            return false;
        };
        let at = relocation.offset.wrapping_sub(instruction.ip());
        let is = |has: bool, field: usize| has && u64::try_from(field) == Ok(at);
        if is(fields.has_displacement(), fields.displacement_offset()) {
            return instruction.mnemonic() != Mnemonic::Lea;
        }
        let goes = matches!(
            instruction.flow_control(),
            FlowControl::Call | FlowControl::UnconditionalBranch | FlowControl::ConditionalBranch
        );
        goes && instruction.op0_kind() == OpKind::NearBranch64 && is(fields.has_immediate(), fields.immediate_offset())
    }

    /// True if the instruction computes an address in its own section, by a distance without a relocation.
    pub fn computes_own_address(&self, index: usize) -> bool {
        let instruction = self.instructions.get(index).map(|(instruction, _)| instruction);
        instruction.is_some_and(|one| one.mnemonic() == Mnemonic::Lea && one.is_ip_rel_memory_operand())
    }

    /// True if the instruction loads an address into an argument's register, and on every path from there the address is passed to a function that
    /// does not keep it, or is overwritten.
    pub fn hands_over(&self, index: usize) -> bool {
        let Some((instruction, _)) = self.instructions.get(index) else {
            return false;
        };
        let is_address = matches!(
            instruction.code(),
            Opcode::Lea_r64_m | Opcode::Mov_rm64_imm32 | Opcode::Mov_r64_imm64
        );
        let register = instruction.op0_register();
        if !is_address || instruction.op0_kind() != OpKind::Register || !ARGUMENTS.contains(&register) {
            return false;
        }
        let (mut open, mut seen) = (vec![index.saturating_add(1)], BTreeSet::new());
        while let Some(index) = open.pop() {
            let Some((instruction, _)) = self.instructions.get(index) else {
                return false;
            };
            if !seen.insert(index) {
                continue;
            }
            if seen.len() > STEPS_MAX || self.may_become_another(instruction) {
                return false;
            }
            let (next, target) = match self.step(instruction, register) {
                Step::Ends => (None, None),
                Step::Next => (Some(index.saturating_add(1)), None),
                Step::Jumps(to) => (None, Some(to)),
                Step::Branches(to) => (Some(index.saturating_add(1)), Some(to)),
                Step::Keeps => return false,
            };
            open.extend(next);
            if let Some(to) = target {
                match self.instructions.binary_search_by_key(&to, |(one, _)| one.ip()) {
                    Ok(index) => open.push(index),
                    Err(_) => return false,
                }
            }
        }
        true
    }

    fn step(&self, instruction: &Instruction, register: Register) -> Step {
        let mut relocations = self
            .section
            .relocations_in(instruction.ip(), instruction.next_ip())
            .iter();
        match instruction.flow_control() {
            FlowControl::Call | FlowControl::UnconditionalBranch | FlowControl::ConditionalBranch => {
                let target = instruction.near_branch_target();
                match (relocations.next(), instruction.flow_control()) {
                    (Some(relocation), FlowControl::Call | FlowControl::UnconditionalBranch)
                        if self.passes_through(relocation, register) =>
                    {
                        Step::Ends
                    }
                    (None, FlowControl::UnconditionalBranch) => Step::Jumps(target),
                    (None, FlowControl::ConditionalBranch) => Step::Branches(target),
                    _ => Step::Keeps,
                }
            }
            // UD2 is WARN: the kernel continues behind it, with all registers unchanged. UD1 is WARN with a text (6.19): its handler
            // prints what the register points at.
            FlowControl::Exception => match instruction.mnemonic() {
                Mnemonic::Ud2 => Step::Next,
                Mnemonic::Ud1 if instruction.op0_register() == register => Step::Ends,
                Mnemonic::Ud1 => Step::Next,
                _ => Step::Keeps,
            },
            FlowControl::Next => {
                let mut factory = InstructionInfoFactory::new();
                let info = factory.info(instruction);
                let mut uses = info.used_registers().iter();
                let mut uses = uses.by_ref().filter(|one| one.register().full_register() == register);
                match (uses.next(), uses.next()) {
                    (None, _) => Step::Next,
                    // A write to the low half clears the high half.
                    (Some(one), None) if one.access() == OpAccess::Write && one.register().size() >= 4 => Step::Ends,
                    _ => Step::Keeps,
                }
            }
            _ => Step::Keeps,
        }
    }

    /// True for a function of the kernel that neither keeps nor returns its argument in `register`.
    fn passes_through(&self, relocation: &Relocation, register: Register) -> bool {
        let Some(symbol) = self.image.module.symbol(relocation) else {
            return false;
        };
        let name = match symbol.place {
            SymbolPlace::Undefined { .. } => symbol.name,
            SymbolPlace::Livepatch {
                object: "vmlinux",
                name,
                ..
            } => name,
            _ => return false,
        };
        PASSED_THROUGH.contains(&name) || (RETURN_FIRST.contains(&name) && register != Register::RDI)
    }

    /// True if the guest may have another instruction there, or continue elsewhere: alternatives, branches on static keys, fault fixups.
    fn may_become_another(&self, instruction: &Instruction) -> bool {
        let (start, end) = (instruction.ip(), instruction.next_ip());
        let overlaps = |at: u64, len: u64| at < end && at.saturating_add(len) > start;
        let mut alternatives = self.image.alternatives.iter().filter(|one| one.site.section == self.id);
        let mut branches = self.image.jump_rows.rows.iter().map(|row| row.site);
        let fixed_up = self.image.fixups.sites();
        alternatives.any(|one| overlaps(one.site.offset, one.site_len.into()))
            || branches
                .by_ref()
                .chain(fixed_up)
                .any(|site| site.section == self.id && overlaps(site.offset, 1))
    }
}

#[cfg(test)]
mod tests {
    use crate::module::PatchModule;
    use crate::module::testing::{ALT_6_1, KLP_6_1, TestElf};
    use object::elf::{R_X86_64_32S, R_X86_64_PLT32};

    /// True if the address of `.rodata.str1.1` escapes from `text`, which has it as an immediate at 3, and calls `callee` by the distance at
    /// `call`.
    fn escapes(text: &[u8], call: u64, callee: &str) -> bool {
        let mut elf = TestElf::livepatch(text);
        let callee = elf.undefined(callee);
        elf.relocation(1, 3, R_X86_64_32S, 2, 0);
        elf.relocation(1, call, R_X86_64_PLT32, callee, -4);
        let file = elf.build();
        let module = PatchModule::parse(&file).unwrap();
        let patch = module.patch(&KLP_6_1).unwrap();
        let found = module.image(&patch, &ALT_6_1).unwrap().escapes();
        assert!(found.is_empty() || found == [".rodata.str1.1"], "{found:?}");
        !found.is_empty()
    }

    #[test]
    fn a_text_that_is_printed_does_not_escape() {
        // mov $text,%rdi; xor %eax,%eax; call; ret
        let called = [0x48, 0xc7, 0xc7, 0, 0, 0, 0, 0x31, 0xc0, 0xe8, 0, 0, 0, 0, 0xc3];
        assert!(!escapes(&called, 10, "_printk"));
        // mov $text,%rsi; jmp
        let at_the_end = [0x48, 0xc7, 0xc6, 0, 0, 0, 0, 0xe9, 0, 0, 0, 0];
        assert!(!escapes(&at_the_end, 8, "seq_printf"));
    }

    #[test]
    fn a_text_that_goes_to_any_other_function_or_place_escapes() {
        let called = [0x48, 0xc7, 0xc7, 0, 0, 0, 0, 0x31, 0xc0, 0xe8, 0, 0, 0, 0, 0xc3];
        assert!(escapes(&called, 10, "request_threaded_irq"));
        assert!(escapes(&called, 10, "strcpy"), "it returns the address");
        // mov $text,%rbx; call: no argument
        let kept = [0x48, 0xc7, 0xc3, 0, 0, 0, 0, 0xe8, 0, 0, 0, 0, 0xc3];
        assert!(escapes(&kept, 8, "_printk"));
        // mov $text,%rdi; mov %rdi,(%rax); call
        let stored = [0x48, 0xc7, 0xc7, 0, 0, 0, 0, 0x48, 0x89, 0x38, 0xe8, 0, 0, 0, 0, 0xc3];
        assert!(escapes(&stored, 11, "_printk"));
        // mov $text,%rdi; ret; call
        let returned = [0x48, 0xc7, 0xc7, 0, 0, 0, 0, 0xc3, 0xe8, 0, 0, 0, 0, 0xc3];
        assert!(escapes(&returned, 9, "_printk"));
    }

    #[test]
    fn every_path_from_the_load_of_a_text_counts() {
        // mov $text,%rdi; je 1f; call; ret; 1: xor %edi,%edi; ret
        let mut text = [
            0x48, 0xc7, 0xc7, 0, 0, 0, 0, 0x74, 6, 0xe8, 0, 0, 0, 0, 0xc3, 0x31, 0xff, 0xc3,
        ];
        assert!(!escapes(&text, 10, "_printk"));
        // 1: push %rdi; nop; ret
        text[15..17].copy_from_slice(&[0x57, 0x90]);
        assert!(escapes(&text, 10, "_printk"));
        // A loop that never calls: mov $text,%rdi; jmp .; call
        let endless = [0x48, 0xc7, 0xc7, 0, 0, 0, 0, 0xeb, 0xfe, 0xe8, 0, 0, 0, 0];
        assert!(!escapes(&endless, 10, "_printk"));
    }
}
