//! Files that a process read when it began and closed again: kernels, firmware, secrets, tables. That they are what they were can only
//! be told by when they were changed.

use super::error::UpgradeError;
use super::files::{Identity, OpenFiles};
use crate::domains::params::Params;
use crate::domains::process;
use serde_json::Value;
use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

/// Clock ticks a second in /proc on x86 (`USER_HZ`).
const TICKS_A_SECOND: u64 = 100;
/// Both clocks that are compared have steps of 10 ms, and a QEMU reads its first file later than that.
const CLOCK_ERROR: Duration = Duration::from_millis(50);
/// Options whose arguments are no files to read, whatever they look like.
const WITHOUT_FILES: [&str; 6] = ["D", "append", "name", "pidfile", "uuid", "writeconfig"];
/// Most symbolic links on the way to a file (`include/linux/namei.h`, `MAXSYMLINKS`).
const LINKS_MAX: usize = 40;

/// Demands that no file on the command line `words` of the process `pid` was changed since it began, but for those that are open: its
/// name may lead to another one, which the new process would read.
pub(super) fn check_unchanged(
    pid: i32,
    words: &[(String, Vec<u8>)],
    folder: &Path,
    open: &OpenFiles,
) -> Result<(), UpgradeError> {
    let began = began(pid).map_err(UpgradeError::host(format!("finding out when process {pid} began")))?;
    for (option, value) in words {
        if WITHOUT_FILES.contains(&option.as_str()) {
            continue;
        }
        for path in paths(value) {
            let path = folder.join(path);
            let Ok(found) = fs::metadata(&path) else { continue };
            let is_open = Identity::at(&path).is_some_and(|identity| open.has(identity));
            if found.is_file() && !is_open && changed(&path) > began + CLOCK_ERROR {
                return Err(UpgradeError::unfit(
                    format!("the file {} (`-{option}`)", path.display()),
                    format!(
                        "it was changed, or another file got its name, after process {pid} began, so the new process would read \
                         something else; shut the guest down and start it anew"
                    ),
                ));
            }
        }
    }
    Ok(())
}

/// Demands that QEMU's own log is not one that the new process would empty: it does so when it opens it (`util/log.c`,
/// `qemu_set_log_internal`, 7.2 to 10.0).
pub(super) fn check_log(words: &[(String, Vec<u8>)], folder: &Path, open: &OpenFiles) -> Result<(), UpgradeError> {
    let logs = words.iter().any(|(option, _)| option == "d" || option == "trace");
    let files = words.iter().filter(|(option, _)| option == "D");
    for (_, value) in files {
        let path = folder.join(OsString::from_vec(value.clone()));
        if logs || Identity::at(&path).is_some_and(|identity| open.has(identity)) {
            return Err(UpgradeError::unfit(
                format!("the log file {} (`-D`)", path.display()),
                "a QEMU that begins empties it, and the old one still writes to it; let QEMU log to its standard error",
            ));
        }
    }
    Ok(())
}

/// All values that may be paths. One that is none leads nowhere.
fn paths(value: &[u8]) -> BTreeSet<PathBuf> {
    let mut found = BTreeSet::new();
    let mut add = |bytes: &[u8]| {
        let bytes = bytes.strip_prefix(b"file:").unwrap_or(bytes);
        if !bytes.is_empty() {
            found.insert(PathBuf::from(OsString::from_vec(bytes.to_vec())));
        }
    };
    if let Ok(json @ Value::Object(_)) = serde_json::from_slice(value) {
        let mut open = vec![json];
        while let Some(value) = open.pop() {
            match value {
                Value::String(text) => add(text.as_bytes()),
                Value::Array(items) => open.extend(items),
                Value::Object(members) => open.extend(members.into_iter().map(|(_, member)| member)),
                _ => {}
            }
        }
        return found;
    }
    add(value);
    let params = Params::parse(value, Some(""));
    params.values().for_each(&mut add);
    found
}

/// When a process began, by the host's clock as it is set now.
fn began(pid: i32) -> io::Result<SystemTime> {
    let text = fs::read_to_string("/proc/uptime")?;
    let up = text.split(' ').next().and_then(|seconds| seconds.parse::<f64>().ok());
    let up = up.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    let up = up.ok_or_else(|| io::Error::other(format!("/proc/uptime is not understood: {text}")))?;
    let ticks = process::start_time(pid)?;
    let age = up.saturating_sub(Duration::from_millis(ticks.saturating_mul(1000 / TICKS_A_SECOND)));
    Ok(SystemTime::now() - age)
}

/// When a file was changed last, its names and the symbolic links that lead to it included.
fn changed(path: &Path) -> SystemTime {
    let mut last = SystemTime::UNIX_EPOCH;
    let mut open = vec![path.to_owned()];
    let mut links = 0;
    while let Some(path) = open.pop() {
        for prefix in path.ancestors() {
            let Ok(found) = fs::symlink_metadata(prefix) else {
                continue;
            };
            // A folder changes with each of its files.
            if found.is_dir() {
                continue;
            }
            last = last.max(time(found.ctime(), found.ctime_nsec()));
            if let Ok(target) = fs::read_link(prefix)
                && links < LINKS_MAX
            {
                links += 1;
                open.push(prefix.parent().unwrap_or(prefix).join(target));
            }
        }
    }
    // The file itself, where a folder on the way to it is a link.
    let itself = fs::metadata(path).map(|found| time(found.ctime(), found.ctime_nsec()));
    last.max(itself.unwrap_or(SystemTime::UNIX_EPOCH))
}

fn time(seconds: i64, nanoseconds: i64) -> SystemTime {
    let since = |number: i64| u64::try_from(number).unwrap_or(0);
    SystemTime::UNIX_EPOCH + Duration::from_secs(since(seconds)) + Duration::from_nanos(since(nanoseconds))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(value: &str) -> Vec<String> {
        let paths = paths(value.as_bytes());
        paths.iter().map(|path| path.display().to_string()).collect()
    }

    #[test]
    fn paths_are_found_in_all_forms_of_an_argument() {
        assert_eq!(found("/boot/vmlinuz"), ["/boot/vmlinuz"]);
        let fw_cfg = found("name=opt/a,file=/etc/a,,b");
        assert!(fw_cfg.contains(&"/etc/a,b".to_owned()), "{fw_cfg:?}");
        assert!(found("secret,id=s,file=/k").contains(&"/k".to_owned()));
        assert_eq!(
            found(r#"{"qom-type":"secret","file":"/k","x":[{"y":"/z"}]}"#),
            ["/k", "/z", "secret"]
        );
        assert_eq!(found("file:/a"), ["/a"]);
    }

    #[test]
    fn this_process_began_a_moment_ago() {
        let age = SystemTime::now().duration_since(began(i32::try_from(std::process::id()).unwrap()).unwrap());
        assert!(age.unwrap() < Duration::from_secs(3600));
    }

    #[test]
    fn a_link_that_leads_elsewhere_by_now_is_a_change() {
        let folder = std::env::temp_dir().join(format!("vmpatch-named-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let (file, link) = (folder.join("file"), folder.join("link"));
        fs::write(&file, "").unwrap();
        let before = changed(&file);
        while SystemTime::now() < before + CLOCK_ERROR {
            std::thread::sleep(CLOCK_ERROR);
        }
        std::os::unix::fs::symlink("file", &link).unwrap();
        assert_eq!(changed(&file), before);
        assert!(changed(&link) > before);
        fs::remove_dir_all(folder).unwrap();
    }
}
