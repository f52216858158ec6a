//! The command line. Its `--help` is its reference; `docs/operating.md` says when to use what.

#[cfg(feature = "build")]
use super::build::BuildOptions;
use clap::{Args, CommandFactory, FromArgMatches, Parser, Subcommand, ValueEnum};
use guest_core::commit::Model;
use host_agent::hypervisor::{PauseMethod, Route};
use host_agent::sandbox::Sandbox;
use host_agent::session::PatchOptions;
use host_agent::target::Selector;
use host_agent::upgrade;
use qmp::migrate::Method;
use std::path::PathBuf;
use std::time::Duration;

/// Where the bare command looks for modules.
pub const PATCHES_DEFAULT: &str = "/var/lib/vmpatch/patches";

/// Patches the kernel of a running VM from outside: no guest agent, no login, no reboot.
///
/// Without a command: applies every module of the patch directory that was made for the guest's very kernel and is
/// not applied yet, oldest first.
#[derive(Debug, Parser)]
#[command(version, name = "vmpatch", after_help = EXIT_CODES, max_term_width = 100)]
pub struct Cli {
    /// What is asked.
    #[command(subcommand)]
    pub command: Option<Command>,
    /// Which guest, and how.
    #[command(flatten)]
    pub options: Options,
}

/// Reads the command line; ends the process where it makes no sense, or asks for help.
pub fn parse() -> Cli {
    let matches = command().get_matches();
    Cli::from_arg_matches(&matches).unwrap_or_else(|error| error.exit())
}

/// Options that every command takes, and that act on some.
const OF_SOME: [&str; 9] = [
    "domain", "qmp", "pid", "timeout", "model", "grace", "pause", "sandbox", "patches",
];

/// Which of them act on a command.
fn acting(command: &str) -> &'static [&'static str] {
    match command {
        "apply" => &["domain", "qmp", "pid", "timeout", "model", "grace", "pause", "sandbox"],
        "check" => &["domain", "qmp", "pid", "timeout", "model", "sandbox"],
        "revert" | "finish" => &["domain", "qmp", "pid", "timeout", "pause", "sandbox"],
        "status" | "inspect" => &["domain", "qmp", "pid", "sandbox"],
        "domains" => &["sandbox"],
        "upgrade" => &["domain", "qmp"],
        _ => &[],
    }
}

/// The command line. An option is in the help of the commands on which it acts; the others take it as well, so that a script can give the
/// same options to all.
fn command() -> clap::Command {
    let mut command = Cli::command();
    // From here on each command has the options that all of them take.
    command.build();
    command.mut_subcommands(|command| {
        let acting = acting(command.get_name());
        command.mut_args(|option| {
            let name = option.get_id().as_str();
            let is_idle = OF_SOME.contains(&name) && !acting.contains(&name);
            if is_idle { option.hide(true) } else { option }
        })
    })
}

const EXIT_CODES: &str = "\
Exit codes:
  0  done
  1  failed; the guest is as before
  2  wrong usage
  3  refused: the patch or the guest does not fit
  4  not safe within the time given
  5  no such domain, or it cannot be reached
  6  the guest is not as before, or a patch is still in transition; read the message

With 3, 4 and 5 the patch that the message names is not applied, or not reverted. What a command has done
to other patches before is in its report.";

/// Options of every command.
#[derive(Debug, Clone, Args)]
pub struct Options {
    /// The guest, by the name that its QEMU was started with (-name), or by its UUID
    #[arg(long, value_name = "NAME", global = true, conflicts_with = "qmp")]
    pub domain: Option<String>,
    /// The guest, by its QMP socket
    #[arg(long, value_name = "SOCKET", global = true)]
    pub qmp: Option<PathBuf>,
    /// The guest, by the process that runs it under KVM, whatever program that is; the program is asked nothing
    #[arg(long, value_name = "PID", global = true, conflicts_with_all = ["domain", "qmp"], value_parser = clap::value_parser!(i32).range(1..))]
    pub pid: Option<i32>,
    /// One JSON document on standard output in place of text
    #[arg(long, global = true)]
    pub json: bool,
    /// How long to wait for a safe moment, and for the end of a transition
    #[arg(long, value_name = "SECONDS", default_value_t = 10.0, value_parser = seconds, global = true)]
    pub timeout: f64,
    /// When it is safe to switch functions; revert always waits until no task is in the new code
    #[arg(long, value_enum, default_value_t = ModelName::CleanCut, global = true)]
    pub model: ModelName,
    /// With --model hybrid: how long to try clean-cut before a transition begins (at most --timeout)
    #[arg(long, value_name = "MILLISECONDS", default_value_t = 100, global = true)]
    pub grace: u64,
    /// How the guest's vCPUs are paused
    #[arg(long, value_enum, default_value_t = PauseName::Auto, global = true)]
    pub pause: PauseName,
    /// How long QEMU may take for each answer, also in the pause [default: 10]
    #[arg(long, value_name = "SECONDS", value_parser = reply_seconds, global = true, hide = true)]
    pub reply_timeout: Option<f64>,
    /// Whether the process that reads the guest gives up its rights
    #[arg(long, value_enum, default_value_t = SandboxName::Auto, global = true)]
    pub sandbox: SandboxName,
    /// Directory of modules for the bare command
    #[arg(long, value_name = "DIR", default_value = PATCHES_DEFAULT, global = true)]
    pub patches: PathBuf,
    /// Say more: what was found and each try (-vv: each step)
    #[arg(short, long, action = clap::ArgAction::Count, global = true)]
    pub verbose: u8,
}

