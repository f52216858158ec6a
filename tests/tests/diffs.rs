//! Modules of small diffs, each of which a patch builder could take for something else than it is: built, they do what the diff says,
//! applied from outside and loaded by the guest itself.

use std::fs;
use std::path::{Path, PathBuf};

use e2e::bed;
use e2e::fixes::KERNEL;
use e2e::kit;
use e2e::own_livepatch::OwnLivepatch;
use e2e::probe::{Seen, see};
use e2e::vmpatch::{Answer, Vmpatch};
use images::guest::Guest;
use images::kernel::Kernel;

/// The file of a diff in `tests/diffs`.
fn diff(name: &str) -> String {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("diffs");
    folder.join(format!("{name}.patch")).display().to_string()
}

/// Where the module of a diff goes.
fn module(name: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("diffs-{}", std::process::id()));
    fs::create_dir_all(&folder).unwrap();
    folder.join(format!("livepatch-{name}.ko"))
}

fn build(name: &str, kernel: &str, more: &[&str]) -> Answer {
    let output = module(name).display().to_string();
    let args = ["build", "--kernel", kernel, &diff(name), "-o", &output];
    Vmpatch::domain("none").run_bare(&[&args, more].concat())
}

/// Applied from outside, reverted, and loaded by the guest itself, a module has the effect that a program of that name sees.
fn works_both_ways(guest: &Guest, module: &Path, program: &str) {
    assert_eq!(see(guest, program), Seen::Flawed);
    let vmpatch = Vmpatch::on(guest);
    vmpatch.apply(&module.display().to_string());
    assert_eq!(see(guest, program), Seen::Fixed);
    vmpatch.revert_all();
    assert_eq!(see(guest, program), Seen::Flawed);
    let name = module.file_stem().unwrap().to_string_lossy();
    let own = OwnLivepatch::load(guest, &module.display().to_string(), &name);
    assert_eq!(see(guest, program), Seen::Fixed);
    own.unload();
    bed::assert_healthy(guest);
}

#[test]
fn a_loop_up_to_the_end_of_an_array_ends_there_though_a_new_variable_is_behind_it() {
    build("array-end", KERNEL, &[]).expect(0);
    let guest = bed::lend(kit::guest(Kernel::CLOUD_6_1));
    works_both_ways(&guest, &module("array-end"), "readlink");
}
