//! What `vmpatch build` does with each kind of change, on the kernel's real source and in a guest.

use std::fs;
use std::path::{Path, PathBuf};

use e2e::own_livepatch::OwnLivepatch;
use e2e::rules::{self, Edit, KERNEL_5_10, KERNEL_6_1, KERNEL_7_2};
use e2e::vmpatch::Vmpatch;
use e2e::{bed, kit};
use images::guest::Guest;
use images::kernel::Kernel;
use serde_json::Value;

/// A folder of a test's own.
fn folder(name: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("rules-{name}-{}", std::process::id()));
    fs::create_dir_all(&folder).unwrap();
    folder
}

/// What is in the module, as `file: why name`, and what speaks against it, as `risk: place`; both sorted.
fn of_sheet(sheet: &Value) -> (Vec<String>, Vec<String>) {
    let texts = |list: &str, text: &dyn Fn(&Value) -> String| {
        let mut texts: Vec<String> = sheet[list].as_array().unwrap().iter().map(text).collect();
        texts.sort();
        texts
    };
    let word = |value: &Value, key: &str| value[key].as_str().unwrap().to_owned();
    (
        texts("items", &|item| {
            format!("{}: {} {}", word(item, "file"), word(item, "why"), word(item, "name"))
        }),
        texts("findings", &|found| {
            format!("{}: {}", word(found, "risk"), word(found, "place"))
        }),
    )
}

fn edits(parts: &[&[Edit]]) -> Vec<Edit> {
    parts.concat()
}

/// What a shell in the guest says, errors and all.
fn shell(guest: &Guest, text: &str) -> String {
    guest.text(&["sh", "-c", &format!("({text}) 2>&1 || true")]).unwrap()
}

/// Whether the guest's kernel has the changes; `first` is what the first write to drop_caches says.
fn assert_changed(guest: &Guest) {
    let version = shell(guest, "cat /proc/version");
    assert!(version.ends_with("\nmark 4"), "{version}");
    let load = shell(guest, "cat /proc/loadavg");
    assert!(load.starts_with("mark 25\nmarks 5\n"), "{load}");
    assert!(shell(guest, "cat /proc/version").ends_with("\nmark 31"));
    // The running kernel's variable was set before; the new one counts from 0 in every module.
    let write = || shell(guest, "echo 4 >/proc/sys/vm/drop_caches");
    let (first, second) = (write(), write());
    assert!(first.contains("not permitted"), "{first}");
    assert!(second.contains("busy"), "{second}");
    assert_eq!(shell(guest, MOUNT), "cpuinfo");
    assert_eq!(shell(guest, NAME_LENGTH), "77");
    assert_eq!(shell(guest, SYNC), "1");
}

fn assert_unchanged(guest: &Guest) {
    assert!(!shell(guest, "cat /proc/version /proc/loadavg").contains("mark"));
    // Sets the kernel's own variable.
    assert_eq!(shell(guest, "echo 4 >/proc/sys/vm/drop_caches"), "");
    assert_ne!(shell(guest, MOUNT), "cpuinfo");
    assert_ne!(shell(guest, NAME_LENGTH), "77");
    assert_eq!(shell(guest, SYNC), "0");
}

/// Mounts `proc` by the name that a change gives it, and looks for a file of it.
const MOUNT: &str = "mkdir -p /tmp/rules; mount -t vmpatch none /tmp/rules && ls -d /tmp/rules/cpuinfo | sed 's,.*/,,'; umount /tmp/rules 2>/dev/null";
/// How often a sync is in the log.
const SYNC: &str = "dmesg -c >/dev/null; sync; dmesg | grep -c 'vmpatch test: synced'";
/// The longest name of a file.
const NAME_LENGTH: &str = "stat -f -c %l /proc";

