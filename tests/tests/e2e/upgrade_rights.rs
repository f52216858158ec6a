//! A guest whose QEMU runs as another user than vmpatch: nothing is opened or renamed for that user with more rights than it has.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use e2e::kit;
use e2e::moving::{INSTALLED, Keeper, temporary_names};
use e2e::vmpatch::Vmpatch;
use images::guest::{Guest, Ram};
use images::kernel::Kernel;
use nix::unistd::{Gid, Uid, chown};

/// A user that nobody is.
const USER: u32 = 4711;
/// The text of a file of root's.
const KEPT: &str = "root's own";

/// A folder of that user's; removed when it is dropped.
struct Place(PathBuf);

impl Place {
    fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let folder = std::env::temp_dir().join(format!("vmpatch-rights-{}-{number}", std::process::id()));
        fs::create_dir(&folder).unwrap();
        chown(&folder, Some(Uid::from_raw(USER)), Some(Gid::from_raw(USER))).unwrap();
        Self(folder)
    }

    fn script(&self, name: &str, text: &str) -> PathBuf {
        let path = self.0.join(name);
        fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        path
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        drop(fs::remove_dir_all(&self.0));
    }
}

fn inode(path: impl AsRef<Path>) -> (u64, u64) {
    let found = fs::metadata(path).unwrap();
    (found.dev(), found.ino())
}

#[test]
fn the_log_of_another_users_qemu_is_its_open_file_and_not_what_has_its_name() {
    let place = Place::new();
    let (log, folder) = (place.0.join("log"), place.0.display());
    let mut config = kit::guest(Kernel::CLOUD_6_1).ram(Ram::Private);
    // The user can't reach the cache of kernels, and has the guest's folder.
    config.qemu = place.script(
        "qemu-system-x86_64",
        &format!(
            "count=$#\n\
             while [ $count -gt 0 ]; do\n\
                 word=$1; shift; count=$((count - 1))\n\
                 case $word in\n\
                     */vmlinuz*) cp \"$word\" {folder}/kernel; word={folder}/kernel ;;\n\
                     */initramfs.cpio) chown -R {USER}:{USER} \"${{word%/*}}\" ;;\n\
                 esac\n\
                 set -- \"$@\" \"$word\"\n\
             done\n\
             chmod 644 {folder}/kernel\n\
             exec setpriv --reuid {USER} --regid {USER} --clear-groups --pdeathsig KILL {INSTALLED} \"$@\" 2>>{}",
            log.display()
        ),
    );
    let mut guest = Guest::boot(config).unwrap_or_else(|error| panic!("{error}"));
    let _keeper = Keeper::of(&guest);
    let vmpatch = Vmpatch::on(&guest);
    let old = guest.pid();
    let old_log = inode(format!("/proc/{old}/fd/2"));

    // What /proc says of a file that was deleted is a name, too, and that user can give it to a link.
    let victim = std::env::temp_dir().join(format!("vmpatch-victim-{}", std::process::id()));
    fs::write(&victim, KEPT).unwrap();
    fs::set_permissions(&victim, fs::Permissions::from_mode(0o600)).unwrap();
    fs::remove_file(&log).unwrap();
    symlink(&victim, place.0.join("log (deleted)")).unwrap();
    let program = place.script(
        "program",
        &format!("if [ \"$1\" = --version ]; then exec {INSTALLED} --version; fi\necho out of order >&2; exit 1"),
    );
    let line = ["upgrade", "--qemu", &program.display().to_string(), "--check"];
    let answer = vmpatch.run(&line).expect(1);
    let written = fs::read_to_string(&victim).unwrap();
    fs::remove_file(&victim).unwrap();
    assert_eq!(written, KEPT, "{answer}");
    assert!(answer.complaint().contains("out of order"), "{answer}");

    let report = vmpatch
        .run(&["upgrade", "--qemu", INSTALLED, "--json"])
        .expect(0)
        .json();
    let new = u32::try_from(report["new"]["pid"].as_u64().unwrap()).unwrap();
    assert_ne!(new, old);
    assert_eq!(inode(format!("/proc/{new}/fd/2")), old_log);
    assert_eq!(fs::metadata(format!("/proc/{new}")).unwrap().uid(), USER);
    guest.follow(new).unwrap();
    assert_eq!(temporary_names(&guest), [""; 0]);
}

#[test]
fn a_program_with_more_rights_than_the_old_one_is_not_given_the_guest() {
    let place = Place::new();
    let mut config = kit::guest(Kernel::CLOUD_6_1).ram(Ram::Private);
    let text = format!("exec setpriv --no-new-privs --pdeathsig KILL {INSTALLED} \"$@\"");
    config.qemu = place.script("qemu-system-x86_64", &text);
    let guest = Guest::boot(config).unwrap_or_else(|error| panic!("{error}"));
    let _keeper = Keeper::of(&guest);
    let answer = Vmpatch::on(&guest).run(&["upgrade", "--qemu", INSTALLED]).expect(3);
    let words = "another right than the old one (NoNewPrivs 0, not NoNewPrivs 1)";
    assert!(answer.complaint().contains(words), "{answer}");
    assert!(guest.is_running());
}
