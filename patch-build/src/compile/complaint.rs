//! What a compiler has against a file, without the command line and the warnings around it.

use crate::command;

/// Errors that are shown: those that follow mostly come of them.
const SHOWN_MAX: usize = 3;

/// Why a file does not compile, for the person who wrote it.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Complaint(String);

impl Complaint {
    /// Out of a command that failed. Files below the folder `after` are named as in the source. Where no line of it is an error (a
    /// program of the build failed), all that was run and said.
    pub(super) fn of(failure: &command::Error, after: &str) -> Self {
        let command::Error::Failed { stderr, .. } = failure else {
            return Self(failure.to_string());
        };
        // "FILE:LINE:COLUMN: error: …"; gcc says "fatal error" of a header that is not there.
        let is_error = |line: &&str| line.contains(": error: ") || line.contains(": fatal error: ");
        let errors: Vec<String> = stderr
            .lines()
            .filter(is_error)
            .map(|line| line.replace(&format!("{after}/"), ""))
            .collect();
        let more = errors.len().saturating_sub(SHOWN_MAX);
        let mut text = errors.iter().take(SHOWN_MAX).cloned().collect::<Vec<_>>().join("; ");
        if more > 0 {
            text.push_str(&format!("; and {more} more"));
        }
        Self(if errors.is_empty() { failure.to_string() } else { text })
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn complaint(stderr: &str) -> String {
        let script = "printf %s \"$1\" >&2; exit 1";
        let failure = command::output("sh", &["-c", script, "a-long-command", stderr], Path::new("/")).unwrap_err();
        Complaint::of(&failure, "vmpatch-after").to_string()
    }

    #[test]
    fn the_compilers_errors_are_named_by_the_sources_own_paths_without_warnings_and_command() {
        let said = "vmpatch-after/net/a.c: In function 'f':\n\
            vmpatch-after/net/a.c:4:2: error: implicit declaration of function 'g'\n   4 |  g();\n      |  ^\n\
            vmpatch-after/net/a.c:4:2: warning: no cast\n\
            vmpatch-after/net/a.c:9:1: fatal error: h.h: No such file or directory\n";
        assert_eq!(
            complaint(said),
            "net/a.c:4:2: error: implicit declaration of function 'g'; \
             net/a.c:9:1: fatal error: h.h: No such file or directory"
        );
    }

    #[test]
    fn of_many_errors_the_first_are_shown() {
        // More than a failed command shows of its end.
        let said: String = (1..=200)
            .map(|line| format!("a.c:{line}:1: error: no {line}\n"))
            .collect();
        assert_eq!(
            complaint(&said),
            "a.c:1:1: error: no 1; a.c:2:1: error: no 2; a.c:3:1: error: no 3; and 197 more"
        );
    }

    #[test]
    fn what_is_no_compilers_error_is_shown_with_its_command() {
        let text = complaint("a.o: objtool: no such section");
        assert!(
            text.contains("a-long-command") && text.contains("objtool: no such section"),
            "{text}"
        );
    }
}
