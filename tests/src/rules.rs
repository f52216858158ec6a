//! Small changes of our own to the kernel's source, each of which shows what `vmpatch build` does with one kind of change. Several
//! go into one diff, so that few files are compiled.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use patch_build::cache::Cache;
use patch_build::facts::Config;
use patch_build::source::package;

use crate::fixes;
use crate::vmpatch::{Answer, Vmpatch};

/// A kernel to build for: the package that it comes in, and the one with its source.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    package: &'static str,
    source: &'static str,
}

/// The kernel that most is tried on.
pub const KERNEL_6_1: Target = Target {
    package: fixes::KERNEL,
    source: fixes::FROM,
};
/// One of an older compiler, which is taken out of its package.
pub const KERNEL_5_10: Target = Target {
    package: "linux-image-5.10.0-46-cloud-amd64=5.10.262-1",
    source: "linux-source-5.10=5.10.262-1",
};
/// One of a newer compiler, which is taken out of its package.
pub const KERNEL_7_2: Target = Target {
    package: "linux-image-7.2.13+deb14-cloud-amd64=7.2.13-1",
    source: "linux-source-7.2=7.2.13-1",
};
/// One of Debian 13, whose compiler asks for the assembler of that release.
pub const KERNEL_6_12: Target = Target {
    package: "linux-image-6.12.117+deb13-cloud-amd64=6.12.117-1",
    source: "linux-source-6.12=6.12.117-1",
};
/// The newest, made with the same compiler.
pub const KERNEL_7_3: Target = Target {
    package: "linux-image-7.3.4+deb13-cloud-amd64=7.3.4-1~bpo13+1",
    source: "linux-source-7.3=7.3.4-1~bpo13+1",
};

impl Target {
    /// Its package, as `NAME=VERSION`.
    pub const fn package(&self) -> &'static str {
        self.package
    }
}

