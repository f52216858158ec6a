//! `vmpatch launch`: the process that becomes the new QEMU of a move, shown with a shell in QEMU's place.

use serde_json::json;
use std::fs::File;
use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Stdio};

/// What `script` prints that a shell runs which `vmpatch launch` has become; `vmpatch` is started by another shell with `redirection`.
fn launched(redirection: &str, script: &str) -> String {
    let bytes = |text: &str| text.as_bytes().to_vec();
    let id = |real: u32| [real; 3];
    let (user, group) = (nix::unistd::getuid().as_raw(), nix::unistd::getgid().as_raw());
    let spec = json!({
        "program": "/bin/sh",
        "arguments": [bytes("-c"), bytes(script)],
        "folder": "/",
        "process_context": {
            "users": id(user),
            "groups": id(group),
            "other_groups": [],
            "umask": 0o22,
            "limits": [],
            "cgroups": [],
            "oom_score_adj": std::fs::read_to_string("/proc/self/oom_score_adj").unwrap().trim(),
            "processors": [0],
            "environment": [bytes("PATH=/usr/bin:/bin")],
        },
        "old": std::process::id(),
        "marker": "",
        "descriptors": [],
        "taps": "",
    });
    let command = format!("{} launch {redirection}; true", env!("CARGO_BIN_EXE_vmpatch"));
    let mut starter = Command::new("sh");
    starter
        .args(["-c", &command])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut starter = starter.spawn().unwrap();
    starter
        .stdin
        .take()
        .unwrap()
        .write_all(spec.to_string().as_bytes())
        .unwrap();
    let output = starter.wait_with_output().unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
    String::from_utf8(output.stdout).unwrap()
}

/// A file of this test, removed when it is dropped.
struct Scratch(PathBuf);

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

#[test]
fn what_the_starter_of_vmpatch_has_open_does_not_stay_open_in_the_new_process() {
    let lock = Scratch(std::env::temp_dir().join(format!("vmpatch-lock-{}", std::process::id())));
    File::create(&lock.0).unwrap();
    let list = "for fd in /proc/$$/fd/*; do readlink $fd; done";
    let found = launched(&format!("9>{}", lock.0.display()), list);
    assert!(found.contains("/dev/null"), "no list: {found}");
    assert!(!found.contains("vmpatch-lock"), "the lock is still open: {found}");
}
