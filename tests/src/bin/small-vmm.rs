//! A small VMM that tests run in a host in a box: see `e2e::small_vmm`.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use e2e::small_vmm::{self, Backing, Config};

#[derive(Parser)]
#[command(name = "small-vmm")]
struct Cli {
    kernel: PathBuf,
    initrd: PathBuf,
    command_line: String,
    #[arg(long, default_value_t = 256)]
    memory_mib: u64,
    #[arg(long, default_value_t = 1)]
    vcpus: u8,
    /// RAM in a memfd
    #[arg(long)]
    shared: bool,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let config = Config {
        kernel: cli.kernel,
        initrd: cli.initrd,
        command_line: cli.command_line,
        memory_mib: cli.memory_mib,
        backing: if cli.shared { Backing::Shared } else { Backing::Private },
        vcpus: cli.vcpus,
    };
    match small_vmm::run(&config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("small-vmm: {error}");
            ExitCode::FAILURE
        }
    }
}