#[test]
fn changes_of_many_kinds_work_from_outside_and_in_the_guests_own_livepatch() {
    let folder = folder("good");
    let all = edits(&[
        rules::STATIC_LOCALS,
        rules::USED_BY_TWO_FILES,
        rules::INLINED_HELPER,
        rules::COLD_PART,
        rules::SPLIT_AND_SHORTENED,
        rules::THREE_NAMES,
        rules::NOTHING,
    ]);
    let module = folder.join("livepatch-rules.ko");
    let built = rules::build(KERNEL_6_1, &rules::write_diff(KERNEL_6_1, &all, &folder), &module, &[]).expect(0);
    let (items, findings) = of_sheet(&built.json()["sheet"]);
    let expected = [
        "fs/drop_caches.c: changed drop_caches_sysctl_handler",
        "fs/drop_caches.c: new refused.0",
        "fs/drop_caches.c: part drop_caches_sysctl_handler.cold",
        "fs/filesystems.c: changed __get_fs_type",
        "fs/filesystems.c: changed get_fs_type",
        "fs/filesystems.c: changed register_filesystem",
        "fs/filesystems.c: part get_fs_type.cold",
        "fs/proc/loadavg.c: changed loadavg_proc_show",
        "fs/proc/version.c: changed version_proc_show",
        "fs/proc/version.c: copy CSWTCH.7",
        "fs/proc/version.c: new vmpatch_mark",
        "fs/proc/version.c: new vmpatch_marks",
        "fs/statfs.c: changed vfs_statfs.part.0.isra.0",
        "fs/sync.c: changed __x64_sys_sync",
    ];
    assert_eq!(items, expected);
    assert_eq!(findings, [""; 0]);
    let module = module.display().to_string();
    let guest = bed::lend(kit::guest(Kernel::CLOUD_6_1));
    assert_unchanged(&guest);
    let vmpatch = Vmpatch::on(&guest);
    vmpatch.apply(&module);
    assert_changed(&guest);
    vmpatch.revert_all();
    assert_unchanged(&guest);
    let own = OwnLivepatch::load(&guest, &module, "livepatch-rules");
    assert_changed(&guest);
    own.unload();
    assert_unchanged(&guest);
    fs::remove_dir_all(&folder).unwrap();
}

#[test]
fn lines_in_front_of_warnings_and_another_name_for_a_function_are_nothing_to_do() {
    let folder = folder("nothing");
    let module = folder.join("never.ko");
    let answer = rules::build(
        KERNEL_6_1,
        &rules::write_diff(KERNEL_6_1, rules::NOTHING, &folder),
        &module,
        &[],
    )
    .expect(3);
    assert!(answer.to_string().contains("changes no code and no data"), "{answer}");
    assert!(!module.exists());
    fs::remove_dir_all(&folder).unwrap();
}

#[test]
fn a_changed_header_or_c_file_gets_into_every_file_that_includes_it() {
    let folder = folder("header");
    let module = folder.join("livepatch-header.ko");
    let all = edits(&[rules::HEADER, rules::INCLUDED_FILE]);
    let built = rules::build(KERNEL_6_1, &rules::write_diff(KERNEL_6_1, &all, &folder), &module, &[]).expect(0);
    let (items, findings) = of_sheet(&built.json()["sheet"]);
    let expected = [
        "fs/binfmt_elf.c: changed elf_map",
        "fs/binfmt_elf.c: part elf_map.cold",
        "fs/compat_binfmt_elf.c: changed elf_map.isra.0",
        "fs/compat_binfmt_elf.c: part elf_map.isra.0.cold",
        "fs/proc/base.c: changed dname_to_vma_addr.isra.0",
        "kernel/bpf/helpers.c: changed __bpf_strtoull",
        "kernel/sysctl.c: changed proc_get_long.constprop.0",
        "lib/bitmap.c: changed bitmap_parselist",
        "lib/bitmap.c: new bitmap_getnum",
        "lib/kstrtox.c: changed _kstrtoull",
        "lib/kstrtox.c: changed _parse_integer_limit",
        "lib/vsprintf.c: changed simple_strntoull",
    ];
    assert_eq!(items, expected);
    assert_eq!(findings, [""; 0]);
    fs::remove_dir_all(&folder).unwrap();
}

#[test]
fn what_a_patch_cannot_change_is_refused_by_name_and_what_is_allowed_goes_along_as_a_warning() {
    let folder = folder("refused");
    let module = folder.join("livepatch-allowed.ko");
    let diff = rules::write_diff(KERNEL_6_1, rules::REFUSED, &folder);
    let refused = rules::build(KERNEL_6_1, &diff, &module, &[]).expect(3);
    let (_, findings) = of_sheet(&refused.json()["sheet"]);
    let expected = [
        "changed-data: fs/drop_caches.c: stfu.0",
        "changed-data: fs/eventfd.c: eventfd_fops",
        "init: fs/proc/version.c: proc_version_init",
        "inlined: arch/x86/entry/entry_64.S",
        "inlined: arch/x86/entry/entry_64_compat.S",
        "inlined: arch/x86/entry/thunk_64.S",
        "inlined: arch/x86/kernel/head_64.S",
        "inlined: arch/x86/xen/xen-asm.S",
        "layout: fs/eventfd.c: struct eventfd_ctx",
        "removed-global: fs/drop_caches.c: sysctl_drop_caches",
        "static-key: fs/proc/version.c: vmpatch_key",
    ];
    assert_eq!(findings, expected);
    assert!(!module.exists(), "{refused}");
    let mut allow = Vec::new();
    for risk in [
        "changed-data",
        "init",
        "inlined",
        "layout",
        "removed-global",
        "static-key",
    ] {
        // All but one are not enough.
        rules::build(KERNEL_6_1, &diff, &module, &allow).expect(3);
        allow.extend(["--allow", risk]);
    }
    rules::build(KERNEL_6_1, &diff, &module, &allow).expect(0);
    let guest = bed::lend(kit::guest(Kernel::CLOUD_6_1));
    let check = Vmpatch::on(&guest)
        .run(&["check", "--json", &module.display().to_string()])
        .expect(0)
        .json();
    let warnings = check["patches"][0]["warnings"].to_string();
    for finding in &findings {
        let (risk, place) = finding.split_once(": ").unwrap();
        assert!(
            warnings.contains(&format!("built with --allow {risk}: {place}")),
            "{warnings}"
        );
    }
    fs::remove_dir_all(&folder).unwrap();
}

