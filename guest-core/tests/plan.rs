//! Plans for guests made by hand: what is written where, and what is refused.

mod common;

use common::guest::{FUNCTIONS, Guest, RODATA, heap};
use common::module::{
    Function, livepatch, livepatch_against, livepatch_for, livepatch_made_for, livepatch_of_format,
    livepatch_with_orc_entries, livepatch_with_type,
};
use common::patch::{commit_plan, patched, plan, plan_for, recover, refusal, registry, target, two};
use guest_core::module::note::{Note, OldCode};
use guest_core::module::{NoteError, ResolveError};
use guest_core::pattern::Pattern;
use guest_core::plan::{ApplyOptions, Refusal, RevertError, apply, revert};
use guest_core::redirect::RedirectError;
use guest_core::registry::{Record, Redirect, RegistryError, State};
use guest_core::{Gva, VirtMemory};

#[test]
fn a_patched_function_jumps_into_code_that_only_runs() {
    let guest = Guest::new();
    let kernel = guest.kernel();
    let plan = plan_for(&guest, &kernel, "victim").unwrap();
    assert!(guest.ram.differences().is_empty());
    commit_plan(&guest, &kernel, &plan).unwrap();
    let new = target(&guest, guest.symbol("victim") + 4);
    let mut code = [0; 10];
    let live = kernel.live(&guest.ram);
    live.read(Gva(new), &mut code).unwrap();
    assert_eq!(code.to_vec(), Function::returning_one("victim").code);
    let there = kernel.space.translate(&guest.ram, Gva(new)).unwrap();
    assert!(there.executable && !there.writable);
    let record = guest_core::kernel::ftrace::record(&live, Gva(guest.symbol("victim")))
        .unwrap()
        .unwrap();
    assert!(record.is_disabled() && !record.is_held());
    let registry = registry(&guest, &kernel);
    let [entry] = registry.entries.as_slice() else { panic!() };
    assert_eq!(entry.state, State::Applied);
    let record = entry.record.as_ref().unwrap();
    assert_eq!((record.id.as_str(), record.applied_at, record.order), ("fix", 7, 1));
    assert_eq!(
        (record.functions[0].redirect, record.functions[0].new),
        (Redirect::Ftrace, new)
    );
}

#[test]
fn a_module_with_a_type_of_another_size_or_of_no_size_here_is_refused() {
    let guest = Guest::new();
    let kernel = guest.kernel();
    let planned = |tag, bytes| {
        let file = livepatch_with_type("fix", (tag, bytes), &[Function::returning_one("victim")]);
        plan(&guest, &kernel, &file)
    };
    planned("task_struct", 512).unwrap();
    let refused = planned("task_struct", 520).unwrap_err();
    assert!(
        matches!(&refused, Refusal::TypeSize { name, module: 520, guest } if name == "task_struct" && guest == &[512]),
        "{refused}"
    );
    let refused = planned("not_there", 8).unwrap_err();
    assert!(
        refused
            .to_string()
            .ends_with("the guest's kernel has none of that name"),
        "{refused}"
    );
    let mut file = livepatch_with_type("fix", ("task_struct", 512), &[Function::returning_one("victim")]);
    let magic = file.windows(4).position(|part| part == [0x9f, 0xeb, 1, 0]).unwrap();
    file[magic + 2] = 9;
    let refused = plan(&guest, &kernel, &file).unwrap_err();
    assert!(matches!(refused, Refusal::BaseTypes(_)), "{refused}");
}

#[test]
fn a_function_without_a_site_gets_the_jump_at_its_entry() {
    let guest = Guest::new();
    let kernel = guest.kernel();
    let plan = plan_for(&guest, &kernel, "notrace_victim").unwrap();
    assert_eq!(plan.record.functions[0].redirect, Redirect::Body);
    commit_plan(&guest, &kernel, &plan).unwrap();
    assert_eq!(
        target(&guest, guest.symbol("notrace_victim")),
        plan.record.functions[0].new
    );
}

