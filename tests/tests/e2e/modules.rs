//! Patches of functions in modules that the guest has loaded, or has not loaded yet.

use std::fs;
use std::sync::LazyLock;

use e2e::bed::{self, Lent};
use e2e::ftrace::Ftrace;
use e2e::kit::{self, Modules};
use e2e::probe::{Seen, see};
use e2e::report::states;
use e2e::spoil::{Header, Spoiled};
use e2e::vmpatch::Vmpatch;
use images::build::hand_written::Applied;
use images::guest::Guest;
use images::kernel::Kernel;
use serde_json::json;

static MODULES: LazyLock<Modules> = LazyLock::new(|| Modules::of(&Kernel::CLOUD_6_1));

/// What vmpatch_target_get() says: the old one, that of the module `module`, that of `module_and_image`.
const OLD: &str = "8";
const OF_MODULE: &str = "7030";
const OF_BOTH: &str = "700";

fn guest() -> Lent {
    bed::lend(kit::guest(Kernel::CLOUD_6_1))
}

fn load_target(guest: &Guest) {
    let file = fs::read(MODULES.target()).unwrap();
    guest.push("/tmp/vmpatch_target.ko", &file, 0o644).unwrap();
    guest.text(&["insmod", "/tmp/vmpatch_target.ko"]).unwrap();
}

fn target_says(guest: &Guest) -> String {
    guest
        .text(&["cat", "/sys/module/vmpatch_target/parameters/value"])
        .unwrap()
}

/// Unloads the module; what rmmod says, where it does not.
fn unload_target(guest: &Guest) -> Result<(), String> {
    let output = guest.run(&["rmmod", "vmpatch_target"]).unwrap();
    let said = String::from_utf8_lossy(&output.stderr).trim_end().to_owned();
    if output.status.success() { Ok(()) } else { Err(said) }
}

#[test]
fn a_function_of_a_module_is_patched_and_the_module_stays_until_revert() {
    let guest = guest();
    let vmpatch = Vmpatch::on(&guest);
    let module = MODULES.applied(Applied::Module);

    let unloaded = vmpatch.run(&["check", "--json", &module]).expect(0).json();
    assert_eq!(unloaded["patches"][0]["state"], "pending");
    assert_eq!(unloaded["patches"][0]["pending"], json!(["vmpatch_target"]));

    load_target(&guest);
    assert_eq!(target_says(&guest), OLD);
    let applied = vmpatch.apply(&module);
    let function = &applied["patches"][0]["functions"][0];
    assert_eq!(
        (&function["object"], &function["name"], &function["redirect"]),
        (&json!("vmpatch_target"), &json!("vmpatch_target_get"), &json!("ftrace"))
    );
    assert_eq!(target_says(&guest), OF_MODULE);
    assert_eq!(states(&vmpatch.status()), states(&applied));

    let refused = unload_target(&guest).unwrap_err();
    assert!(refused.contains("Resource temporarily unavailable"), "{refused}");
    let modules = guest.text(&["cat", "/proc/modules"]).unwrap();
    let line = modules
        .lines()
        .find(|line| line.starts_with("vmpatch_target "))
        .unwrap();
    assert!(line.contains(" test_module, Live "), "{line}");

    vmpatch.revert_all();
    assert_eq!(target_says(&guest), OLD);
    unload_target(&guest).unwrap();
}

/// The checksum of a type in `__versions`: 8 bytes in front of the symbol's name (include/linux/module.h).
fn checksum_at(module: &Spoiled, symbol: &str) -> usize {
    let section = module.section("__versions").1;
    let name = format!("{symbol}\0");
    let entries = module.bytes()[section].chunks(64);
    let index = entries
        .into_iter()
        .position(|entry| entry[8..].starts_with(name.as_bytes()));
    index.unwrap_or_else(|| panic!("no {symbol}")) * 64
}

