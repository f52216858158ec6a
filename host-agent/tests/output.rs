//! The program with an output that takes nothing: its exit code is still that of what it did.

use std::fs::File;
use std::process::{Command, Output, Stdio};

/// No QEMU has it.
const NOWHERE: &str = "a domain that is nowhere";

fn run(args: &[&str], stdout: impl Into<Stdio>, stderr: impl Into<Stdio>) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vmpatch"));
    command.args(args).stdin(Stdio::null()).stdout(stdout).stderr(stderr);
    command.spawn().unwrap().wait_with_output().unwrap()
}

/// A pipe whose reader has gone.
fn closed_pipe() -> Stdio {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    writer.into()
}

#[test]
fn a_closed_pipe_is_no_panic() {
    for args in [
        &["--domain", NOWHERE, "status"][..],
        &["--json", "--domain", NOWHERE, "status"],
    ] {
        let output = run(args, closed_pipe(), Stdio::piped());
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(5), "{args:?}: {stderr}");
        assert!(
            stderr.starts_with("vmpatch: ") && !stderr.contains("panicked"),
            "{stderr}"
        );
        assert_eq!(
            run(args, closed_pipe(), closed_pipe()).status.code(),
            Some(5),
            "{args:?}"
        );
    }
    assert_eq!(run(&["--help"], closed_pipe(), closed_pipe()).status.code(), Some(0));
}

#[test]
fn a_full_disk_leaves_a_failure_its_code() {
    let full = || File::options().write(true).open("/dev/full").unwrap();
    let output = run(&["--json", "--domain", NOWHERE, "status"], full(), full());
    assert_eq!(output.status.code(), Some(5));
}
