//! Patches that hand their own addresses to the guest: a revert puts the old functions back and keeps the code.

mod common;

use common::guest::{Guest, heap};
use common::machine::Vm;
use common::module::{Function, livepatch};
use common::patch::{OPTIONS, commit_plan, plan, recover, registry, target};
use guest_core::commit::{commit, stage};
use guest_core::kernel::modules;
use guest_core::plan::{Plan, Refusal, RevertError, recovery, revert};
use guest_core::registry::{Record, State};
use guest_core::{Gva, Kernel, VirtMemory};

/// A module whose function gives its own address away, by name: `lea new_victim(%rip),%rax; ret`.
fn file(name: &str) -> Vec<u8> {
    livepatch(
        name,
        &[Function {
            code: vec![0x48, 0x8d, 0x05, 0xf9, 0xff, 0xff, 0xff, 0xc3],
            ..Function::returning_one("victim")
        }],
    )
}

fn apply(guest: &Guest, kernel: &Kernel, file: &[u8]) -> Record {
    let plan = plan(guest, kernel, file).unwrap();
    commit_plan(guest, kernel, &plan).unwrap();
    plan.record
}

fn plan_revert(guest: &Guest, kernel: &Kernel) -> Result<Plan, RevertError> {
    revert(&kernel.live(&guest.ram), &registry(guest, kernel), "fix")
}

fn take_out(guest: &Guest, kernel: &Kernel) {
    commit_plan(guest, kernel, &plan_revert(guest, kernel).unwrap()).unwrap();
    recover(guest, kernel);
}

fn names(guest: &Guest, kernel: &Kernel) -> Vec<String> {
    let all = modules::all(&kernel.live(&guest.ram)).unwrap();
    all.into_iter().map(|module| module.name).collect()
}

fn states(guest: &Guest, kernel: &Kernel) -> Vec<State> {
    registry(guest, kernel)
        .entries
        .iter()
        .map(|entry| entry.state)
        .collect()
}

#[test]
fn code_whose_address_the_guest_may_have_stays_and_is_known_by_another_name() {
    let guest = Guest::new();
    let kernel = guest.kernel();
    let site = guest.symbol("victim") + 4;
    let original = guest.bytes_at(site, 5);
    let record = apply(&guest, &kernel, &file("fix"));
    assert_eq!(record.escapes, Some(vec!["new_victim".to_owned()]));
    take_out(&guest, &kernel);
    assert_eq!(guest.bytes_at(site, 5), original);
    assert_eq!(states(&guest, &kernel), [State::Kept]);
    assert_eq!(names(&guest, &kernel), ["reverted_1_fix"]);
    let live = kernel.live(&guest.ram);
    let mut code = [0; 8];
    live.read(Gva(record.text.start), &mut code).unwrap();
    assert_eq!(
        code.to_vec(),
        file("fix").windows(8).find(|part| *part == code).unwrap()
    );
    let module = modules::containing(&live, Gva(record.text.start)).unwrap();
    assert_eq!(
        module.map(|module| module.at),
        record.registration.map(|known| Gva(known.module))
    );
    assert!(matches!(plan_revert(&guest, &kernel), Err(RevertError::Unknown { applied, .. }) if applied.is_empty()));
}

#[test]
fn a_patch_whose_code_was_kept_comes_back_in_its_place() {
    let guest = Guest::new();
    let kernel = guest.kernel();
    let first = apply(&guest, &kernel, &file("fix"));
    let counter = first.data.start;
    let at = registry(&guest, &kernel);
    let counter = counter - at.alias.0 + at.base.0;
    take_out(&guest, &kernel);
    guest.ram.put_u64(counter, 77);
    for _ in 0..5 {
        let again = apply(&guest, &kernel, &file("fix"));
        assert_eq!(again, first);
        assert_eq!(target(&guest, guest.symbol("victim") + 4), first.functions[0].new);
        assert_eq!(
            (states(&guest, &kernel), names(&guest, &kernel)),
            (vec![State::Applied], vec!["fix".to_owned()])
        );
        assert_eq!(guest.ram.u64_at(counter), 77, "variables keep their values");
        take_out(&guest, &kernel);
        assert_eq!(states(&guest, &kernel), [State::Kept]);
    }
}

#[test]
fn another_patch_of_the_name_or_of_the_function_is_applied_beside_kept_code() {
    let guest = Guest::new();
    let kernel = guest.kernel();
    apply(&guest, &kernel, &file("fix"));
    take_out(&guest, &kernel);
    let other = apply(&guest, &kernel, &livepatch("fix", &[Function::returning_one("victim")]));
    assert_eq!((other.order, other.escapes), (2, Some(Vec::new())));
    assert_eq!(names(&guest, &kernel), ["fix", "reverted_1_fix"]);
    // The kept one can't come back meanwhile.
    let refused = plan(&guest, &kernel, &file("fix")).unwrap_err();
    assert!(matches!(refused, Refusal::OtherModule { .. }), "{refused}");
    take_out(&guest, &kernel);
    assert_eq!(
        (states(&guest, &kernel), names(&guest, &kernel)),
        (vec![State::Kept], vec!["reverted_1_fix".to_owned()])
    );
}

/// The jump must go elsewhere then, which the record does not say: a new copy is applied, and the old one stays kept.
#[test]
fn a_function_that_is_traced_meanwhile_gets_a_new_copy() {
    let guest = Guest::new();
    let kernel = guest.kernel();
    apply(&guest, &kernel, &file("fix"));
    take_out(&guest, &kernel);
    let site = guest.symbol("victim") + 4;
    let record = guest_core::kernel::ftrace::record(&kernel.live(&guest.ram), Gva(site))
        .unwrap()
        .unwrap();
    guest.put_u64(record.flags_at.0, 1 << 31 | 1);
    guest.put(site, &[0xe8, 1, 2, 3, 4]);
    apply(&guest, &kernel, &file("fix"));
    let mut found = states(&guest, &kernel);
    found.sort_by_key(|state| *state as u64);
    assert_eq!(found, [State::Applied, State::Kept]);
}

