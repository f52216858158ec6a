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
use images::guest::{Guest, GuestConfig};
use images::kernel::Kernel;
use images::modules;
use serde_json::json;

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

/// The modules that algif_hash needs and itself, in the guest's folder, in the order of loading.
fn with_hash_modules(config: GuestConfig) -> (GuestConfig, Vec<String>) {
    let files = Kernel::CLOUD_6_1.fetch().unwrap();
    let folder = module("x").parent().unwrap().to_owned();
    let mut names = Vec::new();
    let mut config = config;
    for module in modules::with_dependencies(&files, &["algif_hash"]).unwrap() {
        let file = folder.join(format!("{}.ko", module.name));
        fs::write(&file, &module.bytes).unwrap();
        config = config.file(&format!("/opt/{}.ko", module.name), &file);
        names.push(module.name);
    }
    (config, names)
}

#[test]
fn a_part_for_a_module_is_pending_without_that_module_and_what_it_imports() {
    build("two-objects", KERNEL, &[]).expect(0);
    let (config, names) = with_hash_modules(kit::guest(Kernel::CLOUD_6_1));
    let guest = bed::lend(config);
    let load = || {
        for name in &names {
            guest.text(&["insmod", &format!("/opt/{name}.ko")]).unwrap();
        }
    };
    let unload = || {
        for name in names.iter().rev() {
            guest.text(&["rmmod", name]).unwrap();
        }
    };
    let vmpatch = Vmpatch::on(&guest);
    let file = module("two-objects");
    let folder = file.with_extension("d");
    fs::create_dir_all(&folder).unwrap();
    fs::copy(&file, folder.join(file.file_name().unwrap())).unwrap();
    let update = || {
        let answer = vmpatch.run(&["--json", "--patches", folder.to_str().unwrap()]);
        answer.expect(0).json()
    };
    let first = update();
    assert_eq!(first["patches"][0]["state"], "applied");
    assert_eq!(first["patches"][0]["pending"], json!(["algif_hash"]));
    assert_eq!(see(&guest, "readlink"), Seen::Fixed);

    load();
    assert_eq!(see(&guest, "hash"), Seen::Flawed);
    let second = update();
    assert_eq!(second["patches"][0]["state"], "applied", "{second}");
    assert_eq!(second["patches"][0]["functions"][0]["object"], "algif_hash");
    assert_eq!(see(&guest, "hash"), Seen::Fixed);
    vmpatch.revert_all();
    assert_eq!(
        (see(&guest, "hash"), see(&guest, "readlink")),
        (Seen::Flawed, Seen::Flawed)
    );
    unload();

    let own = OwnLivepatch::load(&guest, &file.display().to_string(), "livepatch-two-objects");
    assert_eq!(see(&guest, "readlink"), Seen::Fixed);
    load();
    assert_eq!(see(&guest, "hash"), Seen::Fixed);
    own.unload();
    unload();
}

/// The code of such a warning refers to its own row of the table since 6.19; functions before it have rows, too.
#[test]
fn each_warning_of_a_changed_function_says_its_own_text() {
    const KERNEL_7_2: &str = "linux-image-7.2.13+deb14-cloud-amd64=7.2.13-1";
    build("warns", KERNEL_7_2, &[]).expect(0);
    let guest = bed::lend(kit::guest(Kernel::CLOUD_7_2));
    let module = module("warns").display().to_string();
    let said = |times: usize| {
        assert_eq!(see(&guest, "readlink"), Seen::Fixed);
        let log = guest.text(&["dmesg"]).unwrap();
        for text in ["vmpatch test: first, 77", "vmpatch test: second, a text"] {
            assert_eq!(log.matches(text).count(), times, "{text}: {log}");
        }
        let heads: Vec<&str> = log.lines().filter(|line| line.contains("WARNING: ")).collect();
        assert_eq!(heads.len(), 2 * times, "{heads:?}");
        assert!(heads.iter().all(|head| head.contains("vfs_readlink+0x")), "{heads:?}");
    };
    let vmpatch = Vmpatch::on(&guest);
    vmpatch.apply(&module);
    said(1);
    vmpatch.revert_all();
    assert_eq!(see(&guest, "readlink"), Seen::Flawed);
    let own = OwnLivepatch::load(&guest, &module, "livepatch-warns");
    said(2);
    own.unload();
    guest.discard_after_complaints("fs/namei.c:");
}

#[test]
fn what_would_run_at_load_is_refused_by_name() {
    let answer = build("load", KERNEL, &["--json"]).expect(3);
    let findings = answer.json()["sheet"]["findings"].clone();
    let places: Vec<&str> = findings
        .as_array()
        .unwrap()
        .iter()
        .filter_map(|finding| finding["place"].as_str())
        .collect();
    for name in [
        "__param_vmpatch_limit",
        "vmpatch_more",
        "vmpatch_start",
        "vmpatch_before",
        "vmpatch_callback",
    ] {
        assert!(
            places.contains(&&*format!("kernel/kcmp.c: {name}")),
            "no {name}: {places:?}"
        );
        assert!(answer.complaint().contains(name), "no {name}: {answer}");
    }
    assert!(!module("load").exists());
}

#[test]
fn a_default_that_the_kernel_has_elsewhere_is_refused_by_name() {
    let answer = build("override", KERNEL, &[]).expect(3);
    assert!(
        answer
            .complaint()
            .contains("the kernel's arch_smt_update is another file's"),
        "{answer}"
    );
}