impl Options {
    /// `--domain`, `--qmp` or `--pid`, if one of them was given.
    pub fn selector(&self) -> Option<Selector> {
        match (&self.domain, &self.qmp, self.pid) {
            (_, _, Some(pid)) => Some(Selector::Process(pid)),
            (_, Some(socket), None) => Some(Selector::QmpSocket(socket.clone())),
            (Some(name), None, None) => Some(Selector::Name(name.clone())),
            (None, None, None) => None,
        }
    }

    /// `--model` and `--timeout`.
    pub fn patching(&self) -> PatchOptions {
        PatchOptions {
            model: self.model.model(),
            timeout: Duration::from_secs_f64(self.timeout),
            grace: Duration::from_millis(self.grace),
        }
    }
}

/// Methods of the pause by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum PauseName {
    /// ptrace under KVM, where the vCPUs' threads are understood; else qmp
    Auto,
    /// the vCPUs' threads alone are stopped; needs KVM and the right to trace QEMU
    Ptrace,
    /// QEMU stops the guest, and writes its disks out in the pause
    Qmp,
}

impl PauseName {
    /// The method.
    pub fn method(self) -> PauseMethod {
        match self {
            Self::Auto => PauseMethod::Auto,
            Self::Ptrace => PauseMethod::Ptrace,
            Self::Qmp => PauseMethod::Qmp,
        }
    }
}

/// Sandboxes by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum SandboxName {
    /// as far as the host's kernel lets it; -vv says what is missing
    Auto,
    /// all of them, or the command is refused
    Require,
    /// no: one process does all, with the rights that it was started with
    Off,
}

impl SandboxName {
    /// The library's.
    pub fn sandbox(self) -> Sandbox {
        match self {
            Self::Auto => Sandbox::Auto,
            Self::Require => Sandbox::Require,
            Self::Off => Sandbox::Off,
        }
    }
}

/// Consistency models by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ModelName {
    /// every task's stack is clear of the old functions at one instant
    CleanCut,
    /// the same, if that is so within --grace; else task by task: those inside stay in the code that they are in until they have left it
    Hybrid,
    /// at once, whatever runs: only for changes that may be mixed with the old code
    None,
}

impl ModelName {
    /// The core's model.
    pub fn model(self) -> Model {
        match self {
            Self::CleanCut => Model::CleanCut,
            Self::Hybrid => Model::Hybrid,
            Self::None => Model::None,
        }
    }
}

/// Commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Apply livepatch modules
    Apply {
        /// Modules (.ko), applied one after another
        #[arg(required = true, value_name = "FILE.ko")]
        files: Vec<PathBuf>,
    },
    /// Say what apply would do; the guest is not touched
    Check {
        /// Modules (.ko)
        #[arg(required = true, value_name = "FILE.ko")]
        files: Vec<PathBuf>,
    },
    /// Build a livepatch module from a source change; needs no guest
    #[cfg(feature = "build")]
    Build(Box<BuildOptions>),
    /// Show the guest's kernel, its patches and the state of each function
    Status,
    /// Revert patches
    Revert {
        /// Patches, by the names that status shows
        #[arg(value_name = "ID", required_unless_present = "all", conflicts_with = "all")]
        ids: Vec<String>,
        /// Every patch, the last applied first
        #[arg(long)]
        all: bool,
    },
    /// Go on with a patch that is in transition, until all tasks have moved over
    Finish,
    /// Move the running guest into another QEMU of this host, its patches intact
    Upgrade(UpgradeOptions),
    /// Show what was found in the guest: kernel, addresses, caves, sources
    Inspect,
    /// List the running guests of this host: every QEMU, and every other guest under KVM
    Domains,
    /// Restore the guest if its vmpatch is killed; started by vmpatch itself
    #[command(hide = true)]
    Supervise {
        /// How the guest is reached, as JSON
        #[arg(value_parser = Route::from_argument)]
        route: Route,
    },
    /// Become a QEMU; started by vmpatch itself
    #[command(hide = true)]
    Launch,
    /// Finish or cancel a migration if its vmpatch is killed; started by vmpatch itself
    #[command(hide = true)]
    WatchMove {
        /// The old QEMU process
        old: i32,
        /// Whether the guest ran
        #[arg(action = clap::ArgAction::Set)]
        was_running: bool,
        /// The guest's QMP socket
        socket: PathBuf,
        /// Its tap devices
        taps: String,
    },
}

