//! Init and exit functions as compilers make them, byte by byte.

use super::*;
use crate::module::testing::{KLP_6_1, TestElf};
use object::elf::{R_X86_64_32S, R_X86_64_64, R_X86_64_PC32, R_X86_64_PLT32, RelocationType, SHF_ALLOC, SHF_EXECINSTR};

/// Sections and symbols of [`TestElf::livepatch`].
const DATA: u16 = 3;
const INIT: u16 = 4;
const THIS: u16 = 5;
const DATA_SYMBOL: usize = 3;

/// A module with that init: its bytes, and the relocations in it, each against a symbol that is defined elsewhere, or against
/// the data. Behind the descriptors the data has a variable, `counter`.
fn init(code: &[u8], relocations: &[(u64, RelocationType, &str, i64)]) -> TestElf {
    let mut elf = TestElf::livepatch(&[0xc3]);
    elf.set_bytes(DATA, &[0; 848]);
    elf.symbol("counter", 1, DATA, 840, 8);
    for offset in [3, 8] {
        elf.drop_relocation(INIT, offset);
    }
    elf.set_bytes(INIT, code);
    for (offset, kind, name, addend) in relocations {
        let symbol = match *name {
            "data" => DATA_SYMBOL,
            name => elf.undefined(name),
        };
        elf.relocation(INIT, *offset, *kind, symbol, *addend);
    }
    elf
}

/// What is wrong with it, without the advice; nothing where it is taken.
fn complaint(elf: &TestElf) -> Option<String> {
    let file = elf.build();
    let error = PatchModule::parse(&file).unwrap().patch(&KLP_6_1).err()?;
    let text = error.to_string();
    Some(text.split(": vmpatch").next().unwrap_or_default().to_owned())
}

#[test]
fn enabling_with_messages_around_it_is_all_that_an_init_may_do() {
    // call __fentry__; sub $8,%rsp; mov $fmt,%rdi; call _printk; mov $patch,%rdi; call klp_enable_patch; test %eax,%eax;
    // je 1f; mov %eax,4(%rsp); call _printk; mov 4(%rsp),%eax; 1: add $8,%rsp; ret
    let code = [
        0xe8, 0, 0, 0, 0, 0x48, 0x83, 0xec, 8, 0x48, 0xc7, 0xc7, 0, 0, 0, 0, 0xe8, 0, 0, 0, 0, 0x48, 0xc7, 0xc7, 0, 0,
        0, 0, 0xe8, 0, 0, 0, 0, 0x85, 0xc0, 0x74, 13, 0x89, 0x44, 0x24, 4, 0xe8, 0, 0, 0, 0, 0x8b, 0x44, 0x24, 4, 0x48,
        0x83, 0xc4, 8, 0xc3,
    ];
    let relocations = [
        (1, R_X86_64_PLT32, "__fentry__", -4),
        (12, R_X86_64_32S, "data", 840),
        (17, R_X86_64_PLT32, "_printk", -4),
        (24, R_X86_64_32S, "data", 0),
        (29, R_X86_64_PLT32, "klp_enable_patch", -4),
        (42, R_X86_64_PLT32, "_printk", -4),
    ];
    assert_eq!(complaint(&init(&code, &relocations)), None);
}