#[test]
fn a_function_that_is_traced_gets_the_jump_behind_its_site() {
    let guest = Guest::new();
    let kernel = guest.kernel();
    let site = guest.symbol("victim") + 4;
    let record = guest_core::kernel::ftrace::record(&kernel.live(&guest.ram), Gva(site))
        .unwrap()
        .unwrap();
    guest.put_u64(record.flags_at.0, 1 << 31 | 1);
    guest.put(site, &[0xe8, 1, 2, 3, 4]);
    let plan = plan_for(&guest, &kernel, "victim").unwrap();
    assert_eq!(plan.record.functions[0].redirect, Redirect::Body);
    commit_plan(&guest, &kernel, &plan).unwrap();
    assert_eq!(guest.bytes_at(site, 5), [0xe8, 1, 2, 3, 4]);
    assert_eq!(target(&guest, site + 5), plan.record.functions[0].new);
    assert_eq!(guest.u64_at(record.flags_at.0), 1 << 31 | 1);
}

#[test]
fn the_n_th_of_several_functions_of_one_name_is_patched() {
    let guest = Guest::new();
    let kernel = guest.kernel();
    assert!(matches!(
        refusal(&guest, &kernel, "twin"),
        Refusal::Function {
            cause: ResolveError::Ambiguous { .. },
            ..
        }
    ));
    let second = Function {
        sympos: 2,
        ..Function::returning_one("twin")
    };
    let plan = plan(&guest, &kernel, &livepatch("fix", &[second])).unwrap();
    assert_eq!(plan.record.functions[0].old, FUNCTIONS + 64 * 5);
}

/// The guest's unwinder would read across the entries.
#[test]
fn a_module_with_longer_orc_entries_is_refused() {
    let guest = Guest::new();
    let file = livepatch_with_orc_entries("fix", 9, &[Function::returning_one("victim")]);
    let refused = plan(&guest, &guest.kernel(), &file).unwrap_err();
    assert!(
        matches!(refused, Refusal::OrcEntry { module: 9, guest: 6 }),
        "{refused}"
    );
}

#[test]
fn a_module_of_another_orc_format_is_refused() {
    const AT: u64 = RODATA + 0x3_f000;
    let with_header = Guest::with_symbols(Default::default(), |symbols| {
        symbols.push(('R', "__start_orc_header".to_owned(), AT));
        symbols.sort_by_key(|symbol| symbol.2);
    });
    with_header.put(AT, &[0xaa; 20]);
    let kernel = with_header.kernel();
    let module = |digest: &[u8]| livepatch_of_format("fix", digest, &[Function::returning_one("victim")]);
    let refused = |digest: &[u8]| plan(&with_header, &kernel, &module(digest)).unwrap_err().to_string();
    assert!(plan(&with_header, &kernel, &module(&[0xaa; 20])).is_ok());
    assert!(
        plan_for(&with_header, &kernel, "victim").is_ok(),
        "a module that does not say"
    );
    let other = [[0xaa; 19].as_slice(), &[0xbb]].concat();
    let hex = |last| format!("{}{last}", "aa".repeat(19));
    assert_eq!(
        refused(&other),
        format!(
            "the module was built for another ORC format ({}) than the guest's kernel has ({})",
            hex("bb"),
            hex("aa")
        )
    );
    assert!(refused(&[0xaa; 19]).contains("another ORC format"));
    assert!(refused(&[0xaa; 21]).contains("another ORC format"));
    // A kernel from before 6.4 has none.
    let without = Guest::new();
    assert!(plan(&without, &without.kernel(), &module(&other)).is_ok());
}

#[test]
fn parts_that_the_compiler_split_off_must_not_run_either() {
    let guest = Guest::new();
    let plan = plan_for(&guest, &guest.kernel(), "victim").unwrap();
    let must_be_quiescent: Vec<_> = plan
        .must_be_quiescent
        .iter()
        .map(|part| (part.name.as_str(), part.code.start.0))
        .collect();
    assert_eq!(
        must_be_quiescent,
        [("victim", FUNCTIONS + 64 * 3), ("victim.cold", FUNCTIONS + 64 * 6)]
    );
}