/// Options of `upgrade`.
#[derive(Debug, Clone, Args)]
pub struct UpgradeOptions {
    /// The QEMU program to move the guest into
    #[arg(long, value_name = "BIN")]
    pub qemu: PathBuf,
    /// Say whether and how it would be done: the new process is started, compared, and ended; the guest is not touched
    #[arg(long)]
    pub check: bool,
    /// How the guest's memory is migrated; without it, the best method that fits
    #[arg(long, value_enum)]
    pub method: Option<MethodName>,
    /// Maximum downtime if precopy does not converge; starts at 20
    #[arg(long, value_name = "MILLISECONDS", default_value_t = 300)]
    pub downtime: u64,
    /// The most to copy in a second; without it, as much as there is
    #[arg(long, value_name = "MIB")]
    pub bandwidth: Option<u64>,
    /// How long the new process may take to begin, and then the guest to get there, before the move is given up
    #[arg(long, value_name = "SECONDS", default_value_t = 300.0, value_parser = seconds)]
    pub within: f64,
    /// Folder with the new QEMU's firmware (its -L), in place of those on the guest's command line
    #[arg(long, value_name = "DIR")]
    pub data_dir: Vec<PathBuf>,
}

impl UpgradeOptions {
    /// The library's options.
    pub fn options(&self) -> upgrade::UpgradeOptions {
        upgrade::UpgradeOptions {
            qemu: self.qemu.clone(),
            check: self.check,
            method: self.method.map(MethodName::method),
            downtime_ms: self.downtime,
            bandwidth: self.bandwidth.map(|mib| mib.saturating_mul(1 << 20)),
            time_max: Duration::from_secs_f64(self.within),
            data_dirs: self.data_dir.clone(),
        }
    }
}

/// Migration methods by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum MethodName {
    /// handed over as descriptors (both QEMU 10.0 or later, shared RAM, -machine aux-ram-share=on)
    CprTransfer,
    /// left in the file that both map (RAM in a shared file)
    #[value(name = "x-ignore-shared")]
    IgnoreShared,
    /// copied while the guest runs
    Precopy,
}

impl MethodName {
    /// QEMU's method.
    pub fn method(self) -> Method {
        match self {
            Self::CprTransfer => Method::CprTransfer,
            Self::IgnoreShared => Method::IgnoreShared,
            Self::Precopy => Method::Precopy,
        }
    }
}

/// The longest time-out: a day.
const TIMEOUT_SECONDS_MAX: f64 = 86_400.0;

/// The shortest time for an answer of QEMU's, which takes that long to be scheduled on a busy host.
const REPLY_SECONDS_MIN: f64 = 0.1;

fn seconds(text: &str) -> Result<f64, String> {
    let seconds: f64 = text.parse().map_err(|_| "not a number of seconds".to_owned())?;
    if (0.0..=TIMEOUT_SECONDS_MAX).contains(&seconds) {
        Ok(seconds)
    } else {
        Err(format!("not between 0 and {TIMEOUT_SECONDS_MAX} seconds"))
    }
}

fn reply_seconds(text: &str) -> Result<f64, String> {
    match seconds(text)? {
        seconds if seconds >= REPLY_SECONDS_MIN => Ok(seconds),
        _ => Err(format!("less than {REPLY_SECONDS_MIN} seconds")),
    }
}