#[test]
fn a_module_whose_checksums_of_types_are_not_the_guests_is_refused() {
    let guest = guest();
    let vmpatch = Vmpatch::on(&guest);
    load_target(&guest);
    let good = Spoiled::of(&MODULES.applied(Applied::Module));
    let folder = std::env::temp_dir().join(format!("vmpatch-checksums-{}", std::process::id()));
    fs::create_dir_all(&folder).unwrap();
    let file = |name: &str, module: &Spoiled| {
        let path = folder.join(name);
        fs::write(&path, module.bytes()).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let other = |symbol| {
        let at = checksum_at(&good, symbol);
        good.clone().data("__versions", at, &[0xde, 0xad, 0xbe, 0xef])
    };
    // The module's own build did not know what another module exports: that symbol takes the place of another one.
    let at = checksum_at(&good, "klp_enable_patch");
    let of_module = good.clone().data("__versions", at + 8, b"vmpatch_target_exported\0");
    for (name, module, words) in [
        (
            "image.ko",
            other("sprintf"),
            "compiled against another sprintf (checksum 0xefbeadde;",
        ),
        (
            "layout.ko",
            other("module_layout"),
            "compiled against another module_layout",
        ),
        (
            "module.ko",
            of_module,
            "compiled against another vmpatch_target_exported",
        ),
        (
            "cut.ko",
            good.clone().header("__versions", Header::Size, |size| size - 8),
            "the last entry is cut off",
        ),
        (
            "wide.ko",
            good.clone().data("__versions", at + 4, &[1]),
            "more than 32 bits",
        ),
    ] {
        let file = file(name, &module);
        for command in ["check", "apply"] {
            let refused = vmpatch.run(&[command, &file]).expect(3);
            assert!(refused.complaint().contains(words), "{words:?} is not in {refused}");
        }
    }
    assert_eq!(target_says(&guest), OLD);

    // Without any there is nothing to be compared: not loaded any more, for want of SHF_ALLOC.
    let none = file(
        "none.ko",
        &good.clone().header("__versions", Header::Flags, |flags| flags & !2),
    );
    let said = "not verified: the module has no checksums of the types that it uses";
    let answer = vmpatch.run(&["check", "--json", &none]).expect(0).json();
    assert_eq!(answer["patches"][0]["checksums"], "none in module");
    assert!(answer["patches"][0]["warnings"].to_string().contains(said), "{answer}");
    let text = vmpatch.run(&["apply", &none]).expect(0);
    assert!(text.to_string().contains(said), "{text}");
    assert_eq!(target_says(&guest), OF_MODULE);
    vmpatch.revert_all();
    let answer = vmpatch
        .run(&["check", "--json", &file("good.ko", &good)])
        .expect(0)
        .json();
    assert_eq!(answer["patches"][0]["checksums"], "incomplete");
    let said = "not verified: the module has no checksum of the type of vmpatch_target_exported";
    assert!(answer["patches"][0]["warnings"].to_string().contains(said), "{answer}");
    let whole = vmpatch
        .run(&["check", "--json", &MODULES.applied(Applied::Pause)])
        .expect(0);
    assert_eq!(whole.json()["patches"][0]["checksums"], "compared");
    unload_target(&guest).unwrap();
    fs::remove_dir_all(folder).unwrap();
}

/// A kprobe holds the site, so the jump would have to stand behind it: where the module has a jump label.
#[test]
fn a_function_of_a_module_is_not_patched_over_that_modules_jump_label() {
    let guest = guest();
    let vmpatch = Vmpatch::on(&guest);
    let tracing = Ftrace::of(&guest);
    let module = MODULES.applied(Applied::ModuleBranch);
    load_target(&guest);
    tracing.probe("branch", "vmpatch_target:vmpatch_target_branch");
    let refused = vmpatch.run(&["apply", &module]).expect(3);
    let complaint = refused.complaint();
    assert!(
        complaint.contains("vmpatch_target_branch") && complaint.contains("a jump label at"),
        "{complaint}"
    );
    tracing.reset();
    let applied = vmpatch.apply(&module);
    assert_eq!(applied["patches"][0]["functions"][0]["redirect"], "ftrace");
    vmpatch.revert_all();
    unload_target(&guest).unwrap();
}

#[test]
fn an_object_that_is_not_loaded_is_pending_until_it_is() {
    let guest = guest();
    let vmpatch = Vmpatch::on(&guest);
    let folder = std::env::temp_dir().join(format!("vmpatch-pending-{}", std::process::id()));
    fs::create_dir_all(&folder).unwrap();
    fs::copy(MODULES.applied(Applied::ModuleAndImage), folder.join("both.ko")).unwrap();
    let update = || {
        vmpatch
            .run(&["--json", "--patches", folder.to_str().unwrap()])
            .expect(0)
            .json()
    };

    let first = update();
    assert_eq!(first["patches"][0]["state"], "applied");
    assert_eq!(first["patches"][0]["pending"], json!(["vmpatch_target"]));
    assert_eq!(see(&guest, "pause"), Seen::Fixed);
    assert_eq!(update()["patches"][0]["state"], "already applied");

    load_target(&guest);
    assert_eq!(target_says(&guest), OLD);
    let second = update();
    assert_eq!(second["patches"][0]["id"], "test_module_and_image:vmpatch_target");
    assert_eq!(second["patches"][0]["state"], "applied");
    assert_eq!(target_says(&guest), OF_BOTH);
    assert_eq!(update()["patches"][0]["state"], "already applied");
    let status = vmpatch.status();
    assert_eq!(status["patches"][0]["pending"], json!(null), "{status}");
    unload_target(&guest).unwrap_err();

    vmpatch.revert_all();
    assert_eq!(
        (see(&guest, "pause"), target_says(&guest).as_str()),
        (Seen::Flawed, OLD)
    );

    // Both at once, where the module is there.
    let whole = update();
    assert_eq!(whole["patches"][0]["functions"].as_array().unwrap().len(), 2);
    assert_eq!(
        (see(&guest, "pause"), target_says(&guest).as_str()),
        (Seen::Fixed, OF_BOTH)
    );
    vmpatch.revert_all();
    unload_target(&guest).unwrap();
    fs::remove_dir_all(folder).unwrap();
}
