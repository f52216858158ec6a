//! Builds real fixes out of Debian's stable updates, chosen by a rule ([`e2e::stable`]), and tries each module that comes of it: applied
//! from outside and reverted, then loaded by the guest itself and turned off. Writes a table.
//!
//! usage: cargo run --release -p e2e --bin stable_fixes [COUNT [UPDATE[=FROM]]...]
//!
//! COUNT fixes that change code of the kernel, for each of the updates (6.1, 6.12, 7.2); with FROM, from that file of an update's order on.

use std::collections::{BTreeMap, BTreeSet};
use std::error::Error;
use std::fs;
use std::iter;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use e2e::health;
use e2e::kit;
use e2e::own_livepatch::OwnLivepatch;
use e2e::report;
use e2e::stable::{Sources, UPDATES, Update};
use e2e::vmpatch::{self, Vmpatch};
use images::guest::Guest;
use images::kernel::Kernel;
use images::modules;
use patch_build::build::Built;
use patch_build::cache::Cache;
use patch_build::compile;
use patch_build::request::{self, ChangeChoice, KernelChoice, Request};
use patch_build::sheet::ReviewSheet;
use patch_build::touched;

const COUNT_DEFAULT: usize = 20;
/// What a guest does while a fix is in force: files, tasks and sockets, so that code that is run often is run.
const WORK: &str = "mkdir -p /tmp/w && cp /bin/busybox /tmp/w/x && sync && find /proc/self /sys/kernel/mm >/tmp/w/y; ps >/tmp/w/z; \
    ip addr >/tmp/w/z; netstat -an >/tmp/w/z; ping -c 1 127.0.0.1 >/tmp/w/z; rm -r /tmp/w";
/// How long that may take where the host is busy.
const WORK_LIMIT: Duration = Duration::from_secs(300);

type Result<T> = std::result::Result<T, Box<dyn Error>>;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("stable_fixes: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let count = words.first().map_or(Ok(COUNT_DEFAULT), |word| word.parse())?;
    let labels = words.get(1..).unwrap_or_default();
    vmpatch::program()?;
    println!("| update | file | hunks | build | functions | in the guest |\n|---|---|---|---|---|---|");
    let folder = std::env::temp_dir().join(format!("vmpatch-stable-{}", std::process::id()));
    fs::create_dir_all(&folder)?;
    let mut sums = BTreeMap::new();
    let from = |update: &Update| -> Option<usize> {
        labels.iter().find_map(|word| match word.split_once('=') {
            None => (word == update.label).then_some(0),
            Some((label, from)) => from.parse().ok().filter(|_| label == update.label),
        })
    };
    for update in &UPDATES {
        if let Some(from) = from(update).or(labels.is_empty().then_some(0)) {
            one_update(update, count, from, &folder, &mut sums)?;
        }
    }
    fs::remove_dir_all(&folder)?;
    println!();
    for (what, number) in sums {
        println!("{what}: {number}");
    }
    Ok(())
}

