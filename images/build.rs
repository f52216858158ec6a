//! Builds the guest agent: a static program, because the guest has no libraries. It is compiled here rather than as a
//! package of its own since a static build of one binary can't be asked for in a workspace.

use std::env;
use std::path::PathBuf;
use std::process::{Command, exit};

fn main() {
    for source in ["agent", "src/channel/frame.rs"] {
        println!("cargo::rerun-if-changed={source}");
    }
    let (Some(rustc), Some(target), Some(out)) = (env::var_os("RUSTC"), env::var_os("TARGET"), env::var_os("OUT_DIR"))
    else {
        eprintln!("RUSTC, TARGET and OUT_DIR must be set, as cargo does");
        exit(1);
    };
    let status = Command::new(rustc)
        .args([
            "--edition=2024",
            "--crate-name=guest_agent",
            "--crate-type=bin",
            "-Dwarnings",
        ])
        .args([
            "-Copt-level=s",
            "-Cpanic=abort",
            "-Cstrip=symbols",
            "-Ctarget-feature=+crt-static",
            "--target",
        ])
        .arg(target)
        .arg("-o")
        .arg(PathBuf::from(out).join("guest-agent"))
        .arg("agent/main.rs")
        .status();
    if !status.is_ok_and(|status| status.success()) {
        eprintln!("the guest agent does not compile");
        exit(1);
    }
}