#[test]
fn new_code_calls_what_the_kernel_exports_and_nothing_else() {
    let guest = Guest::new();
    let kernel = guest.kernel();
    let calling = |symbol| {
        let code = vec![0xe8, 0, 0, 0, 0, 0xc3];
        livepatch(
            "fix",
            &[Function {
                code,
                calls: Some((1, symbol)),
                ..Function::returning_one("victim")
            }],
        )
    };
    let planned = plan(&guest, &kernel, &calling("schedule")).unwrap();
    commit_plan(&guest, &kernel, &planned).unwrap();
    let new = planned.record.functions[0].new;
    let mut code = [0; 5];
    kernel.live(&guest.ram).read(Gva(new), &mut code).unwrap();
    let distance = i32::from_le_bytes(code[1..].try_into().unwrap());
    assert_eq!(new.wrapping_add(5).wrapping_add_signed(distance.into()), FUNCTIONS);
    let guest = Guest::new();
    assert!(matches!(
        plan(&guest, &kernel, &calling("victim")),
        Err(Refusal::Link(_))
    ));
    assert!(matches!(
        plan(&guest, &kernel, &calling("nobody")),
        Err(Refusal::Link(_))
    ));
}

#[test]
fn what_does_not_fit_the_guest_is_refused_by_name() {
    let guest = Guest::new();
    let kernel = guest.kernel();
    let other = livepatch_for("fix", "6.1.0-other SMP ", &[Function::returning_one("victim")]);
    assert!(matches!(plan(&guest, &kernel, &other), Err(Refusal::Vermagic { .. })));
    assert!(matches!(
        refusal(&guest, &kernel, "nobody"),
        Refusal::Function {
            cause: ResolveError::NotFound { .. },
            ..
        }
    ));
    assert!(matches!(
        refusal(&guest, &kernel, "tiny"),
        Refusal::Redirect(RedirectError::TooShort { len: 3, needed: 5, .. })
    ));
    let big = Function {
        code: vec![0x90; 2 << 20],
        ..Function::returning_one("victim")
    };
    let found = plan(&guest, &kernel, &livepatch("fix", &[big]));
    assert!(
        matches!(found, Err(Refusal::Registry(RegistryError::Full { .. }))),
        "{found:?}"
    );
    assert!(matches!(plan(&guest, &kernel, b"\x7fELF"), Err(Refusal::Module(_))));
    assert!(guest.ram.differences().is_empty());
}

#[test]
fn a_site_with_bytes_that_nobody_accounts_for_is_refused() {
    let guest = Guest::new();
    let kernel = guest.kernel();
    guest.put(guest.symbol("victim") + 4, &[0xcc]);
    let Refusal::Redirect(RedirectError::Foreign { found, .. }) = refusal(&guest, &kernel, "victim") else {
        panic!()
    };
    assert_eq!(found, "cc1f440000");
}

#[test]
fn a_body_that_the_kernel_rewrites_itself_is_refused() {
    for (number, what) in [(20, "a jump label"), (21, "a static call")] {
        let name: &'static str = if number == 20 { "function_20" } else { "function_21" };
        let guest = Guest::new();
        let kernel = guest.kernel();
        let live = kernel.live(&guest.ram);
        let record = guest_core::kernel::ftrace::record(&live, Gva(FUNCTIONS + 64 * number))
            .unwrap()
            .unwrap();
        guest.put_u64(record.flags_at.0, 1 << 31);
        let Refusal::Redirect(RedirectError::Rewritten { what: found, .. }) = refusal(&guest, &kernel, name) else {
            panic!()
        };
        assert!(found.starts_with(what), "{found}");
    }
}

