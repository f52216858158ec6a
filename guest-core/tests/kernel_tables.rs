//! What vmpatch reads of a running kernel beside symbols and types: exports, ftrace records, lists, locks, sites. In
//! sound guests, and in hostile ones.

mod common;

use common::guest::{Choice, END, FUNCTIONS, Guest, IMAGE, heap};
use guest_core::kernel::list::Walker;
use guest_core::kernel::livepatch::{Code, Held};
use guest_core::kernel::locks::Locks;
use guest_core::kernel::resolve::GuestSymbols;
use guest_core::kernel::{KernelError, exports, ftrace, livepatch, modules, sites};
use guest_core::module::{ResolveError, ResolveSymbol};
use guest_core::{Gva, Kernel};

/// Addresses that lead nowhere.
const WILD: [u64; 6] = [1, 0x7fff_ffff_fff8, 0x8000_0000_0000_0000, END, u64::MAX - 7, u64::MAX];

/// A sound guest and its kernel; what is changed in the guest afterwards is what a hostile one changes.
fn guest() -> (Guest, Kernel) {
    let guest = Guest::new();
    let kernel = guest.kernel();
    (guest, kernel)
}

fn is_unreadable<T>(result: &Result<T, KernelError>) -> bool {
    matches!(result, Err(KernelError::Unreadable { .. }))
}

/// True where an end was expected and not found.
fn has_no_end<T>(result: &Result<T, KernelError>) -> bool {
    matches!(result, Err(KernelError::Disagrees { expected, .. }) if expected == "an end")
}

/// The site of the plain function of that number.
fn site(number: u64) -> Gva {
    Gva(FUNCTIONS + 64 * number + 4)
}

#[test]
fn exports_are_found_by_name() {
    let (guest, kernel) = guest();
    let live = kernel.live(&guest.ram);
    for (name, number) in [("kfree", 2), ("schedule", 0), ("vfs_read", 1)] {
        assert_eq!(
            exports::find(&live, name).unwrap().map(|export| export.address),
            Some(Gva(FUNCTIONS + 64 * number)),
            "{name}"
        );
    }
    for name in ["", "a", "kfree_", "victim", "zzz"] {
        assert_eq!(exports::find(&live, name).unwrap(), None, "{name}");
    }
}

#[test]
fn a_wild_export_is_an_error_or_not_found() {
    let (guest, kernel) = guest();
    let at = guest.symbol("__start___ksymtab");
    for offset in [0x8000_0000_u32, 0x7fff_ffff] {
        (0..3).for_each(|entry| guest.put(at + 12 * entry + 4, &offset.to_le_bytes()));
        assert!(
            is_unreadable(&exports::find(&kernel.live(&guest.ram), "kfree")),
            "{offset:#x}"
        );
    }
    for name in ["__start___ksymtab", "__stop___ksymtab"] {
        for wild in WILD {
            let guest = Guest::with_symbols(Default::default(), |symbols| {
                symbols.iter_mut().find(|symbol| symbol.1 == name).unwrap().2 = wild;
            });
            let kernel = guest.kernel();
            guest.ram.count_from_here();
            let _ = exports::find(&kernel.live(&guest.ram), "kfree");
            assert!(guest.ram.counted().0 < 1000, "{name} {wild:#x}");
        }
    }
}

#[test]
fn an_exported_name_without_an_end_is_read_up_to_the_longest() {
    let (guest, kernel) = guest();
    let table = guest.symbol("__start___ksymtab");
    guest.put(table + 0x1000, &vec![b'k'; 0x1000]);
    guest.ram.count_from_here();
    assert_eq!(exports::find(&kernel.live(&guest.ram), "kfree").unwrap(), None);
    assert!(guest.ram.largest_read() <= 512);
}

#[test]
fn symbols_resolve_as_the_kernels_loader_and_livepatch_do_it() {
    let (guest, kernel) = guest();
    let live = kernel.live(&guest.ram);
    assert_eq!(GuestSymbols::new(&live).exported("schedule"), Ok(Gva(FUNCTIONS)));
    assert_eq!(
        GuestSymbols::new(&live).exported("victim"),
        Err(ResolveError::NotExported)
    );
    assert!(matches!(
        GuestSymbols::new(&live).exported("nobody"),
        Err(ResolveError::NotFound { .. })
    ));
    let twins = [Gva(FUNCTIONS + 64 * 4), Gva(FUNCTIONS + 64 * 5)];
    assert_eq!(GuestSymbols::new(&live).any(None, "twin", 1), Ok(twins[0]));
    assert_eq!(GuestSymbols::new(&live).any(Some("vmlinux"), "twin", 2), Ok(twins[1]));
    assert!(
        matches!(GuestSymbols::new(&live).any(None, "twin", 0), Err(ResolveError::Ambiguous { addresses, .. }) if addresses == twins)
    );
    for position in [3, u64::MAX] {
        assert!(matches!(
            GuestSymbols::new(&live).any(None, "twin", position),
            Err(ResolveError::Position { found: 2, .. })
        ));
    }
    assert_eq!(
        GuestSymbols::new(&live).any(None, "victim", 0),
        Ok(Gva(FUNCTIONS + 64 * 3))
    );
    assert!(matches!(
        GuestSymbols::new(&live).any(Some("ext4"), "victim", 0),
        Err(ResolveError::NotLoaded { .. })
    ));
}