/// vmpatch and its supervisor are killed after each change of bringing a patch back.
#[test]
fn a_patch_that_was_being_brought_back_is_kept_code_again() {
    let sound = Guest::new();
    let kernel = sound.kernel();
    apply(&sound, &kernel, &file("fix"));
    take_out(&sound, &kernel);
    let site = sound.symbol("victim") + 4;
    let original = sound.bytes_at(site, 5);
    let back = plan(&sound, &kernel, &file("fix")).unwrap();
    let (_, unfinished) = back.atomic.split_last().unwrap();
    for made in 0..=unfinished.len() {
        let guest = sound.clone();
        let live = kernel.live(&guest.ram);
        stage(&live, &back.staged).unwrap();
        stage(&live, &unfinished[..made]).unwrap();
        assert_eq!(states(&guest, &kernel), [State::Reapplying]);
        recover(&guest, &kernel);
        assert!(recovery(&live, &registry(&guest, &kernel)).unwrap().is_none());
        assert_eq!(states(&guest, &kernel), [State::Kept], "{made}");
        assert_eq!(names(&guest, &kernel), ["reverted_1_fix"], "{made}");
        assert_eq!(guest.bytes_at(site, 5), original, "{made}");
        apply(&guest, &kernel, &file("fix"));
    }
}

/// vmpatch and its supervisor are killed in the pause of a first apply, and the guest is resumed: with a jump in place it may have
/// run the new code.
#[test]
fn code_that_may_have_run_before_a_recovery_is_kept() {
    let sound = Guest::new();
    let kernel = sound.kernel();
    let first = plan(&sound, &kernel, &file("fix")).unwrap();
    let (_, unfinished) = first.atomic.split_last().unwrap();
    let site = sound.symbol("victim") + 4;
    let original = sound.bytes_at(site, 5);
    let mut kept = 0;
    for made in 0..=unfinished.len() {
        let guest = sound.clone();
        let live = kernel.live(&guest.ram);
        stage(&live, &first.staged).unwrap();
        stage(&live, &unfinished[..made]).unwrap();
        let has_jump = guest.bytes_at(site, 1) == [0xe9];
        recover(&guest, &kernel);
        assert_eq!(guest.bytes_at(site, 5), original, "{made}");
        match has_jump {
            true => {
                kept += 1;
                assert_eq!(states(&guest, &kernel), [State::Kept], "{made}");
                assert_eq!(names(&guest, &kernel), ["reverted_1_fix"], "{made}");
            }
            false => assert!(guest.ram.differences().is_empty(), "{made}"),
        }
    }
    assert!(kept > 0);
}

/// Killed with the supervisor in the pause of the revert: the next revert does the rest.
#[test]
fn a_revert_that_was_cut_off_is_done_by_the_next() {
    let sound = Guest::new();
    let kernel = sound.kernel();
    apply(&sound, &kernel, &file("fix"));
    let out = plan_revert(&sound, &kernel).unwrap();
    let (_, unfinished) = out.atomic.split_last().unwrap();
    for made in 0..=unfinished.len() {
        let guest = sound.clone();
        stage(&kernel.live(&guest.ram), &unfinished[..made]).unwrap();
        recover(&guest, &kernel);
        take_out(&guest, &kernel);
        assert_eq!(
            (states(&guest, &kernel), names(&guest, &kernel)),
            (vec![State::Kept], vec!["reverted_1_fix".to_owned()])
        );
    }
}

#[test]
fn references_and_probes_hold_up_only_code_that_would_be_wiped() {
    let guest = Guest::new();
    let kernel = guest.kernel();
    let record = apply(&guest, &kernel, &file("fix"));
    let probe = heap(0x500);
    guest.put_u64(guest.symbol("kprobe_table"), probe);
    guest.put_u64(probe + 40, record.text.start + 4);
    take_out(&guest, &kernel);
    assert_eq!(states(&guest, &kernel), [State::Kept]);
}

/// An older vmpatch has not written down what escapes.
#[test]
fn a_record_that_does_not_say_keeps_the_code() {
    let guest = Guest::new();
    let kernel = guest.kernel();
    let mut record = apply(&guest, &kernel, &livepatch("fix", &[Function::returning_one("victim")]));
    assert!(!record.must_stay());
    record.escapes = None;
    assert!(record.must_stay());
    let bytes = record.to_bytes().unwrap();
    assert_eq!(Record::from_bytes(&bytes).unwrap(), record);
}

/// A thread or timer of the patch's own may run for ever in what the patch has brought along.
#[test]
fn of_kept_code_only_the_replacements_must_be_on_no_stack() {
    let guest = Guest::new();
    let kernel = guest.kernel();
    let record = apply(&guest, &kernel, &file("fix"));
    let out = plan_revert(&guest, &kernel).unwrap();
    let [replaced] = out.must_be_quiescent.as_slice() else {
        panic!()
    };
    assert_eq!(
        (replaced.name.as_str(), replaced.code.start.0),
        ("new_victim", record.functions[0].new)
    );
    let mut vm = Vm::new(&guest);
    vm.vcpus[0].rip = record.functions[0].new;
    assert!(commit(&kernel.live(&guest.ram), &mut vm, &out, &OPTIONS).is_err());
}
