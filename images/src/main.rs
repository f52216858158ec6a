//! `vmpatch-images`: boots a real guest, or a host in a box with one, by hand, for the demo and for developing.

use std::error::Error;
use std::io::{self, BufRead, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{ExitCode, Output};
use std::thread;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use images::guest::{Guest, GuestConfig, Ram};
use images::host_box::HostBox;
use images::kernel::Kernel;

/// How often to look whether the guest still runs.
const POLL: Duration = Duration::from_millis(200);
/// How long a command may run; there is a person, or a script with a time-out of its own, who ends it earlier.
const COMMAND_LIMIT: Duration = Duration::from_secs(24 * 3600);

/// Boots real guests from Debian packages.
#[derive(Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    action: Action,
}

#[derive(Subcommand)]
enum Action {
    /// Lists the kernels that have a short name
    List,
    /// Fetches kernels into the cache
    Fetch {
        /// Short names or package names (NAME or NAME=VERSION); all of the list if none is given
        kernels: Vec<String>,
    },
    /// Boots a guest
    ///
    /// Runs the command after `--` in it and ends with its exit status. Without one, says where the guest is to be found,
    /// runs each line of standard input in it, and stays until the guest powers off or Ctrl-C ends it.
    Boot(Boot),
    /// Boots a guest under KVM in a host in a box, an emulated machine
    ///
    /// Runs the command after `--` in the box, beside the guest's QEMU, and ends with its exit status. Without one, says where
    /// the guest is to be found in the box, runs each line of standard input in the box, and stays until the box ends or Ctrl-C
    /// ends it. Paths and process ids that it prints are the box's.
    Box(HostBoxed),
}

#[derive(Args)]
struct HostBoxed {
    /// Program of this machine to put into the box, under the same path, with its libraries
    #[arg(long, value_name = "FILE")]
    program: Vec<PathBuf>,
    /// Other file of this machine to put into the box, under the same path
    #[arg(long, value_name = "FILE")]
    place: Vec<PathBuf>,
    #[command(flatten)]
    boot: Boot,
}

#[derive(Args)]
struct Boot {
    /// Short name or package name of the kernel
    #[arg(long, default_value = "6.1-cloud")]
    kernel: String,
    /// Number of vCPUs
    #[arg(long, default_value_t = 1)]
    vcpus: u32,
    /// RAM in MiB
    #[arg(long, default_value_t = 256)]
    memory: u32,
    /// Where RAM is kept
    #[arg(long, value_enum, default_value_t = RamKind::Private)]
    ram: RamKind,
    /// Name on QEMU's command line
    #[arg(long)]
    name: Option<String>,
    /// QEMU's CPU model
    #[arg(long)]
    cpu: Option<String>,
    /// Words for the kernel's command line
    #[arg(long)]
    append: Vec<String>,
    /// File for the guest
    #[arg(long, value_name = "GUEST=HOST", value_parser = guest_file)]
    file: Vec<(String, PathBuf)>,
    /// Kernel module to load
    #[arg(long)]
    module: Vec<String>,
    /// Argument for QEMU
    #[arg(long, allow_hyphen_values = true)]
    qemu_arg: Vec<String>,
    /// User who runs the command
    #[arg(long, default_value_t = 0)]
    uid: u32,
    /// Command to run in the guest
    #[arg(last = true)]
    command: Vec<String>,
}

#[derive(Clone, Copy, ValueEnum)]
enum RamKind {
    Private,
    Shared,
}

fn main() -> ExitCode {
    let done = match Cli::parse().action {
        Action::List => list(),
        Action::Fetch { kernels } => fetch(&kernels),
        Action::Boot(boot) => run(&boot),
        Action::Box(boxed) => run_in_box(&boxed),
    };
    done.unwrap_or_else(|error| {
        eprintln!("vmpatch-images: {error}");
        let mut cause = error.source();
        while let Some(error) = cause {
            eprintln!("  because: {error}");
            cause = error.source();
        }
        ExitCode::FAILURE
    })
}

fn list() -> Result<ExitCode, Box<dyn Error>> {
    for kernel in Kernel::TABLE {
        println!(
            "{:<12} {} {}",
            kernel.label(),
            kernel.package(),
            kernel.version().unwrap_or_default()
        );
    }
    Ok(ExitCode::SUCCESS)
}

fn fetch(names: &[String]) -> Result<ExitCode, Box<dyn Error>> {
    let named: Vec<Kernel> = names.iter().map(|name| Kernel::named(name)).collect();
    for kernel in if named.is_empty() {
        Kernel::TABLE.to_vec()
    } else {
        named
    } {
        println!("{:<12} {}", kernel.label(), kernel.fetch()?.vmlinuz.display());
    }
    Ok(ExitCode::SUCCESS)
}