/// `mov $patch,%rdi; jmp klp_enable_patch` behind `code`.
fn before_enabling(code: &[u8], relocations: &[(u64, RelocationType, &'static str, i64)]) -> TestElf {
    let at = code.len() as u64;
    let rest = [0x48, 0xc7, 0xc7, 0, 0, 0, 0, 0xe9, 0, 0, 0, 0];
    let mut all = relocations.to_vec();
    all.push((at + 3, R_X86_64_32S, "data", 0));
    all.push((at + 8, R_X86_64_PLT32, "klp_enable_patch", -4));
    init(&[code, &rest].concat(), &all)
}

#[test]
fn a_call_is_refused_by_the_name_of_the_function() {
    let elf = before_enabling(&[0xe8, 0, 0, 0, 0], &[(1, R_X86_64_PLT32, "register_kprobe", -4)]);
    assert_eq!(
        complaint(&elf).as_deref(),
        Some("init calls register_kprobe (.init.text+0x0)")
    );
    // call *%rax
    let elf = before_enabling(&[0xff, 0xd0], &[]);
    let expected = "init calls a function through a pointer (.init.text+0x0)";
    assert_eq!(complaint(&elf).as_deref(), Some(expected));
    let elf = before_enabling(
        &[0xe8, 0, 0, 0, 0],
        &[(1, R_X86_64_PLT32, "__x86_indirect_thunk_rax", -4)],
    );
    assert_eq!(complaint(&elf).as_deref(), Some(expected));
}

#[test]
fn a_write_is_refused_by_the_name_of_the_variable_in_each_form_of_address() {
    let writes = Some("init writes counter (.init.text+0x0)");
    // movl $1,counter(%rip), whose displacement ends 4 bytes before the instruction does
    let code = [0xc7, 0x05, 0, 0, 0, 0, 1, 0, 0, 0];
    let elf = before_enabling(&code, &[(2, R_X86_64_PC32, "data", 840 - 8)]);
    assert_eq!(complaint(&elf).as_deref(), writes);
    // incl counter
    let elf = before_enabling(&[0xff, 0x04, 0x25, 0, 0, 0, 0], &[(3, R_X86_64_32S, "data", 840)]);
    assert_eq!(complaint(&elf).as_deref(), writes);
    // mov $counter,%rax; mov %rax,(%rax)
    let code = [0x48, 0xc7, 0xc0, 0, 0, 0, 0, 0x48, 0x89, 0x00];
    let elf = before_enabling(&code, &[(3, R_X86_64_32S, "data", 840)]);
    assert_eq!(complaint(&elf).as_deref(), Some("init writes counter (.init.text+0x7)"));
    // mov %rax,(%rbx)
    let elf = before_enabling(&[0x48, 0x89, 0x03], &[]);
    assert_eq!(
        complaint(&elf).as_deref(),
        Some("init writes through a pointer (.init.text+0x0)")
    );
    // mov $counter,%rdi; rep stosq
    let code = [0x48, 0xc7, 0xc7, 0, 0, 0, 0, 0xf3, 0x48, 0xab];
    let elf = before_enabling(&code, &[(3, R_X86_64_32S, "data", 840)]);
    assert_eq!(complaint(&elf).as_deref(), Some("init writes counter (.init.text+0x7)"));
}

#[test]
fn its_own_stack_may_be_written() {
    // push %rbp; mov %rsp,%rbp; sub $24,%rsp; lea 8(%rsp),%rdi; xor %eax,%eax; stosq; mov %rax,-8(%rbp); leave
    let code = [
        0x55, 0x48, 0x89, 0xe5, 0x48, 0x83, 0xec, 24, 0x48, 0x8d, 0x7c, 0x24, 8, 0x31, 0xc0, 0x48, 0xab, 0x48, 0x89,
        0x45, 0xf8, 0xc9,
    ];
    assert_eq!(complaint(&before_enabling(&code, &[])), None);
}

#[test]
fn a_branch_before_the_patch_is_enabled_is_refused_by_what_it_depends_on() {
    // cmpl $1,counter(%rip); je to the end
    let code = [0x83, 0x3d, 0, 0, 0, 0, 1, 0x74, 12];
    let elf = before_enabling(&code, &[(2, R_X86_64_PC32, "tsc_khz", -5)]);
    let mut with_end = elf;
    with_end.append_bytes(INIT, &[0xc3]);
    assert_eq!(
        complaint(&with_end).as_deref(),
        Some("init decides by tsc_khz how to enable the patch (.init.text+0x7)")
    );
}

#[test]
fn what_is_done_behind_a_branch_is_named_before_the_branch() {
    // test %eax,%eax; je 1f; call register_kprobe; 1:
    let code = [0x85, 0xc0, 0x74, 5, 0xe8, 0, 0, 0, 0];
    let elf = before_enabling(&code, &[(5, R_X86_64_PLT32, "register_kprobe", -4)]);
    assert_eq!(
        complaint(&elf).as_deref(),
        Some("init calls register_kprobe (.init.text+0x4)")
    );
}

#[test]
fn functions_that_init_calls_are_followed() {
    // call 1f; mov …; jmp klp_enable_patch; 1: call late; ret
    let mut elf = before_enabling(&[0xe8, 12, 0, 0, 0], &[(18, R_X86_64_PLT32, "late", -4)]);
    elf.append_bytes(INIT, &[0xe8, 0, 0, 0, 0, 0xc3]);
    assert_eq!(complaint(&elf).as_deref(), Some("init calls late (.init.text+0x11)"));
}

#[test]
fn another_instruction_or_code_that_the_loader_rewrites_is_refused() {
    // rdtsc
    let elf = before_enabling(&[0x0f, 0x31], &[]);
    assert_eq!(complaint(&elf).as_deref(), Some("init executes RDTSC (.init.text+0x0)"));
    // A NOP that becomes a jump where a static key is on.
    let mut elf = before_enabling(&[0x66, 0x90], &[]);
    let table = elf.section("__jump_table", SHF_ALLOC.0, &[0; 16]);
    elf.relocation(table, 0, R_X86_64_PC32, usize::from(INIT), 0);
    assert_eq!(
        complaint(&elf).as_deref(),
        Some("init has code that __jump_table lists, which the loader may change (.init.text+0x0)")
    );
}

#[test]
fn an_init_without_an_end_or_without_enabling_is_refused() {
    let elf = init(&[0x90], &[]);
    let mut other = elf;
    // Somebody else refers to klp_enable_patch.
    let text = other.section(".text.other", SHF_ALLOC.0 | SHF_EXECINSTR.0, &[0; 16]);
    let enable = other.undefined("klp_enable_patch");
    other.relocation(text, 0, R_X86_64_32S, DATA_SYMBOL, 0);
    other.relocation(text, 8, R_X86_64_PLT32, enable, -4);
    assert_eq!(
        complaint(&other).as_deref(),
        Some("init goes on where no instruction is (.init.text+0x1)")
    );
    other.set_bytes(INIT, &[0xc3]);
    let never = "the module never calls klp_enable_patch, so it patches nothing";
    assert_eq!(complaint(&other).as_deref(), Some(never));
    other.drop_relocation(THIS, 8);
    assert_eq!(complaint(&other).as_deref(), Some(never), "no init at all");
}

#[test]
fn another_patch_than_the_described_one_is_refused() {
    // mov $counter,%rdi, once more, behind the right one
    let code = [
        0x48, 0xc7, 0xc7, 0, 0, 0, 0, 0x48, 0xc7, 0xc7, 0, 0, 0, 0, 0xe9, 0, 0, 0, 0,
    ];
    let relocations = [
        (3, R_X86_64_32S, "data", 0),
        (10, R_X86_64_32S, "data", 840),
        (15, R_X86_64_PLT32, "klp_enable_patch", -4),
    ];
    assert_eq!(
        complaint(&init(&code, &relocations)).as_deref(),
        Some("init enables another patch than the module's klp_patch (.init.text+0xe)")
    );
}

#[test]
fn an_exit_that_does_something_is_refused_as_exit() {
    let mut elf = before_enabling(&[], &[]);
    let exit = elf.section(".exit.text", SHF_ALLOC.0 | SHF_EXECINSTR.0, &[0xe9, 0, 0, 0, 0]);
    let section = elf.section_symbol(exit);
    let ret = elf.undefined("__x86_return_thunk");
    elf.relocation(exit, 1, R_X86_64_PLT32, ret, -4);
    elf.relocation(THIS, 16, R_X86_64_64, section, 0);
    assert_eq!(complaint(&elf), None, "an exit that returns");
    elf.drop_relocation(exit, 1);
    let stop = elf.undefined("cancel_work_sync");
    elf.relocation(exit, 1, R_X86_64_PLT32, stop, -4);
    assert_eq!(
        complaint(&elf).as_deref(),
        Some("exit calls cancel_work_sync (.exit.text+0x0)")
    );
}

#[test]
fn a_pointer_of_struct_module_that_leads_to_no_code_is_refused() {
    let mut elf = before_enabling(&[], &[]);
    elf.relocation(THIS, 16, R_X86_64_64, DATA_SYMBOL, 0);
    let complaint = complaint(&elf).unwrap();
    assert!(
        complaint.starts_with("struct module at .gnu.linkonce.this_module+0x10"),
        "{complaint}"
    );
}