#[test]
fn the_ftrace_record_of_a_function_is_found_in_any_group() {
    let (guest, kernel) = guest();
    let live = kernel.live(&guest.ram);
    for number in [0, 3, 699, 701, 702, 1208] {
        let record = ftrace::record(&live, Gva(FUNCTIONS + 64 * number)).unwrap().unwrap();
        assert_eq!(record.site, site(number));
        assert!(!record.is_held() && !record.is_disabled());
        let without_endbr = ftrace::record(&live, site(number)).unwrap().unwrap();
        assert_eq!(without_endbr.site, site(number));
    }
    assert_eq!(
        ftrace::record(&live, Gva(guest.symbol("notrace_victim"))).unwrap(),
        None
    );
    assert_eq!(ftrace::record(&live, Gva(IMAGE)).unwrap(), None);
    assert_eq!(ftrace::record(&live, Gva(END)).unwrap(), None);
}

#[test]
fn the_flags_of_a_record_tell_who_holds_it() {
    let (guest, kernel) = guest();
    let live = kernel.live(&guest.ram);
    let record = || ftrace::record(&live, Gva(FUNCTIONS)).unwrap().unwrap();
    let flags_at = record().flags_at.0;
    guest.put_u64(flags_at, 1 << 31 | 1);
    assert!(record().is_held() && !record().is_disabled());
    guest.put_u64(flags_at, 1 << 25);
    assert!(!record().is_held() && record().is_disabled());
}

#[test]
fn ftrace_groups_in_a_circle_end() {
    let (guest, kernel) = guest();
    let first = guest.u64_at(guest.symbol("ftrace_pages_start"));
    guest.put_u64(first + 32, first);
    guest.ram.count_from_here();
    assert!(has_no_end(&ftrace::record(&kernel.live(&guest.ram), Gva(END))));
    assert!(guest.ram.counted().0 < 4_000_000);
    guest.put_u64(first, first);
    guest.put(first + 16, &[0xff; 4]);
    assert!(ftrace::record(&kernel.live(&guest.ram), Gva(END)).is_err());
}

#[test]
fn wild_ftrace_groups_records_and_counts_are_errors() {
    for wild in WILD {
        for word in [0, 8] {
            let (guest, kernel) = guest();
            let first = guest.u64_at(guest.symbol("ftrace_pages_start"));
            guest.put_u64(first + word, wild);
            let record = ftrace::record(&kernel.live(&guest.ram), Gva(END));
            assert!(is_unreadable(&record), "{wild:#x} {word}");
        }
        let (guest, kernel) = guest();
        guest.put_u64(guest.symbol("ftrace_pages_start"), wild);
        assert!(
            is_unreadable(&ftrace::record(&kernel.live(&guest.ram), Gva(FUNCTIONS))),
            "{wild:#x}"
        );
    }
    let (guest, kernel) = guest();
    let first = guest.u64_at(guest.symbol("ftrace_pages_start"));
    guest.put(first + 16, &[0xff; 4]);
    guest.ram.count_from_here();
    let _ = ftrace::record(&kernel.live(&guest.ram), Gva(FUNCTIONS));
    assert!(guest.ram.counted().0 < 200);
}

#[test]
fn a_list_is_walked_to_its_end() {
    let (guest, kernel) = guest();
    let live = kernel.live(&guest.ram);
    let nodes = [heap(0x100), heap(0x200), heap(0x300)];
    guest.link(heap(0), &nodes);
    let elements = Walker::new(&live).list("list", Gva(heap(0)), 0x10).unwrap();
    assert_eq!(elements, nodes.map(|node| Gva(node - 0x10)));
    guest.put_u64(heap(0x300), 0);
    let elements = Walker::new(&live).hlist("list", Gva(heap(0)), 0x10).unwrap();
    assert_eq!(elements.len(), 3);
}

