//! The support matrix: makes all checks of `e2e::matrix` on guests of every kernel that has a short name, whatever the outcome of
//! each, and writes what holds into `docs/support.md`, between two comments. What does not hold is listed below with its reason.
//!
//! usage: cargo run --release -p e2e --bin matrix [KERNEL…]
//!
//! KERNEL is a short name (see `vmpatch-images list`) or the name of a kernel's package. With any, the result is printed and not
//! written.

use std::error::Error;
use std::fmt::Write as _;
use std::panic::{self, AssertUnwindSafe};
use std::path::Path;
use std::process::ExitCode;
use std::{fs, io};

use e2e::bed::assert_healthy;
use e2e::kit::Modules;
use e2e::matrix::{CHECKS, Levels, Outcome, Pti, Setting, Stage};
use e2e::vmpatch::Vmpatch;
use images::guest::{Guest, Ram};
use images::kernel::Kernel;

/// The lines around the table.
const MARKS: [&str; 2] = [
    "<!-- matrix: written by tests/src/bin/matrix.rs -->",
    "<!-- end of matrix -->",
];

/// What a check came to, or why it does not hold.
type Cell = Result<Outcome, String>;

/// A guest's line in the table.
struct Row {
    setting: Setting,
    cells: Vec<Cell>,
}

fn main() -> ExitCode {
    let names: Vec<String> = std::env::args().skip(1).collect();
    let done = run(&names);
    done.unwrap_or_else(|error| {
        eprintln!("matrix: {error}");
        ExitCode::FAILURE
    })
}