#[test]
fn a_function_that_the_guests_own_livepatch_holds_is_refused() {
    let guest = Guest::new();
    let kernel = guest.kernel();
    let (patch, object, function) = (heap(0x1000), heap(0x2000), heap(0x3000));
    guest.link(guest.symbol("klp_patches"), &[patch + 32]);
    guest.link(patch + 48, &[object + 72]);
    guest.link(object + 56, &[function + 40]);
    guest.put_u64(function + 24, guest.symbol("victim"));
    guest.put_u64(patch, heap(0x800));
    guest.put(heap(0x800) + 24, b"own_fix\0");
    assert!(matches!(
        refusal(&guest, &kernel, "victim"),
        Refusal::Redirect(RedirectError::OwnLivepatch { livepatch, .. }) if livepatch == "own_fix"
    ));
}

#[test]
fn a_module_compiled_against_another_type_of_what_a_module_exports_is_refused() {
    let guest = Guest::new();
    let kernel = guest.kernel();
    // A loaded module that exports `helper_get`: value and name are at distances from themselves, 12 bytes an entry.
    let (module, symbols, crcs, name) = (heap(0x1000), heap(0x2000), heap(0x2100), heap(0x2200));
    guest.link(guest.symbol("modules"), &[module + 8]);
    guest.put(module + 24, b"helper\0");
    guest.put_u64(module + 760, symbols);
    guest.put_u64(module + 768, crcs);
    guest.put_u64(module + 776, 1);
    guest.put(symbols, &0x100_u32.to_le_bytes());
    guest.put(symbols + 4, &u32::try_from(name - (symbols + 4)).unwrap().to_le_bytes());
    guest.put(name, b"helper_get\0");
    guest.put(crcs, &0x1234_u32.to_le_bytes());
    let against = |crc| livepatch_against("fix", ("helper_get", crc), &[Function::returning_one("victim")]);
    let refused = plan(&guest, &kernel, &against(0x9999)).unwrap_err();
    assert!(
        matches!(&refused, Refusal::Version { symbol, module: 0x9999, guest: 0x1234 } if symbol == "helper_get"),
        "{refused}"
    );
    plan(&guest, &kernel, &against(0x1234)).unwrap();
    plan(
        &guest,
        &kernel,
        &livepatch_against("fix", ("nobody", 1), &[Function::returning_one("victim")]),
    )
    .unwrap();
}

#[test]
fn a_patch_is_applied_once_and_another_one_beside_it() {
    let (guest, kernel) = patched();
    assert!(matches!(
        refusal(&guest, &kernel, "schedule"),
        Refusal::OtherModule { .. }
    ));
    assert!(matches!(
        plan(&guest, &kernel, &two()),
        Err(Refusal::AlreadyApplied { id }) if id == "fix"
    ));
    let other = livepatch("other", &[Function::returning_one("vfs_read")]);
    let plan = plan(&guest, &kernel, &other).unwrap();
    assert_eq!(plan.record.order, 2);
    commit_plan(&guest, &kernel, &plan).unwrap();
    assert_eq!(registry(&guest, &kernel).entries.len(), 2);
}

