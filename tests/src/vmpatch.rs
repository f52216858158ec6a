//! The program under test, built once and run as an operator runs it: by its command line, exit code and output.

use std::fmt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

use images::guest::Guest;
use images::host::{Host, ThisMachine};
use images::host_box::HostBox;
use serde_json::Value;

/// The optimised program, built from the sources as they are now: a test of an older one would prove nothing.
pub fn program() -> Result<&'static Path, String> {
    static PROGRAM: LazyLock<Result<PathBuf, String>> = LazyLock::new(build);
    PROGRAM.as_deref().map_err(Clone::clone)
}

fn build() -> Result<PathBuf, String> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or(Path::new("."));
    let output = Command::new(cargo)
        .args([
            "build",
            "--quiet",
            "--release",
            "--package",
            "host-agent",
            "--bin",
            "vmpatch",
        ])
        .arg("--message-format=json-render-diagnostics")
        .current_dir(workspace)
        .stderr(Stdio::inherit())
        .output()
        .map_err(|error| format!("cargo can't be started: {error}"))?;
    if !output.status.success() {
        return Err(format!("vmpatch does not build: {}", output.status));
    }
    let messages = String::from_utf8_lossy(&output.stdout).into_owned();
    let messages = messages
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok());
    messages
        .filter_map(|message| Some(PathBuf::from(message.get("executable")?.as_str()?)))
        .next_back()
        .ok_or_else(|| "cargo built vmpatch, but does not say where".to_owned())
}

/// What `--timeout` is by itself.
const TIMEOUT_S: u32 = 10;

/// vmpatch with one guest.
#[derive(Clone, Debug)]
pub struct Vmpatch {
    target: [String; 2],
    folder: Option<PathBuf>,
    host: Arc<dyn Host>,
}

impl Vmpatch {
    /// For this guest, by its name, on the machine that the guest's QEMU runs on. In a box, vmpatch and the modules that it is to apply
    /// are placed before it runs, and `--timeout` is longer, by [`Vmpatch::run`] and what is made of it; the other methods are for
    /// this machine.
    pub fn on(guest: &Guest) -> Self {
        Self {
            host: Arc::clone(guest.host()),
            ..Self::domain(guest.name())
        }
    }

    /// For the domain of that name, which need not exist.
    pub fn domain(name: &str) -> Self {
        Self {
            target: ["--domain".into(), name.into()],
            folder: None,
            host: Arc::new(ThisMachine),
        }
    }

    /// For the guest behind a QMP socket.
    pub fn socket(path: &Path) -> Self {
        Self {
            target: ["--qmp".into(), path.display().to_string()],
            folder: None,
            host: Arc::new(ThisMachine),
        }
    }

    /// For the guest that a process of the box runs.
    pub fn process(host: &HostBox, pid: u32) -> Self {
        Self {
            target: ["--pid".into(), pid.to_string()],
            folder: None,
            host: host.host(),
        }
    }

    /// Run in that folder.
    #[must_use]
    pub fn in_folder(mut self, folder: &Path) -> Self {
        self.folder = Some(folder.to_owned());
        self
    }

    /// Runs it to its end.
    ///
    /// # Panics
    ///
    /// If it can't be built or started.
    pub fn run(&self, args: &[&str]) -> Answer {
        let mut words = self.words(args);
        // In a box, safe moments are as slow to come as all else.
        let timeout = (TIMEOUT_S * self.host.slowness()).to_string();
        if self.host.slowness() > 1 && !args.contains(&"--timeout") {
            words.extend(["--timeout", &timeout]);
        }
        self.run_line(&words, self.folder.as_deref().unwrap_or(Path::new("/")))
    }

    /// Runs it without naming the guest.
    ///
    /// # Panics
    ///
    /// If it can't be built or started.
    pub fn run_bare(&self, args: &[&str]) -> Answer {
        self.run_line(args, Path::new("."))
    }

    fn run_line(&self, args: &[&str], folder: &Path) -> Answer {
        let program = program().expect("vmpatch builds");
        self.host.place_program(program).expect("vmpatch is on its host");
        for module in args.iter().filter(|arg| arg.ends_with(".ko")).map(Path::new) {
            // One that does not exist is for vmpatch to name.
            if module.exists() {
                self.host.place(module).expect("the module is on vmpatch's host");
            }
        }
        let program = program.to_string_lossy();
        let start = Instant::now();
        let output = self.host.output(&[&[&*program], args].concat(), folder);
        Answer::new(line(args), output.expect("vmpatch starts"), start.elapsed())
    }

    /// Starts it, as the leader of a process group, as a shell does.
    ///
    /// # Panics
    ///
    /// If it can't be built or started.
    pub fn start(&self, args: &[&str]) -> Child {
        use std::os::unix::process::CommandExt;
        let plain = self.command(args);
        // Whoever runs the tests in the background of a script has Ctrl-C ignored, and that is inherited; an operator has not.
        let mut command = Command::new("env");
        command
            .arg("--default-signal=INT,TSTP")
            .arg(plain.get_program())
            .args(plain.get_args());
        command
            .current_dir(plain.get_current_dir().unwrap_or(Path::new("/")))
            .stdin(Stdio::null());
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
        command.spawn().expect("vmpatch starts")
    }

