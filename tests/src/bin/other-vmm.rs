//! Patches a guest of a program that nobody here wrote, in a host in a box, and kills vmpatch in its pauses.

use std::path::PathBuf;

use clap::{Parser, Subcommand};
use e2e::killing::Command;
use e2e::other_vmm::{Files, OtherVmm, STEPS, SUPERVISOR_STEP};
use e2e::probe::Seen;
use images::host_box::HostBox;
use images::kernel::Kernel;

#[derive(Parser)]
#[command(name = "other-vmm")]
struct Cli {
    #[command(subcommand)]
    program: Program,
    /// Cycles of apply and revert
    #[arg(long, global = true, default_value_t = 5)]
    cycles: usize,
    #[arg(long, global = true, default_value_t = 2)]
    vcpus: u8,
    /// The guest's RAM, MiB
    #[arg(long, global = true, default_value_t = 256)]
    memory_mib: u32,
}

#[derive(Subcommand)]
enum Program {
    /// `alioth`, of `cargo install alioth-cli`
    Alioth {
        path: PathBuf,
        /// RAM in memfds
        #[arg(long)]
        memfd: bool,
    },
}

fn main() {
    let cli = Cli::parse();
    let in_box = in_box();
    let host = HostBox::start().unwrap_or_else(|error| panic!("{error}"));
    let files = Files::place(&host, Kernel::GENERIC_6_1);
    let [kernel, initrd] = [&files.kernel, &files.initrd].map(|path| path.to_string_lossy().into_owned());
    let Program::Alioth { path, memfd } = cli.program;
    let backend = if memfd { ",backend=memfd" } else { "" };
    let words = [
        "boot".to_owned(),
        "-k".to_owned(),
        kernel,
        "-i".to_owned(),
        initrd,
        "-c".to_owned(),
        Files::command_line(),
        "-p".to_owned(),
        format!("count={}", cli.vcpus),
        "-m".to_owned(),
        format!("size={}M{backend}", cli.memory_mib),
    ];
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let guest = OtherVmm::start(&host, &in_box, &files, &path, &words);
    show(&guest, cli.cycles);
}

/// The program `in-box`, which is built together with this one.
fn in_box() -> PathBuf {
    let own = std::env::current_exe().expect("this program has a path");
    let program = own.with_file_name("in-box");
    assert!(program.exists(), "build it first: cargo build -p e2e --bin in-box");
    program
}

fn show(guest: &OtherVmm<'_>, cycles: usize) {
    let large = |line: &&str| {
        let range = line.split_once(' ').map_or("", |(range, _)| range);
        let ends = range.split_once('-').unwrap_or_default();
        let [start, end] = [ends.0, ends.1].map(|text| u64::from_str_radix(text, 16).unwrap_or(0));
        end - start >= 1 << 24
    };
    for line in guest.maps().lines().filter(large) {
        println!("mapped: {line}");
    }
    println!("{}", guest.vmpatch.run_bare(&["domains"]).expect(0).stdout);
    println!("{}", guest.vmpatch.run(&["-vv", "inspect"]).expect(0));
    assert_eq!(guest.see(), Seen::Flawed);
    for cycle in 0..cycles {
        println!("cycle {cycle}: paused for {:?} µs", guest.cycle());
    }
    // In turn: a patch that is applied is not applied again.
    let steps = STEPS.map(|step| (step, false));
    for (step, supervisor) in steps.into_iter().chain([(SUPERVISOR_STEP, true)]) {
        for command in [Command::Apply, Command::Revert] {
            guest.cut_and_repeat(command, step, supervisor);
        }
    }
    println!("{}", guest.console().lines().last().unwrap_or_default());
}