/// The options of a `build` command line, for tests.
#[cfg(all(test, feature = "build"))]
pub fn build_options(words: &[&str]) -> BuildOptions {
    let line = ["vmpatch", "build"].iter().chain(words);
    match Cli::try_parse_from(line).unwrap().command {
        Some(Command::Build(options)) => *options,
        other => panic!("{other:?}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        command().debug_assert();
    }

    #[test]
    fn an_option_is_in_the_help_of_the_commands_on_which_it_acts() {
        let help = |words: &[&str]| {
            let line = ["vmpatch"].iter().chain(words).chain(&["--help"]);
            command().try_get_matches_from(line).unwrap_err().to_string()
        };
        for (words, shown) in [
            (
                &[][..],
                &[
                    "--domain",
                    "--qmp",
                    "--pid",
                    "--timeout",
                    "--model",
                    "--grace",
                    "--pause",
                    "--sandbox",
                    "--patches",
                ][..],
            ),
            (
                &["apply"],
                &[
                    "--domain",
                    "--qmp",
                    "--pid",
                    "--timeout",
                    "--model",
                    "--grace",
                    "--pause",
                    "--sandbox",
                ],
            ),
            (
                &["revert"],
                &["--domain", "--qmp", "--pid", "--timeout", "--pause", "--sandbox"],
            ),
            (&["status"], &["--domain", "--qmp", "--pid", "--sandbox"]),
            (&["upgrade"], &["--domain", "--qmp"]),
            (&["domains"], &["--sandbox"]),
        ] {
            let help = help(words);
            for name in OF_SOME {
                let option = format!("--{name}");
                assert_eq!(
                    help.contains(&option),
                    shown.contains(&option.as_str()),
                    "{words:?} {option}"
                );
            }
            assert!(help.contains("--json") && help.contains("--verbose"), "{help}");
        }
        let line = ["vmpatch", "domains", "--domain", "a", "--timeout", "1"];
        let cli = Cli::from_arg_matches(&command().try_get_matches_from(line).unwrap()).unwrap();
        assert_eq!((cli.options.domain.as_deref(), cli.options.timeout), (Some("a"), 1.0));
    }

    #[test]
    fn a_guest_is_named_in_one_way() {
        let selector = |words: &[&str]| {
            let line = ["vmpatch", "status"].iter().chain(words);
            Cli::try_parse_from(line).ok()?.options.selector()
        };
        assert_eq!(selector(&["--pid", "42"]), Some(Selector::Process(42)));
        assert_eq!(selector(&["--domain", "a"]), Some(Selector::Name("a".to_owned())));
        for wrong in [
            &["--pid", "0"][..],
            &["--pid", "-1"],
            &["--pid", "4294967297"],
            &["--pid", "1", "--domain", "a"],
            &["--pid", "1", "--qmp", "/q"],
        ] {
            assert_eq!(selector(wrong), None, "{wrong:?}");
        }
    }

    #[test]
    fn options_may_stand_before_and_behind_the_command() {
        for line in [
            &["vmpatch", "--domain", "vm42", "status", "--json"][..],
            &["vmpatch", "status", "--json", "--domain", "vm42"],
        ] {
            let cli = Cli::try_parse_from(line).unwrap();
            assert_eq!(cli.options.domain.as_deref(), Some("vm42"));
            assert!(cli.options.json);
        }
    }

    #[test]
    fn revert_wants_names_or_all_but_not_both() {
        assert!(Cli::try_parse_from(["vmpatch", "--domain", "a", "revert"]).is_err());
        assert!(Cli::try_parse_from(["vmpatch", "--domain", "a", "revert", "--all", "x"]).is_err());
        assert!(Cli::try_parse_from(["vmpatch", "--domain", "a", "revert", "--all"]).is_ok());
    }

    #[test]
    fn a_timeout_is_a_number_of_seconds() {
        assert!(Cli::try_parse_from(["vmpatch", "--timeout", "soon", "status"]).is_err());
        assert!(Cli::try_parse_from(["vmpatch", "--timeout", "-1", "status"]).is_err());
        assert!(Cli::try_parse_from(["vmpatch", "--timeout", "inf", "status"]).is_err());
        assert!(Cli::try_parse_from(["vmpatch", "--timeout", "0.5", "status"]).is_ok());
    }

    #[test]
    fn a_time_for_answers_is_neither_nothing_nor_the_default() {
        let parsed = |seconds: &str| Cli::try_parse_from(["vmpatch", "apply", "a.ko", "--reply-timeout", seconds]);
        assert_eq!(parsed("2").unwrap().options.reply_timeout, Some(2.0));
        assert!(parsed("0").is_err() && parsed("soon").is_err());
        let usual = Cli::try_parse_from(["vmpatch", "apply", "a.ko"]).unwrap();
        assert_eq!(usual.options.reply_timeout, None);
    }
}
