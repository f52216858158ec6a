//! Runs a program of the host to its end and reports a failure with the program's own words.

use std::io::{self, Write};
use std::path::Path;
use std::process::{Command, ExitStatus, Output, Stdio};
use std::thread;

/// Bytes of a failed program's standard error that go into the error's text: its last lines, where the reason stands.
const STDERR_TAIL_BYTES: usize = 2000;

/// Why a program gave no result.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It could not be started.
    #[error("can't start `{program}` (is it installed?)")]
    Start {
        /// The program with its arguments.
        program: String,
        /// The cause.
        source: io::Error,
    },
    /// It ran and failed.
    #[error("`{program}` failed: {status}: {}", tail(stderr.as_bytes()))]
    Failed {
        /// The program with its arguments.
        program: String,
        /// How it ended.
        status: ExitStatus,
        /// What it wrote to standard error; the text of the error shows the end of it.
        stderr: String,
    },
}

/// Runs `program` with `args` in `directory` and returns its standard output; an exit status other than 0 is an error.
pub fn output(program: &str, args: &[&str], directory: &Path) -> Result<Vec<u8>, Error> {
    let output = command(program, args).current_dir(directory).output();
    result(program, args, output)
}

/// Runs `program` with `args`, `input` on its standard input, and returns its standard output.
pub fn filter(program: &str, args: &[&str], input: &[u8]) -> Result<Vec<u8>, Error> {
    let run = || {
        let mut child = command(program, args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        let stdin = child.stdin.take();
        thread::scope(|scope| {
            // What the program does not read to the end it will complain about itself.
            scope.spawn(move || stdin.map(|mut stdin| stdin.write_all(input)));
            child.wait_with_output()
        })
    };
    result(program, args, run())
}

fn command(program: &str, args: &[&str]) -> Command {
    let mut command = Command::new(program);
    command.args(args).env("LC_ALL", "C");
    command
}

fn result(program: &str, args: &[&str], output: io::Result<Output>) -> Result<Vec<u8>, Error> {
    let spelled = || [&[program], args].concat().join(" ");
    let output = output.map_err(|source| Error::Start {
        program: spelled(),
        source,
    })?;
    if output.status.success() {
        return Ok(output.stdout);
    }
    Err(Error::Failed {
        program: spelled(),
        status: output.status,
        stderr: String::from_utf8_lossy(&output.stderr).trim().to_owned(),
    })
}

/// The last [`STDERR_TAIL_BYTES`] of a text, without the line break at its end.
pub(crate) fn tail(text: &[u8]) -> String {
    let start = text.len().saturating_sub(STDERR_TAIL_BYTES);
    String::from_utf8_lossy(text.get(start..).unwrap_or_default())
        .trim()
        .to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_that_fails_is_reported_with_its_own_words() {
        let error = output("sh", &["-c", "echo reason >&2; exit 3"], Path::new("/")).unwrap_err();
        assert_eq!(
            error.to_string(),
            "`sh -c echo reason >&2; exit 3` failed: exit status: 3: reason"
        );
    }

    #[test]
    fn a_filter_gets_more_input_than_a_pipe_holds() {
        let input = vec![b'x'; 1 << 20];
        assert_eq!(filter("cat", &[], &input).unwrap(), input);
    }

    #[test]
    fn a_missing_program_is_named() {
        let error = output("vmpatch-no-such-program", &["x"], Path::new("/")).unwrap_err();
        assert!(
            error.to_string().starts_with("can't start `vmpatch-no-such-program x`"),
            "{error}"
        );
    }
}