/// A change: in the file, this text becomes that.
pub type Edit = (&'static str, &'static str, &'static str);

/// A static local that stays the running one, and a new one beside it: writing fails where the old one is set, the first time with
/// EPERM, then with EBUSY.
pub const STATIC_LOCALS: &[Edit] = &[(
    "fs/drop_caches.c",
    "\t\tstatic int stfu;\n",
    "\t\tstatic int stfu;\n\t\tstatic int refused;\n\n\t\tif (stfu)\n\t\t\treturn refused++ ? -EBUSY : -EPERM;\n",
)];

/// A new function and a new variable, used by two files; in the function a new text, and a choice that becomes a table of numbers.
pub const USED_BY_TWO_FILES: &[Edit] = &[
    (
        "fs/proc/version.c",
        "static int version_proc_show",
        "int vmpatch_marks = 3;\nvoid vmpatch_mark(struct seq_file *m);\n\
         noinline void vmpatch_mark(struct seq_file *m)\n{\n\tint shown = 0;\n\n\tswitch (vmpatch_marks++ % 5) {\n\
         \tcase 0: shown = 31; break;\n\tcase 1: shown = 7; break;\n\tcase 2: shown = 19; break;\n\
         \tcase 3: shown = 4; break;\n\tcase 4: shown = 25; break;\n\t}\n\
         \tseq_printf(m, \"mark %d\\n\", shown);\n}\n\nstatic int version_proc_show",
    ),
    (
        "fs/proc/version.c",
        "\t\tutsname()->version);\n",
        "\t\tutsname()->version);\n\tvmpatch_mark(m);\n",
    ),
    (
        "fs/proc/loadavg.c",
        "static int loadavg_proc_show",
        "extern int vmpatch_marks;\nvoid vmpatch_mark(struct seq_file *m);\n\nstatic int loadavg_proc_show",
    ),
    (
        "fs/proc/loadavg.c",
        "\tget_avenrun(avnrun, FIXED_1/200, 0);\n",
        "\tget_avenrun(avnrun, FIXED_1/200, 0);\n\tvmpatch_mark(m);\n\tseq_printf(m, \"marks %d\\n\", vmpatch_marks);\n",
    ),
];

/// A helper that is inlined wherever it is used: `vmpatch` is another name of the file system `proc`.
pub const INLINED_HELPER: &[Edit] = &[
    (
        "fs/filesystems.c",
        "static struct file_system_type **find_filesystem",
        "static __always_inline struct file_system_type **find_filesystem",
    ),
    (
        "fs/filesystems.c",
        "\tstruct file_system_type **p;\n\tfor (p = &file_systems;",
        "\tstruct file_system_type **p;\n\n\tif (len == 7 && strncmp(name, \"vmpatch\", 7) == 0) {\n\t\tname = \"proc\";\n\t\tlen = 4;\n\t}\n\
         \tfor (p = &file_systems;",
    ),
];

/// The part of a function that is hardly ever run, and nothing else of it.
pub const COLD_PART: &[Edit] = &[(
    "fs/filesystems.c",
    "succeeded, but still no fs?",
    "succeeded, but there is no such file system",
)];

/// A function of which the compiler makes one without an argument, and splits a part off: files have names of 77 letters.
pub const SPLIT_AND_SHORTENED: &[Edit] = &[(
    "fs/statfs.c",
    "\tif (!error)\n\t\tbuf->f_flags = calculate_f_flags(path->mnt);\n",
    "\tif (!error) {\n\t\tbuf->f_flags = calculate_f_flags(path->mnt);\n\t\tbuf->f_namelen = 77;\n\t}\n",
)];

/// A system call without arguments, a function of three names: sync says so in the log.
pub const THREE_NAMES: &[Edit] = &[(
    "fs/sync.c",
    "\tksys_sync();\n",
    "\tksys_sync();\n\tpr_info(\"vmpatch test: synced\\n\");\n",
)];

/// A clock that can't be moved by 4242 seconds, with a warning at the first try, in a function whose loop gcc-16 aligns to more than
/// the function itself.
pub const ALIGNED_LOOP: &[Edit] = &[(
    "kernel/time/namespace.c",
    "off->val.tv_nsec >= NSEC_PER_SEC)\n",
    "off->val.tv_nsec >= NSEC_PER_SEC ||\n\t\t    WARN_ONCE(off->val.tv_sec == 4242, \"no clock moves by %lld s\\n\", off->val.tv_sec))\n",
)];
/// The same as 6.12 has it.
pub const ALIGNED_LOOP_6_12: &[Edit] = &[(
    "kernel/time/namespace.c",
    "off->val.tv_nsec >= NSEC_PER_SEC) {\n",
    "off->val.tv_nsec >= NSEC_PER_SEC ||\n\t\t    WARN_ONCE(off->val.tv_sec == 4242, \"no clock moves by %lld s\\n\", off->val.tv_sec)) {\n",
)];
/// Where it warns.
pub const ALIGNED_LOOP_WARNS: &str = "kernel/time/namespace.c:";

/// A function of a module with a debug print, whose static key is the module's own: an unknown command is "busy", no longer "invalid".
pub const DEBUG_PRINT_IN_MODULE: &[Edit] = &[(
    "net/core/pktgen.c",
    "\t\tgoto out;\n\t}\n\n\tret = -EINVAL;\nout:\n",
    "\t\tgoto out;\n\t}\n\n\tret = -EBUSY;\nout:\n",
)];

/// Lines in front of warnings, and another name for a function.
pub const NOTHING: &[Edit] = &[
    ("kernel/ucount.c", "#include", "/*\n * Three more lines.\n */\n#include"),
    (
        "fs/proc/softirqs.c",
        "static int show_softirqs",
        "static int show_all_softirqs",
    ),
    ("fs/proc/softirqs.c", "NULL, show_softirqs", "NULL, show_all_softirqs"),
];

/// A bit that files of four folders use.
pub const HEADER: &[Edit] = &[("lib/kstrtox.h", "(1U << 31)", "(1U << 30)")];

/// A file that another one includes, which has the same functions for programs of 32 bits.
pub const INCLUDED_FILE: &[Edit] = &[(
    "fs/binfmt_elf.c",
    "\tsize = ELF_PAGEALIGN(size);\n",
    "\tsize = ELF_PAGEALIGN(size);\n\tif (size > TASK_SIZE)\n\t\treturn -ENOMEM;\n",
)];

/// A function that has run, a new static key, a variable of the kernel that is gone, one of another type, constant data, and a
/// structure that exists already; and a header of assembly, which is not compared.
pub const REFUSED: &[Edit] = &[
    (
        "fs/proc/version.c",
        "create_single(\"version\"",
        "create_single(\"versions\"",
    ),
    (
        "fs/proc/version.c",
        "static int version_proc_show",
        "static DEFINE_STATIC_KEY_FALSE(vmpatch_key);\n\nstatic int version_proc_show",
    ),
    (
        "fs/proc/version.c",
        "\treturn 0;\n}\n\nstatic int __init",
        "\tif (static_branch_unlikely(&vmpatch_key))\n\t\tseq_puts(m, \"keyed\\n\");\n\treturn 0;\n}\n\nstatic int __init",
    ),
    (
        "arch/x86/entry/calling.h",
        "#include <linux/jump_label.h>",
        "#include <linux/jump_label.h>\n.macro VMPATCH\n.endm",
    ),
    ("fs/drop_caches.c", "int sysctl_drop_caches;\n", ""),
    (
        "fs/drop_caches.c",
        "\t\tstatic int stfu;\n",
        "\t\tstatic unsigned int stfu;\n",
    ),
    ("fs/eventfd.c", ".llseek\t\t= noop_llseek", ".llseek\t\t= no_llseek"),
    (
        "fs/eventfd.c",
        "\tunsigned int flags;\n\tint id;\n};",
        "\tunsigned int flags;\n\tint id;\n\tlong reads;\n};",
    ),
    (
        "fs/eventfd.c",
        "\teventfd_ctx_do_read(ctx, &ucnt);\n",
        "\teventfd_ctx_do_read(ctx, &ucnt);\n\tctx->reads++;\n",
    ),
];

/// A new inline function of a private header, which some forty files read, and four files that use it.
pub const PRIVATE_HEADER: &[Edit] = &[
    (
        "fs/ext4/ext4.h",
        "static inline int ext4_valid_inum(",
        "static inline int vmpatch_at_most(int a)\n{\n\treturn a > 100 ? 100 : a;\n}\n\nstatic inline int ext4_valid_inum(",
    ),
    ("fs/ext4/acl.c", "retries = 0;", "retries = vmpatch_at_most(type);"),
    (
        "fs/ext4/bitmap.c",
        "return numchars *",
        "return vmpatch_at_most(numchars) *",
    ),
    (
        "fs/ext4/fsync.c",
        "unlikely(ext4_forced_shutdown(sbi))",
        "unlikely(vmpatch_at_most(ext4_forced_shutdown(sbi)))",
    ),
    (
        "fs/ext4/ioctl.c",
        "put_user(inode->i_generation,",
        "put_user(vmpatch_at_most(inode->i_generation),",
    ),
];

/// Writes a diff that makes all these edits to the source that the kernel was made of.
///
/// # Panics
///
/// If the source can't be had, or does not have a text just once.
#[track_caller]
pub fn write_diff(target: Target, edits: &[Edit], folder: &Path) -> PathBuf {
    let cache = Cache::from_env().expect("there is a cache");
    let (name, version) = target.source.split_once('=').expect("a package and its version");
    let source = package::whole(&cache, name, version, &Config::default())
        .expect("the source can be had")
        .folder;
    let mut files: Vec<&str> = edits.iter().map(|(file, _, _)| *file).collect();
    files.sort_unstable();
    files.dedup();
    let (old, new) = (folder.join("a"), folder.join("b"));
    for file in files {
        let text = fs::read_to_string(source.join(file)).expect("the source has the file");
        let of_file = edits.iter().filter(|(of, _, _)| *of == file);
        let changed = of_file.fold(text.clone(), |text, (_, from, to)| {
            assert!(text.contains(from), "{file} has no {from:?}");
            text.replacen(from, to, 1)
        });
        for (side, text) in [(&old, text), (&new, changed)] {
            let path = side.join(file);
            fs::create_dir_all(path.parent().unwrap_or(side)).expect("folders can be made");
            fs::write(path, text).expect("files can be written");
        }
    }
    let output = Command::new("diff")
        .args(["-ru", "a", "b"])
        .current_dir(folder)
        .output()
        .expect("there is diff");
    let diff = folder.join("change.patch");
    fs::write(&diff, output.stdout).expect("the diff can be written");
    diff
}

/// Builds a module of a diff, with more options of `vmpatch build`; the review sheet is in the answer's JSON.
///
/// # Panics
///
/// If vmpatch can't be built or started.
pub fn build(target: Target, diff: &Path, output: &Path, more: &[&str]) -> Answer {
    let (diff, output) = (diff.display().to_string(), output.display().to_string());
    let args = ["build", "--kernel", target.package, &diff, "-o", &output, "--json"];
    Vmpatch::domain("none").run_bare(&[&args, more].concat())
}
