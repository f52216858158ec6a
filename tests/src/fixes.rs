//! Published fixes between two versions of Debian's kernel source, for `vmpatch build`, with the programs that see them.

use crate::vmpatch::{Answer, Vmpatch};

/// The kernel that has the flaws.
pub const KERNEL: &str = "linux-image-6.1.0-47-cloud-amd64=6.1.170-3";
/// Its source.
pub const FROM: &str = "linux-source-6.1=6.1.170-3";
/// The source that has the fixes.
pub const TO: &str = "linux-source-6.1=6.1.192-2";
const ROOT: u32 = 0;
const ANYBODY: u32 = 1000;

/// A published fix.
#[derive(Clone, Copy, Debug)]
pub struct Fix {
    /// Its identifier.
    pub cve: &'static str,
    /// What to take from the newer source; the change may be in a function that is inlined into the one that is patched.
    pub function: &'static str,
    /// The program in the guest that sees the flaw.
    pub program: &'static str,
    /// Root, or anybody.
    pub user: u32,
    /// Whether the guest's own livepatch can take it: it needs an ftrace site.
    pub has_ftrace: bool,
}

const fn fix(cve: &'static str, function: &'static str, program: &'static str, user: u32) -> Fix {
    Fix {
        cve,
        function,
        program,
        user,
        has_ftrace: true,
    }
}

/// All of them.
pub const FIXES: [Fix; 10] = [
    fix("CVE-2026-52928", "net/unix/af_unix.c:unix_ioctl", "siocatmark", ANYBODY),
    fix(
        "CVE-2026-53249",
        "net/ipv4/ip_options.c:ip_options_get",
        "lsrr",
        ANYBODY,
    ),
    fix("CVE-2026-53236", "net/core/sock.c:sk_setsockopt", "tcpfilter", ANYBODY),
    fix("CVE-2026-52923", "ipc/util.c:ipc_idr_alloc", "msgid", ROOT),
    fix(
        "CVE-2026-93146",
        "kernel/time/namespace.c:proc_timens_set_offset",
        "timens",
        ROOT,
    ),
    fix("CVE-2026-72379", "fs/namei.c:vfs_tmpfile", "tmpfile", ROOT),
    fix(
        "CVE-2026-98022",
        "net/core/dev.c:dev_change_tx_queue_len",
        "txqueue",
        ROOT,
    ),
    fix(
        "CVE-2026-52972",
        "crypto/af_alg.c:af_alg_cmsg_send",
        "assoclen",
        ANYBODY,
    ),
    Fix {
        has_ftrace: false,
        ..fix(
            "CVE-2026-98655",
            "kernel/events/core.c:perf_event_open",
            "textpoke",
            ROOT,
        )
    },
    Fix {
        has_ftrace: false,
        ..fix(
            "CVE-2026-99236",
            "kernel/trace/trace_events_filter.c:predicate_parse",
            "tracefilter",
            ROOT,
        )
    },
];

impl Fix {
    /// What `vmpatch` is to be told to build its module into the file `output`.
    pub fn arguments<'a>(&'a self, output: &'a str) -> [&'a str; 13] {
        [
            "build",
            "--kernel",
            KERNEL,
            "--from",
            FROM,
            "--to",
            TO,
            "--function",
            self.function,
            "--cve",
            self.cve,
            "-o",
            output,
        ]
    }

    /// Builds its module into the file `output`, with more options of `vmpatch build`.
    ///
    /// # Panics
    ///
    /// If vmpatch can't be built or started.
    pub fn build(&self, output: &str, more: &[&str]) -> Answer {
        Vmpatch::domain("none").run_bare(&[&self.arguments(output), more].concat())
    }
}