#[test]
fn a_patch_whose_record_is_too_long_for_a_gap_is_laid_as_a_whole_elsewhere() {
    let guest = Guest::new();
    let kernel = guest.kernel();
    for (id, old) in [("first", "victim"), ("second", "vfs_read")] {
        let file = livepatch(id, &[Function::returning_one(old)]);
        commit_plan(&guest, &kernel, &plan(&guest, &kernel, &file).unwrap()).unwrap();
    }
    let pages = |id: &str| {
        let registry = registry(&guest, &kernel);
        let mut entries = registry.entries.iter();
        let of = |record: &Record| record.id == id;
        entries
            .find(|entry| entry.record.as_ref().is_some_and(of))
            .unwrap()
            .pages
    };
    let gap = pages("first");
    let out = revert(&kernel.live(&guest.ram), &registry(&guest, &kernel), "first").unwrap();
    commit_plan(&guest, &kernel, &out).unwrap();
    recover(&guest, &kernel);
    // text, rodata and data as before; the record has some pages more, more than those that records get at first
    for (id, chars) in [("third", 8 * 4096), ("fourth", 4096)] {
        let options = ApplyOptions {
            model: "m".repeat(chars),
            now: 7,
            in_transition: false,
        };
        let file = livepatch(id, &[Function::returning_one("victim")]);
        let live = kernel.live(&guest.ram);
        let long = apply(&live, &registry(&guest, &kernel), &file, &options).unwrap();
        commit_plan(&guest, &kernel, &long).unwrap();
        let (taken, new) = (pages(id), target(&guest, guest.symbol("victim") + 4));
        assert!(taken.first >= gap.first + gap.count && taken.count > gap.count);
        assert_eq!(Gva(new), registry(&guest, &kernel).mapped(taken.first));
        let mut code = [0; 10];
        live.read(Gva(new), &mut code).unwrap();
        assert_eq!(code.to_vec(), Function::returning_one("victim").code);
        let out = revert(&live, &registry(&guest, &kernel), id).unwrap();
        commit_plan(&guest, &kernel, &out).unwrap();
        recover(&guest, &kernel);
    }
}

#[test]
fn a_patch_taken_out_leaves_the_guest_as_it_was() {
    let guest = Guest::new();
    let kernel = guest.kernel();
    commit_plan(&guest, &kernel, &plan(&guest, &kernel, &two()).unwrap()).unwrap();
    let out = revert(&kernel.live(&guest.ram), &registry(&guest, &kernel), "fix").unwrap();
    commit_plan(&guest, &kernel, &out).unwrap();
    recover(&guest, &kernel);
    assert!(guest.ram.differences().is_empty());
}

#[test]
fn a_missing_patch_is_an_error_that_names_those_in_the_guest() {
    let (guest, kernel) = patched();
    let error = revert(&kernel.live(&guest.ram), &registry(&guest, &kernel), "fxi").unwrap_err();
    assert!(
        matches!(&error, RevertError::Unknown { applied, .. } if applied == &["fix"]),
        "{error}"
    );
}

/// A module for `victim` as `code` has it.
fn made_for(code: Pattern) -> Vec<u8> {
    let mut note = Note::new("fix");
    note.functions.push(OldCode::new("victim", 0, None, code));
    livepatch_made_for("fix", &note.to_bytes().unwrap(), &[Function::returning_one("victim")])
}

#[test]
fn a_patch_for_the_code_that_the_guest_runs_is_taken_and_for_other_code_is_refused_with_the_first_byte() {
    let guest = Guest::new();
    let kernel = guest.kernel();
    let victim = guest.symbol("victim");
    let code = guest.bytes_at(victim, 12);
    // The ftrace site may be anything.
    let mut fits = Pattern::new(&code);
    fits.mask(4..9);
    plan(&guest, &kernel, &made_for(fits)).unwrap();
    let mut other = code.clone();
    other[5] ^= 1;
    other[10] ^= 1;
    let mut other = Pattern::new(&other);
    other.mask(4..9);
    let refused = plan(&guest, &kernel, &made_for(other)).unwrap_err();
    let Refusal::OtherCode {
        function,
        offset,
        at,
        found,
        expected,
    } = refused
    else {
        panic!("{refused}")
    };
    assert_eq!((function.as_str(), offset, at), ("victim", 10, Gva(victim + 10)));
    assert_eq!((found, expected), (code[10], code[10] ^ 1));
}

#[test]
fn a_note_that_is_damaged_is_refused() {
    let guest = Guest::new();
    let file = livepatch_made_for("fix", b"no note", &[Function::returning_one("victim")]);
    let refused = plan(&guest, &guest.kernel(), &file).unwrap_err();
    assert!(matches!(refused, Refusal::Note(NoteError::Damaged { .. })), "{refused}");
}