#[test]
fn a_list_in_a_circle_past_its_head_or_into_nowhere_is_an_error() {
    let (guest, kernel) = guest();
    let live = kernel.live(&guest.ram);
    guest.link(heap(0), &[heap(0x100), heap(0x200)]);
    guest.put_u64(heap(0x200), heap(0x100));
    assert!(has_no_end(&Walker::new(&live).list("list", Gva(heap(0)), 0)));
    guest.put_u64(heap(0x200), heap(0x200));
    assert!(has_no_end(&Walker::new(&live).hlist("list", Gva(heap(0)), 0)));
    for wild in WILD {
        guest.put_u64(heap(0x200), wild);
        assert!(
            is_unreadable(&Walker::new(&live).list("list", Gva(heap(0)), 0)),
            "{wild:#x}"
        );
    }
}

/// A patch of the guest's own on `victim`, with all lists in the heap.
fn own_livepatch(guest: &Guest) {
    let (patch, object, function) = (heap(0x1000), heap(0x2000), heap(0x3000));
    guest.link(guest.symbol("klp_patches"), &[patch + 32]);
    guest.link(patch + 48, &[object + 72]);
    guest.link(object + 56, &[function + 40]);
    guest.put_u64(function + 24, guest.symbol("victim"));
    guest.put_u64(patch, OWN_MODULE);
    guest.put(OWN_MODULE + 24, b"own_fix\0");
}

/// The `struct module` of the guest's own livepatch; its name is 24 bytes into it.
const OWN_MODULE: u64 = heap(0x800);

#[test]
fn functions_that_the_guests_own_livepatch_holds_are_told_with_the_code_that_runs() {
    let (guest, kernel) = guest();
    let held = || livepatch::held(&kernel.live(&guest.ram)).unwrap();
    assert_eq!(held(), []);
    own_livepatch(&guest);
    let expected = |code| {
        [Held {
            function: Gva(guest.symbol("victim")),
            livepatch: "own_fix".to_owned(),
            code,
        }]
    };
    let (nop, patched, transition) = (heap(0x3000) + 72, heap(0x3000) + 73, heap(0x3000) + 74);
    assert_eq!(held(), expected(Code::BehindSite), "not enabled yet");
    guest.put(patched, &[1]);
    assert_eq!(held(), expected(Code::Livepatch));
    guest.put(transition, &[1]);
    assert_eq!(held(), expected(Code::Transition));
    guest.put(transition, &[0]);
    guest.put(nop, &[1]);
    assert_eq!(held(), expected(Code::BehindSite), "the original is given back");
}

/// 300 patches that share a list of 300 objects, which share one of 300 functions: 27 million, were each counted anew.
#[test]
fn livepatches_that_share_their_lists_are_bounded_together() {
    let (guest, kernel) = guest();
    own_livepatch(&guest);
    let patches: Vec<u64> = (0..300).map(|number| heap(0x1_0000 + 0x100 * number) + 32).collect();
    guest.link(guest.symbol("klp_patches"), &patches);
    for patch in &patches {
        let objects: Vec<u64> = (0..300).map(|number| heap(0x4_0000 + 0x100 * number) + 72).collect();
        guest.link(patch + 16, &objects);
    }
    guest.ram.count_from_here();
    assert!(livepatch::held(&kernel.live(&guest.ram)).is_err());
    assert!(guest.ram.counted().0 < 500_000);
}

#[test]
fn a_wild_livepatch_list_is_an_error() {
    for wild in WILD {
        for at in [heap(0x1000) + 48, heap(0x2000) + 56, heap(0x3000) + 40] {
            let (guest, kernel) = guest();
            own_livepatch(&guest);
            guest.put_u64(at, wild);
            assert!(
                is_unreadable(&livepatch::held(&kernel.live(&guest.ram))),
                "{wild:#x} at {at:#x}"
            );
        }
    }
}

#[test]
fn each_lock_that_is_held_is_named() {
    let (guest, kernel) = guest();
    let live = kernel.live(&guest.ram);
    let locks = Locks::find(&live).unwrap();
    assert_eq!(locks.held(&live).unwrap(), None);
    for name in [
        "text_mutex",
        "ftrace_lock",
        "module_mutex",
        "klp_mutex",
        "jump_label_mutex",
        "kprobe_mutex",
    ] {
        guest.put_u64(guest.symbol(name), heap(0x40) | 1);
        assert_eq!(locks.held(&live).unwrap().unwrap().name, name);
        // Flags without an owner: somebody waits for a lock that nobody holds any more.
        guest.put_u64(guest.symbol(name), 7);
        assert_eq!(locks.held(&live).unwrap(), None, "{name}");
    }
    guest.put_u64(guest.symbol("cpu_hotplug_lock") + 64, 0xffff_ffff_0000_0000);
    assert_eq!(locks.held(&live).unwrap(), None);
    guest.put_u64(guest.symbol("cpu_hotplug_lock") + 64, 1);
    assert_eq!(locks.held(&live).unwrap().unwrap().name, "cpu_hotplug_lock");
}

