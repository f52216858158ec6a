//! `vmpatch build` for kernels that Debian 13 made: compiler, assembler and linker are of that release, whatever this machine has.

use std::fs;
use std::path::Path;

use e2e::own_livepatch::OwnLivepatch;
use e2e::rules::{self, Edit, KERNEL_6_12, KERNEL_7_3, Target};
use e2e::vmpatch::Vmpatch;
use e2e::{bed, kit};
use images::kernel::Kernel;

/// Builds a change, and sees its effect applied from outside and loaded by the guest itself.
fn is_built_and_works(target: Target, edits: &[Edit]) {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("gcc-14-{}", std::process::id()));
    let folder = folder.join(target.package());
    fs::create_dir_all(&folder).unwrap();
    let module = folder.join("livepatch-newer.ko");
    let diff = rules::write_diff(target, edits, &folder);
    rules::build(target, &diff, &module, &[]).expect(0);
    let module = module.display().to_string();
    let guest = bed::lend(kit::guest(Kernel::named(target.package())));
    // The namespace that the system started with can't be changed, but values are looked at first.
    let move_clock = || {
        let command = "echo monotonic 4242 0 >/proc/self/timens_offsets || true";
        guest.text(&["sh", "-c", &format!("({command}) 2>&1")]).unwrap()
    };
    let is_changed = || move_clock().contains("Invalid argument");
    assert!(move_clock().contains("Permission denied"), "{}", move_clock());
    let vmpatch = Vmpatch::on(&guest);
    let report = vmpatch.apply(&module);
    assert!(is_changed(), "{}", move_clock());
    assert_eq!(report["patches"][0]["verified"], "all", "{report}");
    vmpatch.revert_all();
    assert!(!is_changed());
    let own = OwnLivepatch::load(&guest, &module, "livepatch-newer");
    assert!(is_changed(), "{}", move_clock());
    own.unload();
    assert!(!is_changed());
    guest.discard_after_complaints(rules::ALIGNED_LOOP_WARNS);
    fs::remove_dir_all(&folder).unwrap();
}

#[test]
fn debian_13s_own_kernel_is_built_for_and_its_code_is_verified() {
    is_built_and_works(KERNEL_6_12, rules::ALIGNED_LOOP_6_12);
}

#[test]
fn debian_13s_newest_kernel_is_built_for_and_its_code_is_verified() {
    is_built_and_works(KERNEL_7_3, rules::ALIGNED_LOOP);
}