#[test]
fn a_kernel_of_a_newer_compiler_is_built_for_and_its_code_is_verified() {
    let folder = folder("newer");
    let module = folder.join("livepatch-newer.ko");
    let diff = rules::write_diff(KERNEL_7_2, rules::ALIGNED_LOOP, &folder);
    rules::build(KERNEL_7_2, &diff, &module, &[]).expect(0);
    let module = module.display().to_string();
    let guest = bed::lend(kit::guest(Kernel::CLOUD_7_2));
    // The namespace that the system started with can't be changed, but values are looked at first.
    let move_clock = || shell(&guest, "echo monotonic 4242 0 >/proc/self/timens_offsets");
    let is_changed = || move_clock().contains("Invalid argument");
    assert!(move_clock().contains("Permission denied"), "{}", move_clock());
    let vmpatch = Vmpatch::on(&guest);
    let report = vmpatch.apply(&module);
    assert!(is_changed(), "{}", move_clock());
    assert_eq!(report["patches"][0]["verified"], "all", "{report}");
    assert!(is_changed());
    let log = guest.text(&["dmesg"]).unwrap();
    assert_eq!(log.matches("no clock moves by 4242 s").count(), 1, "once: {log}");
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
fn a_kernel_of_an_older_compiler_is_built_for_and_its_code_is_verified() {
    let folder = folder("older");
    let module = folder.join("livepatch-older.ko");
    let diff = rules::write_diff(KERNEL_5_10, rules::USED_BY_TWO_FILES, &folder);
    rules::build(KERNEL_5_10, &diff, &module, &[]).expect(0);
    let module = module.display().to_string();
    let guest = bed::lend(kit::guest(Kernel::CLOUD_5_10));
    let see = || shell(&guest, "cat /proc/version; cat /proc/loadavg");
    let is_as_it_was = || !see().contains("mark");
    let is_changed = || {
        let seen = see();
        seen.contains("mark 4\n") && seen.contains("mark 25\nmarks 5\n")
    };
    assert!(is_as_it_was(), "{}", see());
    let vmpatch = Vmpatch::on(&guest);
    let report = vmpatch.apply(&module);
    assert!(is_changed(), "{}", see());
    assert_eq!(report["patches"][0]["verified"], "all", "{report}");
    vmpatch.revert_all();
    assert!(is_as_it_was(), "{}", see());
    let own = OwnLivepatch::load(&guest, &module, "livepatch-older");
    assert!(is_changed(), "{}", see());
    own.unload();
    assert!(is_as_it_was(), "{}", see());
    fs::remove_dir_all(&folder).unwrap();
}

#[test]
fn a_function_of_a_module_is_built_with_its_debug_prints() {
    let folder = folder("module");
    let module = folder.join("livepatch-pktgen.ko");
    let diff = rules::write_diff(KERNEL_6_1, rules::DEBUG_PRINT_IN_MODULE, &folder);
    let built = rules::build(KERNEL_6_1, &diff, &module, &[]).expect(0);
    let (items, _) = of_sheet(&built.json()["sheet"]);
    let expected = [
        "net/core/pktgen.c: changed pktgen_thread_write",
        "net/core/pktgen.c: copy __func__.100",
        "net/core/pktgen.c: copy __func__.99",
        "net/core/pktgen.c: part pktgen_thread_write.cold",
    ];
    assert_eq!(items, expected);
    let module = module.display().to_string();
    let guest = bed::lend(kit::guest(Kernel::CLOUD_6_1).module("pktgen"));
    let command = || shell(&guest, "echo nonsense >/proc/net/pktgen/kpktgend_0");
    let is_changed = || command().contains("busy");
    assert!(command().contains("Invalid argument"), "{}", command());
    let vmpatch = Vmpatch::on(&guest);
    vmpatch.apply(&module);
    assert!(is_changed(), "{}", command());
    vmpatch.revert_all();
    assert!(!is_changed());
    // Its key lies in another module than the code: the guest's kernel reads the table before livepatch has relocated it.
    let own = OwnLivepatch::load(&guest, &module, "livepatch-pktgen");
    assert!(is_changed(), "{}", command());
    own.unload();
    assert!(!is_changed());
    fs::remove_dir_all(&folder).unwrap();
}