/// What became of a build.
enum Outcome {
    /// Nothing of the kernel is changed by it.
    NoChange(&'static str),
    /// It needs more than its own file and headers.
    NotAlone,
    /// It was not built: the names of what speaks against it, or the reason.
    Refused(String),
    /// Something went wrong.
    Failed(String),
    Built {
        module: PathBuf,
        sheet: Box<ReviewSheet>,
    },
}

fn one_update(
    update: &Update,
    count: usize,
    from: usize,
    folder: &Path,
    sums: &mut BTreeMap<String, usize>,
) -> Result<()> {
    let sources = Sources::of(update)?;
    eprintln!("{}: {} files differ", update.label, sources.files.len());
    let mut guest = Bench::new(update);
    let mut done = 0;
    for (number, file) in sources.files.iter().enumerate().skip(from) {
        if done == count {
            break;
        }
        let mut files = vec![file.clone()];
        let name = format!("livepatch-{}-{number}", update.label.replace('.', "-"));
        let mut diff = sources.diff(&files)?;
        let mut outcome = build(update, &name, &diff, folder);
        let headers = sources.headers(file)?;
        if matches!(outcome, Outcome::NotAlone) && !headers.is_empty() {
            files.extend(headers);
            diff = sources.diff(&files)?;
            outcome = build(update, &name, &diff, folder);
        }
        let hunks = diff.lines().filter(|line| line.starts_with("@@ ")).count();
        let (kind, text, functions, seen) = match &outcome {
            Outcome::NoChange(why) => ("no change of code", (*why).to_owned(), String::new(), String::new()),
            Outcome::NotAlone => ("not alone", "not alone".to_owned(), String::new(), String::new()),
            Outcome::Refused(why) => ("refused", format!("refused: {why}"), String::new(), String::new()),
            Outcome::Failed(why) => ("failed", format!("failed: {why}"), String::new(), String::new()),
            Outcome::Built { module, sheet } => {
                let seen = guest
                    .try_out(module, &name, sheet)
                    .unwrap_or_else(|why| format!("FAILED: {why}"));
                ("built", "built".to_owned(), functions(sheet), seen)
            }
        };
        done += usize::from(matches!(kind, "refused" | "failed" | "built"));
        *sums.entry(format!("{}, {kind}", update.label)).or_default() += 1;
        let files = files.join("`, `");
        println!(
            "| {} | `{files}` | {hunks} | {text} | {functions} | {seen} |",
            update.label
        );
    }
    Ok(())
}

fn build(update: &Update, name: &str, diff: &str, folder: &Path) -> Outcome {
    let request = Request {
        kernel: KernelChoice::Package(update.kernel.to_owned()),
        change: ChangeChoice::Patch {
            name: format!("{name}.patch"),
            text: diff.to_owned(),
        },
        name: name.to_owned(),
        version: "1".to_owned(),
        description: String::new(),
        cves: Vec::new(),
        builder: "stable_fixes".to_owned(),
        allow: BTreeSet::new(),
    };
    let cache = match Cache::from_env() {
        Ok(cache) => cache,
        Err(error) => return Outcome::Failed(error.to_string()),
    };
    match request::build(&cache, &request, &|_| {}, &|warning| eprintln!("{name}: {warning}")) {
        Ok(Built::Nothing) => Outcome::NoChange("changes no code"),
        Ok(Built::Module { bytes, sheet }) => {
            let module = folder.join(format!("{name}.ko"));
            match fs::write(&module, bytes) {
                Ok(()) => Outcome::Built {
                    module,
                    sheet: Box::new(sheet),
                },
                Err(error) => Outcome::Failed(error.to_string()),
            }
        }
        Ok(Built::Refused { findings, .. }) => {
            for finding in &findings {
                eprintln!("{name}: {finding}");
            }
            let risks: BTreeSet<&str> = findings.iter().map(|finding| finding.risk.name()).collect();
            Outcome::Refused(risks.into_iter().collect::<Vec<_>>().join(", "))
        }
        Err(
            request::Error::Compile(error @ compile::Error::After { .. })
            | request::Error::Touched(touched::Error::Compile(error @ compile::Error::After { .. })),
        ) => {
            eprintln!("{name}: {}", chain(&error));
            Outcome::NotAlone
        }
        Err(request::Error::Touched(touched::Error::Nowhere { .. })) => Outcome::NoChange("none of this kernel"),
        Err(error) if error.is_refusal() => Outcome::Refused(chain(&error)),
        Err(error) => Outcome::Failed(chain(&error)),
    }
}

/// An error with its causes.
fn chain(error: &dyn Error) -> String {
    let causes = iter::successors(Some(error), |error: &&dyn Error| (*error).source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

/// The functions that a module replaces.
fn functions(sheet: &ReviewSheet) -> String {
    let replaced = sheet.items.iter().filter(|item| item.sympos.is_some());
    let names: BTreeSet<String> = replaced.map(|item| format!("`{}`", item.name)).collect();
    names.into_iter().collect::<Vec<_>>().join(", ")
}

/// A guest for the fixes of one update, booted when the first module is there.
struct Bench<'a> {
    update: &'a Update,
    guest: Option<Guest>,
}

impl<'a> Bench<'a> {
    fn new(update: &'a Update) -> Self {
        Self { update, guest: None }
    }

    /// What a module does in the guest.
    fn try_out(&mut self, module: &Path, name: &str, sheet: &ReviewSheet) -> Result<String> {
        let guest = match self.guest.take() {
            Some(guest) => guest,
            None => Guest::boot(kit::guest(Kernel::named(self.update.kernel)))?,
        };
        // One that is not given back is not used again.
        let said = seen(&guest, module, name, sheet)?;
        self.guest = Some(guest);
        Ok(said)
    }
}

fn seen(guest: &Guest, module: &Path, name: &str, sheet: &ReviewSheet) -> Result<String> {
    let mut said = Vec::new();
    let objects: BTreeSet<&str> = sheet.items.iter().filter_map(|item| item.object.as_deref()).collect();
    for object in &objects {
        if let Err(why) = load(guest, object) {
            said.push(format!("the guest does not load {object} ({why})"));
        }
    }
    let vmpatch = Vmpatch::on(guest);
    let file = module.display().to_string();
    let answer = vmpatch.run(&["apply", "--json", &file]);
    if answer.code != Some(0) {
        return Err(format!("apply: {}", answer.stderr.trim()).into());
    }
    let applied = answer.json();
    let pending = report::states(&applied).iter().any(|(_, state, _)| *state == "pending");
    guest.command(&["sh", "-c", WORK]).limit(WORK_LIMIT).text()?;
    healthy(guest)?;
    let status = vmpatch.run(&["status", "--json"]);
    let is_in = status.code == Some(0)
        && report::states(&status.json())
            .iter()
            .any(|(_, state, _)| *state == "applied");
    let reverted = vmpatch.run(&["revert", "--all", "--json"]);
    if reverted.code != Some(0) || !(is_in || pending) {
        return Err(format!("status: {status}; revert: {reverted}").into());
    }
    healthy(guest)?;
    said.push(if pending {
        "pending".to_owned()
    } else {
        "applied, reverted".to_owned()
    });
    let is_traced = report::redirects(&applied).iter().all(|(_, how)| *how == "ftrace");
    if is_traced {
        let own = OwnLivepatch::try_load(guest, &file, name)?;
        guest.command(&["sh", "-c", WORK]).limit(WORK_LIMIT).text()?;
        own.unload();
        healthy(guest)?;
        said.push("loaded by the guest".to_owned());
    } else {
        said.push("no ftrace site: not for the guest's own livepatch".to_owned());
    }
    Ok(said.join("; "))
}

/// Loads a module of the kernel's with all that it needs, as far as it is not there.
fn load(guest: &Guest, name: &str) -> Result<()> {
    let kernel = guest
        .config()
        .kernel
        .as_ref()
        .ok_or("a guest without a kernel")?
        .fetch()?;
    let there = guest.text(&["cat", "/proc/modules"])?;
    for module in modules::with_dependencies(&kernel, &[name])? {
        if there.lines().any(|line| line.split(' ').next() == Some(&module.name)) {
            continue;
        }
        guest.push("/tmp/module.ko", &module.bytes, 0o644)?;
        guest.text(&["insmod", "/tmp/module.ko"])?;
    }
    Ok(())
}

fn healthy(guest: &Guest) -> Result<()> {
    match health::complaints(&guest.console()?).first() {
        None => Ok(()),
        Some(line) => Err(format!("the guest's kernel complains: {line}").into()),
    }
}