#[test]
fn a_mutex_of_a_realtime_kernel_has_its_owner_in_an_rt_mutex() {
    let guest = Guest::with(Choice {
        realtime: true,
        ..Default::default()
    });
    let kernel = guest.kernel();
    let live = kernel.live(&guest.ram);
    let locks = Locks::find(&live).unwrap();
    let owner = guest.symbol("text_mutex") + 24;
    guest.put_u64(guest.symbol("text_mutex"), u64::MAX);
    assert_eq!(
        locks.held(&live).unwrap(),
        None,
        "the lock of the lock's waiters is no owner"
    );
    guest.put_u64(owner, 1);
    assert_eq!(
        locks.held(&live).unwrap(),
        None,
        "waiters, and nobody who holds it any more"
    );
    guest.put_u64(owner, heap(0x40) | 1);
    assert_eq!(locks.held(&live).unwrap().unwrap().name, "text_mutex");
}

#[test]
fn a_kernel_that_is_not_up_and_running_is_told() {
    let (guest, kernel) = guest();
    let live = kernel.live(&guest.ram);
    let locks = Locks::find(&live).unwrap();
    assert_eq!(locks.held(&live).unwrap(), None);
    // SYSTEM_FREEING_INITMEM and SYSTEM_HALT, on either side of SYSTEM_RUNNING.
    for state in [2, 4] {
        guest.put(guest.symbol("system_state"), &[state, 0, 0, 0]);
        let told = locks.held(&live).unwrap().unwrap().to_string();
        assert_eq!(
            told,
            "the guest is starting up, going down or going to sleep (system_state is not SYSTEM_RUNNING)"
        );
    }
}

#[test]
fn locks_that_cannot_be_read_are_an_error_and_text_mutex_must_be_there() {
    let guest = Guest::with_symbols(Default::default(), |symbols| {
        symbols.iter_mut().find(|symbol| symbol.1 == "klp_mutex").unwrap().2 = END;
    });
    let kernel = guest.kernel();
    let live = kernel.live(&guest.ram);
    assert!(is_unreadable(&Locks::find(&live).unwrap().held(&live)));
    let guest = Guest::with_symbols(Default::default(), |symbols| {
        symbols.retain(|symbol| symbol.1 != "text_mutex")
    });
    let kernel = guest.kernel();
    assert!(matches!(
        Locks::find(&kernel.live(&guest.ram)),
        Err(KernelError::NoSymbol("text_mutex"))
    ));
}

#[test]
fn a_lock_of_which_there_are_two_is_not_taken_for_one_that_the_kernel_lacks() {
    for name in ["klp_mutex", "cpu_hotplug_lock"] {
        let guest = Guest::with_symbols(Default::default(), |symbols| {
            let mut other = symbols.iter().find(|symbol| symbol.1 == name).unwrap().clone();
            other.2 += 0x100;
            symbols.push(other);
        });
        let kernel = guest.kernel();
        match Locks::find(&kernel.live(&guest.ram)) {
            Err(error) => assert_eq!(
                error.to_string(),
                format!("the kernel has 2 symbols {name}, and nothing tells which one is meant")
            ),
            Ok(_) => panic!("{name} is taken for absent"),
        }
    }
}

/// What is rewritten in the first bytes of a function's body.
fn in_body(guest: &Guest, kernel: &Kernel, number: u64) -> Option<String> {
    let from = site(number).wrapping_add(5);
    sites::rewritten_in(&kernel.live(&guest.ram), &(from..from.wrapping_add(5))).unwrap()
}

#[test]
fn jump_labels_static_calls_and_kprobes_in_a_range_are_told() {
    let (guest, kernel) = guest();
    assert_eq!(in_body(&guest, &kernel, 19), None);
    assert!(in_body(&guest, &kernel, 20).unwrap().starts_with("a jump label at"));
    assert!(in_body(&guest, &kernel, 21).unwrap().starts_with("a static call at"));
    let probe = heap(0x500);
    guest.put_u64(guest.symbol("kprobe_table") + 8 * 63, probe);
    guest.put_u64(probe + 40, site(22).0 + 6);
    assert!(in_body(&guest, &kernel, 22).unwrap().starts_with("a kprobe at"));
}

