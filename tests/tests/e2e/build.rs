//! Modules that `vmpatch build` makes out of the distribution's own fixes: each works applied from outside, and loaded by the
//! guest itself.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use e2e::bed;
use e2e::fixes::{FIXES, Fix, KERNEL};
use e2e::kit;
use e2e::probe::{Seen, see_as};
use e2e::vmpatch::{Answer, Vmpatch};
use images::guest::Guest;
use images::kernel::Kernel;

/// A livepatch of the guest's own takes two seconds on two idle vCPUs; this is for a busy machine.
const TRANSITION_MAX: Duration = Duration::from_secs(300);
/// Where the modules go; a folder for each run.
fn folder() -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("build-{}", std::process::id()));
    fs::create_dir_all(&folder).unwrap();
    folder
}

fn build(args: &[&str]) -> Answer {
    Vmpatch::domain("none").run_bare(&[&["build", "--kernel", KERNEL], args].concat())
}

/// Loads a module in the guest and waits until all its tasks run the new code.
fn load(guest: &Guest, module: &str) -> Result<(), String> {
    guest.push("/tmp/built.ko", &fs::read(module).unwrap(), 0o644).unwrap();
    let insmod = guest.spawn(&["insmod", "/tmp/built.ko"]).unwrap();
    let output = insmod.wait(TRANSITION_MAX).unwrap();
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).into_owned());
    }
    let start = Instant::now();
    let in_transition = ["sh", "-c", "grep -q 1 /sys/kernel/livepatch/*/transition"];
    while guest.run(&in_transition).unwrap().status.success() {
        assert!(start.elapsed() < TRANSITION_MAX, "a livepatch stays in transition");
        std::thread::sleep(Duration::from_millis(100));
    }
    Ok(())
}

/// Applies a module from outside, sees its effect and takes it back.
fn apply(guest: &Guest, fix: &Fix, module: &str) {
    let see = || see_as(guest, fix.user, fix.program);
    let vmpatch = Vmpatch::on(guest);
    vmpatch.apply(module);
    assert_eq!(see(), Seen::Fixed, "{} from outside", fix.cve);
    vmpatch.revert_all();
    assert_eq!(see(), Seen::Flawed, "{} after revert", fix.cve);
    println!("{}: from outside: applied", fix.cve);
}

#[test]
fn published_fixes_are_built_and_work_from_outside_and_in_the_guests_own_livepatch() {
    let folder = folder().join("published");
    fs::create_dir_all(&folder).unwrap();
    let guest = bed::lend(kit::guest(Kernel::CLOUD_6_1).module("algif_skcipher").module("ecb"));
    let built: Vec<(&Fix, String)> = FIXES
        .iter()
        .map(|fix| {
            let output = folder.join(format!("livepatch-{}.ko", fix.cve.to_lowercase()));
            let output = output.display().to_string();
            let answer = fix.build(&output, &["--json"]).expect(0);
            println!("{}: built in {:.1} s", fix.cve, answer.took.as_secs_f32());
            (fix, output)
        })
        .collect();
    for (fix, module) in &built {
        assert_eq!(
            see_as(&guest, fix.user, fix.program),
            Seen::Flawed,
            "{} before",
            fix.cve
        );
        apply(&guest, fix, module);
    }
    for (fix, module) in &built {
        if fix.has_ftrace {
            load(&guest, module).unwrap_or_else(|error| panic!("{}: {error}", fix.cve));
            assert_eq!(see_as(&guest, fix.user, fix.program), Seen::Fixed, "{} loaded", fix.cve);
        } else {
            assert!(load(&guest, module).is_err(), "{} has no ftrace site", fix.cve);
        }
    }
    fs::remove_dir_all(&folder).unwrap();
}

#[test]
fn the_same_inputs_give_the_same_bytes() {
    let folder = folder().join("twice");
    fs::create_dir_all(&folder).unwrap();
    let [first, second] = ["a", "b"].map(|place| {
        let folder = folder.join(place);
        fs::create_dir_all(&folder).unwrap();
        let output = folder.join("livepatch-same.ko").display().to_string();
        FIXES[0].build(&output, &[]).expect(0);
        fs::read(output).unwrap()
    });
    assert!(
        first == second,
        "{} and {} bytes that differ",
        first.len(),
        second.len()
    );
    fs::remove_dir_all(&folder).unwrap();
}

/// Builds a diff of one line of a file of the kernel's source; exit code and complaint.
fn refused(name: &str, file: &str, from: &str, to: &str) -> (Option<i32>, String) {
    let folder = folder().join(name);
    fs::create_dir_all(&folder).unwrap();
    let patch = folder.join("fix.patch");
    fs::write(
        &patch,
        format!("--- a/{file}\n+++ b/{file}\n@@ -1 +1 @@\n-{from}\n+{to}\n"),
    )
    .unwrap();
    let output = folder.join("never.ko");
    let answer = build(&[&patch.display().to_string(), "-o", &output.display().to_string()]);
    assert!(!output.exists(), "{answer}");
    fs::remove_dir_all(&folder).unwrap();
    (answer.code, answer.complaint().to_owned())
}

#[test]
fn a_change_that_does_not_fit_is_refused_and_writes_nothing() {
    let (code, complaint) = refused("context", "ipc/util.c", "no such line", "x");
    assert_eq!(code, Some(3), "{complaint}");
    assert!(complaint.contains("does not fit the kernel's source"), "{complaint}");
    let (code, complaint) = refused(
        "comment",
        "ipc/util.c",
        "// SPDX-License-Identifier: GPL-2.0",
        "// SPDX",
    );
    assert_eq!(code, Some(3), "{complaint}");
    assert!(complaint.contains("changes no code and no data"), "{complaint}");
    let (code, complaint) = refused("makefile", "ipc/Makefile", "#", "# x");
    assert_eq!(code, Some(3), "{complaint}");
    assert!(
        complaint.contains("ipc/Makefile: only C files and headers"),
        "{complaint}"
    );
}
