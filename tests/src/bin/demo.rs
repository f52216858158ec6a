//! The main job, shown on a real guest: two published flaws of a Debian kernel, patched from outside while the guest runs, and
//! the patches taken out again. Every line that looks like a command is one that is run; the demo ends with an error as
//! soon as anything is not as it must be.

use std::error::Error;
use std::fs;
use std::io::{IsTerminal, stdout};
use std::process::ExitCode;
use std::time::Instant;

use e2e::kit::{self, Modules};
use e2e::probe::{self, Seen};
use e2e::vmpatch::{self, Vmpatch};
use e2e::{bed, health};
use images::build::Cve;
use images::guest::Guest;
use images::kernel::Kernel;

/// The guest's name, as in the README.
const NAME: &str = "vm42";

type Result<T> = std::result::Result<T, Box<dyn Error>>;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("\ndemo: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    say("Getting ready: vmpatch, a Debian kernel, and the fixes for it out of Debian's own source packages");
    let program = vmpatch::program()?;
    let kernel = Kernel::CLOUD_6_1;
    let modules = Modules::of(&kernel);
    let fixes = Cve::ALL.map(|cve| modules.cve(cve));
    println!("vmpatch is {}", program.display());

    let start = Instant::now();
    let guest = Guest::boot(kit::guest(kernel).name(NAME))?;
    let version = guest.text(&["cat", "/proc/version"])?;
    println!(
        "{NAME} has booted in {:.1} s: QEMU process {}, {version}",
        start.elapsed().as_secs_f64(),
        guest.pid()
    );
    let boot = boot_id(&guest)?;

    // The modules lie beside one another where vmpatch is run, so that the commands read as they are typed.
    let folder = guest.folder();
    let names: Vec<String> = Cve::ALL.iter().map(|cve| format!("{}.ko", cve.module_name())).collect();
    for (fix, name) in fixes.iter().zip(&names) {
        fs::copy(fix, folder.join(name))?;
    }
    let stage = Stage {
        guest: &guest,
        vmpatch: Vmpatch::on(&guest).in_folder(&folder),
    };
    let names: Vec<&str> = names.iter().map(String::as_str).collect();

    say("The flaws, as any user of the guest sees them");
    stage.probe(Seen::Flawed)?;
    say("What would be done? (the guest is not touched)");
    stage.operate(&[&["check"], &names[..]].concat())?;
    stage.probe(Seen::Flawed)?;
    say("The fixes go in");
    stage.operate(&[&["apply"], &names[..]].concat())?;
    stage.probe(Seen::Fixed)?;
    stage.operate(&["status"])?;
    say("... and out again");
    stage.operate(&["revert", "--all"])?;
    stage.probe(Seen::Flawed)?;
    stage.operate(&["status"])?;

    let console = guest.console()?;
    if boot_id(&guest)? != boot || !health::complaints(&console).is_empty() {
        return Err(format!("the guest is not well; its console:\n{console}").into());
    }
    bed::assert_healthy(&guest);
    say(
        "All as it must be: the guest never rebooted, nothing was installed in it, and its kernel has nothing to complain about",
    );
    Ok(())
}

struct Stage<'a> {
    guest: &'a Guest,
    vmpatch: Vmpatch,
}

impl Stage<'_> {
    /// Shows what an ordinary user of the guest sees, and demands that it is this.
    fn probe(&self, expected: Seen) -> Result<()> {
        for cve in Cve::ALL {
            let program = format!("/opt/{}", cve.program());
            command(&format!("user@{NAME}$ {program}    # {}", cve.id()));
            let (seen, line) = probe::ask(self.guest, cve.program());
            println!("{line}");
            if seen != expected {
                return Err(format!("{} should be {expected:?}", cve.id()).into());
            }
        }
        Ok(())
    }

    /// Shows a command of the operator and its output, and demands that it succeeds.
    fn operate(&self, args: &[&str]) -> Result<()> {
        let answer = self.vmpatch.run(args);
        command(&format!("operator@host$ {}", answer.line));
        print!("{}{}", answer.stdout, answer.stderr);
        println!("({} ms)", answer.took.as_millis());
        match answer.code {
            Some(0) => Ok(()),
            _ => Err(format!("exit code {:?}, expected 0", answer.code).into()),
        }
    }
}

fn boot_id(guest: &Guest) -> Result<String> {
    Ok(guest.text(&["cat", "/proc/sys/kernel/random/boot_id"])?)
}

fn say(what: &str) {
    println!("\n{}", bold(&format!("# {what}")));
}

fn command(line: &str) {
    println!("{}", bold(line));
}

fn bold(text: &str) -> String {
    match stdout().is_terminal() {
        true => format!("\x1b[1m{text}\x1b[0m"),
        false => text.to_owned(),
    }
}
