//! Which files of a kernel `vmpatch build` takes a change to get into.

use std::fs;
use std::path::Path;

use e2e::fixes::KERNEL;
use e2e::rules::{KERNEL_6_12, KERNEL_7_2};
use e2e::vmpatch::{Answer, Vmpatch};

/// A hunk of a diff: the file, the first line of the hunk, and its lines.
type Hunk = (&'static str, usize, &'static str);

const OPEN_FLAGS: Hunk = (
    "fs/internal.h",
    127,
    " struct open_flags {\n+\tint more;\n \tint open_flag;\n \tumode_t mode;\n",
);
/// A function and a constant that one file uses; some fifty read the header.
const LIMIT: Hunk = (
    "fs/internal.h",
    127,
    "+static inline int limit_of(int a)\n+{\n+\treturn a > 100 ? 100 : a;\n+}\n+#define MORE 3\n struct open_flags {\n",
);
const SYNC: Hunk = (
    "fs/sync.c",
    237,
    "-\tif (flags & ~VALID_FLAGS)\n+\tif (limit_of(flags) & ~(VALID_FLAGS + MORE))\n",
);
const NOT_BUILT: Hunk = (
    "drivers/net/wireless/ath/ath9k/main.c",
    16,
    " \n+extern int vmpatch_more;\n #include <linux/nl80211.h>\n",
);
const MESSAGES: Hunk = (
    "ipc/util.c",
    223,
    "-\tif (next_id < 0) { /* !CHECKPOINT_RESTORE or next_id is unset */\n+\tif (next_id < -1) {\n",
);
const KVM: Hunk = (
    "virt/kvm/kvm_main.c",
    4530,
    " \tcase KVM_CAP_NR_MEMSLOTS:\n-\t\treturn KVM_USER_MEM_SLOTS;\n+\t\treturn KVM_USER_MEM_SLOTS - 1;\n \tcase KVM_CAP_DIRTY_LOG_RING:\n",
);
const VDSO: Hunk = (
    "arch/x86/entry/vdso/vclock_gettime.c",
    30,
    "-\treturn __cvdso_time(t);\n+\treturn __cvdso_time(t) + 1;\n",
);

/// No change of code, in a header that some files read.
const COMMENT: Hunk = (
    "ipc/util.h",
    1,
    "-/* SPDX-License-Identifier: GPL-2.0 */\n+/* SPDX-License-Identifier:  GPL-2.0 */\n",
);

/// Builds a diff of these hunks for the kernel that most is tried on.
fn build(name: &str, hunks: &[Hunk]) -> Answer {
    build_for(KERNEL, name, hunks)
}

fn build_for(kernel: &str, name: &str, hunks: &[Hunk]) -> Answer {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("reach-{}-{name}", std::process::id()));
    fs::create_dir_all(&folder).unwrap();
    let mut text = String::new();
    for (file, line, lines) in hunks {
        let count = |mark: char| lines.lines().filter(|line| !line.starts_with(mark)).count();
        let (old, new) = (count('+'), count('-'));
        text.push_str(&format!(
            "--- a/{file}\n+++ b/{file}\n@@ -{line},{old} +{line},{new} @@\n{lines}"
        ));
    }
    let patch = folder.join("fix.patch");
    fs::write(&patch, text).unwrap();
    let (patch, output) = (
        patch.display().to_string(),
        folder.join("reach.ko").display().to_string(),
    );
    let answer = Vmpatch::domain("none").run_bare(&["build", "--kernel", kernel, &patch, "-o", &output, "--explain"]);
    fs::remove_dir_all(&folder).unwrap();
    answer
}

#[test]
fn a_private_header_gets_into_files_of_other_folders() {
    let answer = build("private", &[OPEN_FLAGS]).expect(3);
    for function in ["do_filp_open", "io_openat2"] {
        assert!(answer.stdout.contains(function), "{answer}");
    }
    let complaint = answer.complaint();
    assert!(
        complaint.contains("io_uring/openclose.c: struct open_flags"),
        "{answer}"
    );
}

#[test]
fn files_that_use_nothing_of_a_changed_header_are_left_out() {
    let answer = build("used", &[LIMIT, SYNC]).expect(0);
    let changed = answer.stdout.lines().filter(|line| line.starts_with("  changed "));
    let changed: Vec<&str> = changed.filter_map(|line| line.split_whitespace().nth(1)).collect();
    assert_eq!(changed, ["sync_file_range"], "{answer}");
}

#[test]
fn a_file_that_the_kernel_is_not_made_of_is_left_out_with_a_warning() {
    let answer = build("both", &[NOT_BUILT, MESSAGES]).expect(0);
    assert!(answer.stderr.contains("ath9k/main.c is left out"), "{answer}");
    assert!(answer.stdout.contains("ipc_addid"), "{answer}");
    let answer = build("alone", &[NOT_BUILT]).expect(3);
    assert!(
        answer.complaint().contains("ath9k/main.c: no code of kernel"),
        "{answer}"
    );
}

#[test]
fn a_file_that_is_compiled_from_another_folder_is_built_as_there() {
    let answer = build("kvm", &[KVM]).expect(0);
    let function = "kvm_vm_ioctl_check_extension_generic";
    assert!(
        answer.stdout.contains(function) && answer.stdout.contains("[kvm]"),
        "{answer}"
    );
}

#[test]
fn a_change_of_the_vdso_is_refused_by_name() {
    let answer = build("vdso", &[VDSO]).expect(3);
    assert!(
        answer
            .complaint()
            .contains("vclock_gettime.c is changed, and compiled for the vDSO"),
        "{answer}"
    );
}

#[test]
fn a_comment_in_a_header_changes_nothing_of_kernels_whose_objects_objtool_reads_late() {
    for kernel in [KERNEL_6_12, KERNEL_7_2] {
        let answer = build_for(kernel.package(), "comment", &[COMMENT]).expect(3);
        assert!(answer.complaint().contains("changes no code and no data"), "{answer}");
    }
}
