//! Patches that use `THIS_MODULE`: it is the `struct module` that the guest has of the patch.

mod common;

use common::guest::Guest;
use common::module::{Function, livepatch};
use common::patch::{commit_plan, plan, recover, registry};
use guest_core::commit::stage;
use guest_core::plan::Refusal;
use guest_core::registry::State;
use guest_core::{Gva, VirtMemory};

/// Offsets in the fixture's `struct module`.
const NAME: u64 = 24;
const EXTABLE: u64 = 88;
const REFERENCES: u64 = 736;

/// mov $__this_module+further,%rax; jmp `calls`, or ret
fn file(further: u64, calls: Option<&'static str>) -> Vec<u8> {
    let end: &[u8] = if calls.is_some() { &[0xe9, 0, 0, 0, 0] } else { &[0xc3] };
    livepatch(
        "fix",
        &[Function {
            code: [&[0x48, 0xc7, 0xc0, 0, 0, 0, 0][..], end].concat(),
            this_module: Some((3, further)),
            calls: calls.map(|name| (8, name)),
            ..Function::returning_one("victim")
        }],
    )
}

#[test]
fn the_address_is_that_of_the_guests_own_structure() {
    let guest = Guest::new();
    let kernel = guest.kernel();
    for further in [0, NAME, REFERENCES] {
        let plan = plan(&guest, &kernel, &file(further, None)).unwrap();
        let guest = guest.clone();
        commit_plan(&guest, &kernel, &plan).unwrap();
        let live = kernel.live(&guest.ram);
        let mut immediate = [0; 4];
        live.read(Gva(plan.record.functions[0].new + 3), &mut immediate)
            .unwrap();
        let module = plan.record.registration.unwrap().module;
        assert_eq!(
            i64::from(i32::from_le_bytes(immediate)),
            (module + further).cast_signed()
        );
        if further == NAME {
            let mut name = [0; 4];
            live.read(Gva(module + NAME), &mut name).unwrap();
            assert_eq!(&name, b"fix\0");
        }
    }
}

#[test]
fn a_part_of_it_that_nobody_has_filled_is_refused_by_its_place() {
    let guest = Guest::new();
    let refused = plan(&guest, &guest.kernel(), &file(EXTABLE, None)).unwrap_err();
    assert!(
        matches!(&refused, Refusal::ThisModule { at, offset: Some(EXTABLE) } if at == ".text+0x3"),
        "{refused}"
    );
}

#[test]
fn a_driver_is_refused_as_it_is_linked_with_its_module_in_sysfs() {
    let guest = Guest::new();
    for function in ["__pci_register_driver", "__root_device_register"] {
        let refused = plan(&guest, &guest.kernel(), &file(0, Some(function))).unwrap_err();
        assert!(
            matches!(&refused, Refusal::InSysfs { function: found } if found == function),
            "{refused}"
        );
    }
    let other = plan(&guest, &guest.kernel(), &file(0, Some("driver_unregister"))).unwrap_err();
    assert!(matches!(other, Refusal::Link(_)), "{other}");
}

/// vmpatch and its supervisor are killed in the pause of an apply, the guest is resumed, and the new code takes a reference.
#[test]
fn code_that_holds_a_reference_to_its_module_is_kept_by_a_recovery() {
    let guest = Guest::new();
    let kernel = guest.kernel();
    let plan = plan(&guest, &kernel, &livepatch("fix", &[Function::returning_one("victim")])).unwrap();
    assert!(!plan.record.must_stay());
    let (_, unfinished) = plan.atomic.split_last().unwrap();
    for (taken, state) in [(0, None), (1, Some(State::Kept))] {
        let guest = guest.clone();
        let live = kernel.live(&guest.ram);
        stage(&live, &plan.staged).unwrap();
        stage(&live, unfinished).unwrap();
        let module = plan.record.registration.as_ref().unwrap().module + REFERENCES;
        let at = kernel.space.translate(&guest.ram, Gva(module)).unwrap().gpa;
        guest.ram.put_u64(at.0, guest.ram.u64_at(at.0) + taken);
        recover(&guest, &kernel);
        let states = registry(&guest, &kernel).entries.iter().map(|entry| entry.state).next();
        assert_eq!(states, state);
    }
}