fn run(names: &[String]) -> Result<ExitCode, Box<dyn Error>> {
    let kernels = match names {
        [] => Kernel::TABLE.to_vec(),
        some => some.iter().map(|name| Kernel::named(name)).collect(),
    };
    let mut rows = Vec::new();
    for setting in kernels.into_iter().flat_map(settings) {
        println!("{}: {setting}", setting.kernel.label());
        let row = row(setting);
        for (check, cell) in CHECKS.iter().zip(&row.cells) {
            println!("  {:<24} {}", check.name, word(cell));
        }
        rows.push(row);
    }
    let table = table(&rows);
    if names.is_empty() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/support.md");
        let text = fs::read_to_string(&path)?;
        fs::write(&path, with_table(&text, &table)?)?;
    } else {
        println!("\n{table}");
    }
    let holds = rows.iter().all(|row| row.cells.iter().all(Result::is_ok));
    Ok(if holds { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The kinds of guest in which each kernel is tried: every value of each choice, in as few as that takes.
fn settings(kernel: Kernel) -> [Setting; 2] {
    let setting = |vcpus, pti, levels, ram| Setting {
        kernel: kernel.clone(),
        vcpus,
        pti,
        levels,
        ram,
    };
    [
        setting(1, Pti::On, Levels::Four, Ram::Private),
        setting(2, Pti::Off, Levels::Five, Ram::SharedMemfd),
    ]
}

/// Makes all checks, and after them whether the guest is healthy. Where one does not hold, the next begins with what was applied
/// taken out.
fn row(setting: Setting) -> Row {
    let ready = attempt(|| {
        let modules = Modules::of(&setting.kernel);
        (
            modules,
            Guest::boot(setting.config()).unwrap_or_else(|error| panic!("{error}")),
        )
    });
    let cells = match ready {
        Err(why) => vec![Err(why); CHECKS.len()],
        Ok((modules, guest)) => {
            let stage = Stage {
                setting: &setting,
                guest: &guest,
                modules: &modules,
            };
            let made = CHECKS.map(|check| {
                let cell = attempt(|| {
                    let outcome = (check.run)(&stage);
                    assert_healthy(&guest);
                    outcome
                });
                if cell.is_err() {
                    let _ = attempt(|| Vmpatch::on(&guest).run(&["revert", "--all"]));
                }
                cell
            });
            made.to_vec()
        }
    };
    Row { setting, cells }
}

/// Runs what panics where it fails; the reason is the first line of the panic, or what vmpatch said where it is about vmpatch.
fn attempt<T>(run: impl FnOnce() -> T) -> Result<T, String> {
    panic::catch_unwind(AssertUnwindSafe(run)).map_err(|payload| {
        let text = payload.downcast_ref::<String>().map(String::as_str);
        let text = text
            .or(payload.downcast_ref::<&str>().copied())
            .unwrap_or("no reason given");
        reason(text).to_owned()
    })
}

fn reason(text: &str) -> &str {
    let said = text.lines().find_map(|line| line.strip_prefix("vmpatch: "));
    said.or(text.lines().next()).unwrap_or_default()
}

fn word(cell: &Cell) -> &str {
    match cell {
        Ok(Outcome::Holds) => "yes",
        Ok(Outcome::Nothing) => "–",
        Err(why) => why,
    }
}

/// The table, and below it every reason once.
fn table(rows: &[Row]) -> String {
    let mut reasons: Vec<&str> = Vec::new();
    let mut text = String::from("| kernel (Debian package) | guest |");
    // Writing to a string can't fail.
    for check in CHECKS {
        let _ = write!(text, " {} |", check.name);
    }
    let _ = writeln!(text, "\n|{}", "---|".repeat(CHECKS.len() + 2));
    for Row { setting, cells } in rows {
        let package = setting.kernel.package();
        let name = package.strip_prefix("linux-image-").unwrap_or(package);
        let version = setting.kernel.version().map(|version| format!(" ({version})"));
        let _ = write!(text, "| {name}{} | {setting} |", version.unwrap_or_default());
        for cell in cells {
            let _ = match cell {
                Ok(_) => write!(text, " {} |", word(cell)),
                Err(why) => write!(text, " no, {} |", number(&mut reasons, why)),
            };
        }
        text.push('\n');
    }
    for (index, why) in reasons.iter().enumerate() {
        let _ = writeln!(text, "\n{}: {why}", index + 1);
    }
    text
}

/// The number of a reason, which is a new one where it was not given before.
fn number<'a>(reasons: &mut Vec<&'a str>, why: &'a str) -> usize {
    let known = reasons.iter().position(|reason| *reason == why);
    known.map_or_else(
        || {
            reasons.push(why);
            reasons.len()
        },
        |index| index + 1,
    )
}

/// The document with the table between its marks.
fn with_table(text: &str, table: &str) -> io::Result<String> {
    let [start, end] = MARKS;
    let parts = text
        .split_once(start)
        .and_then(|(before, rest)| Some((before, rest.split_once(end)?.1)));
    let (before, after) =
        parts.ok_or_else(|| io::Error::other(format!("no {start:?} … {end:?} in docs/support.md")))?;
    Ok(format!("{before}{start}\n\n{table}\n{end}{after}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row_of(cells: Vec<Cell>) -> Row {
        let [setting, _] = settings(Kernel::CLOUD_6_1);
        Row { setting, cells }
    }

    #[test]
    fn a_reason_stands_below_the_table_once() {
        let failed = || Err("it has no cave".to_owned());
        let table = table(&[
            row_of(vec![Ok(Outcome::Holds), failed()]),
            row_of(vec![failed(), Ok(Outcome::Nothing)]),
        ]);
        let lines: Vec<&str> = table.lines().skip(2).collect();
        assert_eq!(
            lines,
            [
                "| 6.1.0-47-cloud-amd64 (6.1.170-3) | 1 vCPU, PTI, 4 levels, private RAM | yes | no, 1 |",
                "| 6.1.0-47-cloud-amd64 (6.1.170-3) | 1 vCPU, PTI, 4 levels, private RAM | no, 1 | – |",
                "",
                "1: it has no cave",
            ]
        );
    }

    #[test]
    fn what_vmpatch_says_is_the_reason_where_it_says_something() {
        let answer = "assertion failed\n--- stderr\nvmpatch: the module does not fit\nhint: none";
        assert_eq!(reason(answer), "the module does not fit");
        assert_eq!(reason("it does not boot\nand more"), "it does not boot");
        assert_eq!(attempt(|| panic!("no {}", "luck")), Err::<(), _>("no luck".to_owned()));
    }

    #[test]
    fn only_what_is_between_the_marks_is_replaced() {
        let [start, end] = MARKS;
        let text = format!("# Title\n{start}\nold\n{end}\nrest\n");
        let written = with_table(&text, "new\n").unwrap();
        assert_eq!(written, format!("# Title\n{start}\n\nnew\n\n{end}\nrest\n"));
        assert!(with_table("# Title\n", "new\n").is_err());
    }
}