#[test]
fn a_site_counts_with_all_its_bytes() {
    let (guest, kernel) = guest();
    let label = FUNCTIONS + 64 * 20 + 11;
    let told = |from: u64| {
        let range = Gva(from)..Gva(from + 5);
        sites::rewritten_in(&kernel.live(&guest.ram), &range).unwrap().is_some()
    };
    assert!(!told(label - 5) && told(label - 4) && told(label + 4) && !told(label + 5));
}

#[test]
fn wild_tables_of_sites_are_errors_and_bounded() {
    for (start, stop) in [
        ("__start___jump_table", "__stop___jump_table"),
        ("__start_static_call_sites", "__stop_static_call_sites"),
    ] {
        for wild in WILD {
            for name in [start, stop] {
                let guest = Guest::with_symbols(Default::default(), |symbols| {
                    symbols.iter_mut().find(|symbol| symbol.1 == name).unwrap().2 = wild;
                });
                let kernel = guest.kernel();
                guest.ram.count_from_here();
                let _ = sites::rewritten_in(&kernel.live(&guest.ram), &(Gva(IMAGE)..Gva(IMAGE + 5)));
                assert!(guest.ram.counted().0 < 10_000 && guest.ram.largest_read() <= 16 << 20);
            }
        }
    }
}

#[test]
fn kprobes_in_a_circle_are_an_error() {
    let (guest, kernel) = guest();
    let table = guest.symbol("kprobe_table");
    guest.put_u64(heap(0x500), heap(0x500));
    (0..64).for_each(|bucket| guest.put_u64(table + 8 * bucket, heap(0x500)));
    guest.ram.count_from_here();
    let range = Gva(IMAGE)..Gva(IMAGE + 5);
    assert!(has_no_end(&sites::rewritten_in(&kernel.live(&guest.ram), &range)));
    assert!(guest.ram.counted().0 < 70_000);
}

/// A loaded module `ext4` with a symbol `victim`, and one that is only referred to.
fn loaded_module(guest: &Guest) {
    let (module, tables, symtab, strtab) = (heap(0x1000), heap(0x2000), heap(0x3000), heap(0x4000));
    guest.link(guest.symbol("modules"), &[module + 8]);
    guest.put(module + 24, b"ext4\0");
    guest.put_u64(module + 664, tables);
    for (offset, word) in [(0, symtab), (8, 3), (16, strtab)] {
        guest.put_u64(tables + offset, word);
    }
    guest.put(strtab, b"\0victim\0");
    for (index, (section, value)) in [(0_u16, 0_u64), (0, 0x1111), (1, heap(0x8000))].into_iter().enumerate() {
        let at = symtab + 24 * index as u64;
        guest.put(at, &1_u32.to_le_bytes());
        guest.put(at + 6, &section.to_le_bytes());
        guest.put_u64(at + 8, value);
    }
}

#[test]
fn symbols_of_loaded_modules_are_found() {
    let (guest, kernel) = guest();
    loaded_module(&guest);
    let live = kernel.live(&guest.ram);
    assert_eq!(
        GuestSymbols::new(&live).any(Some("ext4"), "victim", 0),
        Ok(Gva(heap(0x8000)))
    );
    assert!(matches!(
        GuestSymbols::new(&live).any(Some("ext4"), "victi", 0),
        Err(ResolveError::NotFound { .. })
    ));
    assert!(matches!(
        GuestSymbols::new(&live).any(Some("xfs"), "victim", 0),
        Err(ResolveError::NotLoaded { .. })
    ));
}

#[test]
fn wild_modules_are_errors_and_bounded() {
    for wild in WILD {
        for at in [
            heap(0x1000) + 8,
            heap(0x1000) + 288,
            heap(0x2000),
            heap(0x2000) + 8,
            heap(0x2000) + 16,
        ] {
            let (guest, kernel) = guest();
            loaded_module(&guest);
            guest.put_u64(at, wild);
            guest.ram.count_from_here();
            let live = kernel.live(&guest.ram);
            let found = modules::all(&live).and_then(|all| match all.first() {
                Some(module) => modules::symbols(&live, module),
                None => Ok(Vec::new()),
            });
            assert!(
                found.is_err() || found.unwrap().len() <= 1 << 18,
                "{wild:#x} at {at:#x}"
            );
            assert!(
                guest.ram.counted().0 < 1_000_000 && guest.ram.largest_read() <= 8 << 20,
                "{wild:#x} at {at:#x}"
            );
        }
    }
}
