//! The guest agent: runs the host's commands in the guest. For the demo and the tests only; vmpatch itself never talks to it.
//!
//! `guest-agent connect SOCKET` joins a Unix socket to its own standard input and output: so the host reaches it by a command.

use std::fs::{self, File};
use std::io;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

mod connect;
#[path = "../src/channel/frame.rs"]
mod frame;
mod serve;

/// The name that the host gives the channel's virtio port.
const PORT_NAME: &str = "org.vmpatch.guest";
/// How long to wait between two looks whether the port is there, or whether the host has come back to it.
const RETRY: Duration = Duration::from_millis(20);
/// How often to look for the port: its driver finds it within milliseconds.
const PORT_TRIES: u32 = 500;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let done = match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [] => run().map(|never| match never {}),
        ["connect", socket] => connect::connect(socket),
        _ => Err(io::Error::other("usage: guest-agent [connect SOCKET]")),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("guest-agent: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> io::Result<std::convert::Infallible> {
    let path = port()?;
    let mut input = File::options().read(true).write(true).open(&path)?;
    let boot_id = fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned();
    let mut agent = serve::Agent::new(boot_id, input.try_clone()?);
    agent.hello()?;
    // A port that nobody is connected to reads as ended.
    loop {
        agent.serve(&mut input)?;
        std::thread::sleep(RETRY);
    }
}

/// The device node of the channel's port: its number depends on the guest's devices, its name does not.
fn port() -> io::Result<PathBuf> {
    for _ in 0..PORT_TRIES {
        for entry in fs::read_dir("/sys/class/virtio-ports").into_iter().flatten() {
            let entry = entry?;
            let name = fs::read_to_string(entry.path().join("name")).unwrap_or_default();
            let node = PathBuf::from("/dev").join(entry.file_name());
            if name.trim() == PORT_NAME && node.exists() {
                return Ok(node);
            }
        }
        std::thread::sleep(RETRY);
    }
    Err(io::Error::new(io::ErrorKind::NotFound, format!("no virtio port named {PORT_NAME}")))
}
