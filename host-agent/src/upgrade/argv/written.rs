//! What QEMU writes for the host to read: a new process that opens such a file must not empty it.

use super::Refused;
use super::keyed::Keyed;
use crate::domains::params::Params;

/// Keeps the copy of what a character device puts out. Without `logappend` QEMU empties the file when it opens it (`chardev/char.c`,
/// `qemu_char_open`, 7.2 to 10.0).
pub(super) fn keep_log(device: &mut Params) {
    if device.get("logfile").is_some() {
        device.replace("logappend", b"on");
    }
}

/// Options whose files QEMU empties whenever it begins, and knows no way not to.
pub(super) fn check(option: &str, text: &[u8]) -> Result<(), Refused> {
    let has = |key: &str, implied: &str| Keyed::parse(text, implied).text(key).is_some();
    let is = |key: &str, value: &str, implied: &str| Keyed::parse(text, implied).text(key).as_deref() == Some(value);
    let empties = match option {
        // `net/dump.c`, `net_dump_state_init`.
        "object" => is("qom-type", "filter-dump", "qom-type"),
        // `util/log.c`, `qemu_set_log_internal`.
        "trace" => has("file", "enable"),
        // `replay/replay.c`, `replay_enable`.
        "icount" => has("rr", "shift") || has("rrfile", "shift"),
        // `audio/wavaudio.c`, `wav_init_out`.
        "audiodev" => is("driver", "wav", "driver"),
        // `block/blklogwrites.c`: the log begins anew.
        "drive" | "blockdev" => String::from_utf8_lossy(text).contains("blklogwrites"),
        _ => false,
    };
    if empties {
        return Err(Refused::new(
            option,
            text,
            "a QEMU that begins empties the file to which it writes, and the old one still does; shut the guest down first",
        ));
    }
    Ok(())
}