fn run(boot: &Boot) -> Result<ExitCode, Box<dyn Error>> {
    let guest = Guest::boot(config(boot))?;
    if boot.command.is_empty() {
        introduce(&guest);
        println!("console {}", guest.folder().join("console.log").display());
        return stay(&guest, boot.uid);
    }
    run_command(&guest, boot)
}

fn run_in_box(boxed: &HostBoxed) -> Result<ExitCode, Box<dyn Error>> {
    let host = HostBox::start()?;
    for program in &boxed.program {
        host.place_program(&program.canonicalize()?)?;
    }
    for file in &boxed.place {
        host.place(&file.canonicalize()?)?;
    }
    // It ends before the box does.
    let guest = host.boot(config(&boxed.boot))?;
    if boxed.boot.command.is_empty() {
        println!("box     {}", host.kernel_release());
        introduce(&guest);
        return stay(&host, boxed.boot.uid);
    }
    run_command(&host, &boxed.boot)
}

fn run_command(guest: &Guest, boot: &Boot) -> Result<ExitCode, Box<dyn Error>> {
    let args: Vec<&str> = boot.command.iter().map(String::as_str).collect();
    let output = guest.command(&args).uid(boot.uid).limit(COMMAND_LIMIT).run()?;
    show(&output)?;
    Ok(exit_code(&output))
}

fn config(boot: &Boot) -> GuestConfig {
    let mut config = GuestConfig::new(Kernel::named(&boot.kernel))
        .vcpus(boot.vcpus)
        .memory_mib(boot.memory);
    config.ram = match boot.ram {
        RamKind::Private => Ram::Private,
        RamKind::Shared => Ram::SharedMemfd,
    };
    config.name.clone_from(&boot.name);
    config.cpu.clone_from(&boot.cpu);
    config.append.clone_from(&boot.append);
    config.modules.clone_from(&boot.module);
    config.qemu_args.clone_from(&boot.qemu_arg);
    boot.file
        .iter()
        .fold(config, |config, (guest, host)| config.file(guest, host))
}

/// Where a guest is to be found.
fn introduce(guest: &Guest) {
    println!("name    {}", guest.name());
    println!("kernel  {}", guest.kernel_release());
    println!("pid     {}", guest.pid());
    println!("qmp     {}", guest.qmp_path().display());
}

/// Runs what is typed in the guest, until the guest ends.
fn stay(guest: &Guest, uid: u32) -> Result<ExitCode, Box<dyn Error>> {
    let shell = guest.command(&["sh", "-c"]).uid(uid).limit(COMMAND_LIMIT);
    thread::spawn(move || {
        for line in io::stdin().lock().lines().map_while(Result::ok) {
            let done = shell.clone().arg(&line).run();
            match done.map(|output| show(&output)) {
                Ok(Ok(())) => {}
                Ok(Err(error)) => eprintln!("vmpatch-images: {error}"),
                Err(error) => eprintln!("vmpatch-images: {error}"),
            }
        }
    });
    while guest.is_running() {
        thread::sleep(POLL);
    }
    Ok(ExitCode::SUCCESS)
}

fn show(output: &Output) -> io::Result<()> {
    io::stdout().write_all(&output.stdout)?;
    io::stdout().flush()?;
    io::stderr().write_all(&output.stderr)
}

/// The command's own exit status; 128 and its signal where one ended it, as a shell has it.
fn exit_code(output: &Output) -> ExitCode {
    let status = output.status;
    let code = status.code().or_else(|| Some(128 + status.signal()?));
    code.and_then(|code| u8::try_from(code).ok())
        .map_or(ExitCode::FAILURE, ExitCode::from)
}

/// `GUEST=HOST`.
fn guest_file(text: &str) -> Result<(String, PathBuf), String> {
    let (guest, host) = text
        .split_once('=')
        .ok_or("expected GUEST=HOST, such as /bin/test=target/test")?;
    Ok((guest.to_owned(), PathBuf::from(host)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_well_formed() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }

    #[test]
    fn the_chosen_options_reach_the_guest() {
        let line =
            "vmpatch-images boot --ram shared --vcpus 4 --append nokaslr --file /x=/etc/passwd --qemu-arg -S -- ls -l";
        let Action::Boot(boot) = Cli::try_parse_from(line.split(' ')).unwrap().action else {
            panic!("not `boot`");
        };
        let config = config(&boot);
        assert_eq!(
            (config.ram, config.vcpus, config.kernel),
            (Ram::SharedMemfd, 4, Some(Kernel::CLOUD_6_1))
        );
        assert_eq!(
            (config.append, config.qemu_args),
            (vec!["nokaslr".to_owned()], vec!["-S".to_owned()])
        );
        assert_eq!(config.files.first().map(|file| file.guest.as_str()), Some("/x"));
        assert_eq!(boot.command, ["ls", "-l"]);
    }
}