    /// Runs it to its end with its standard output going there; the answer has none.
    ///
    /// # Panics
    ///
    /// If it can't be built or started.
    pub fn run_into(&self, args: &[&str], stdout: impl Into<Stdio>) -> Answer {
        let mut command = self.command(args);
        let child = command
            .stdout(stdout)
            .stderr(Stdio::piped())
            .spawn()
            .expect("vmpatch starts");
        self.finish(args, child)
    }

    /// Runs it to its end behind a line of shell, in a mount namespace of its own.
    ///
    /// # Panics
    ///
    /// If it can't be built or started, or this is not run by root.
    pub fn run_behind(&self, line: &str, args: &[&str]) -> Answer {
        let own = self.command(args);
        let script = format!("{line} && exec \"$@\"");
        let mut command = Command::new("unshare");
        command.args(["--mount", "sh", "-c", &script, "sh"]);
        command.arg(own.get_program()).args(own.get_args()).stdin(Stdio::null());
        let output = command.output().expect("the host has unshare");
        Answer::new(self.line(args), output, Duration::ZERO)
    }

    /// Waits for one that was started.
    ///
    /// # Panics
    ///
    /// If it can't be waited for.
    pub fn finish(&self, args: &[&str], child: Child) -> Answer {
        Answer::new(
            self.line(args),
            child.wait_with_output().expect("vmpatch can be waited for"),
            Duration::ZERO,
        )
    }

    /// Applies one module, which must succeed, and gives the report.
    ///
    /// # Panics
    ///
    /// If it does not succeed.
    #[track_caller]
    pub fn apply(&self, module: &str) -> Value {
        self.run(&["apply", "--json", module]).expect(0).json()
    }

    /// Takes all patches out, which must succeed, and gives the report.
    ///
    /// # Panics
    ///
    /// If it does not succeed.
    #[track_caller]
    pub fn revert_all(&self) -> Value {
        self.run(&["revert", "--all", "--json"]).expect(0).json()
    }

    /// What `status` says.
    ///
    /// # Panics
    ///
    /// If it does not succeed.
    #[track_caller]
    pub fn status(&self) -> Value {
        self.run(&["status", "--json"]).expect(0).json()
    }

    /// What `inspect` says.
    ///
    /// # Panics
    ///
    /// If it does not succeed.
    #[track_caller]
    pub fn inspect(&self) -> Value {
        self.run(&["inspect", "--json"]).expect(0).json()
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(program().expect("vmpatch builds"));
        command.args(&self.target).args(args).stdin(Stdio::null());
        command.current_dir(self.folder.as_deref().unwrap_or(Path::new("/")));
        command
    }

    fn line(&self, args: &[&str]) -> String {
        line(&self.words(args))
    }

    /// What comes behind the program's name.
    fn words<'a>(&'a self, args: &[&'a str]) -> Vec<&'a str> {
        let target = self.target.iter().map(String::as_str);
        target.chain(args.iter().copied()).collect()
    }
}

/// As it would be typed.
fn line(words: &[&str]) -> String {
    [&["vmpatch"], words].concat().join(" ")
}

/// What a run of vmpatch ended with.
#[derive(Clone, Debug)]
pub struct Answer {
    /// The command line.
    pub line: String,
    /// The exit code; `None` if a signal ended it.
    pub code: Option<i32>,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
    /// From its start to its end.
    pub took: Duration,
}

impl Answer {
    fn new(line: String, output: Output, took: Duration) -> Self {
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        Self {
            line,
            code: output.status.code(),
            stdout: text(output.stdout),
            stderr: text(output.stderr),
            took,
        }
    }

    /// Demands this exit code.
    ///
    /// # Panics
    ///
    /// If it is another one.
    #[track_caller]
    pub fn expect(self, code: i32) -> Self {
        assert_eq!(self.code, Some(code), "{self}");
        self
    }

    /// Standard output as JSON.
    ///
    /// # Panics
    ///
    /// If it is none.
    #[track_caller]
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|error| panic!("no JSON ({error}): {self}"))
    }

    /// The one line in which vmpatch says why it failed.
    ///
    /// # Panics
    ///
    /// If there is none, or more than that, what the guest is like, and a hint: whoever reads it wants to know what to do, not how vmpatch works.
    #[track_caller]
    pub fn complaint(&self) -> &str {
        let is_more = |line: &&str| line.starts_with("hint: ") || line.starts_with("guest: ");
        let mut lines = self.stderr.lines().filter(|line| !is_more(line));
        let (first, second) = (lines.next(), lines.next());
        let complaint = first.and_then(|line| line.strip_prefix("vmpatch: "));
        assert!(second.is_none(), "more than one line: {self}");
        complaint.unwrap_or_else(|| panic!("no line that begins with \"vmpatch: \": {self}"))
    }
}

impl fmt::Display for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            line,
            code,
            stdout,
            stderr,
            ..
        } = self;
        let code = code.map_or("a signal".to_owned(), |code| code.to_string());
        write!(
            f,
            "`{line}` ended with {code}\n--- stdout\n{stdout}--- stderr\n{stderr}"
        )
    }
}
