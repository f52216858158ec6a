//! A QEMU command line, taken apart into options and put together again.

use crate::domains::command_line::WITHOUT_ARGUMENT;
use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;

/// One option of a command line, or a disk image without one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Word {
    /// An option, without its dashes, and its argument where it has one.
    Option {
        /// `device`, `smp`, …
        name: String,
        /// As it stood there.
        value: Option<Vec<u8>>,
    },
    /// An image for the first disk.
    Image(Vec<u8>),
}

impl Word {
    /// An option with an argument.
    pub(super) fn with(name: &str, value: impl Into<Vec<u8>>) -> Self {
        Self::Option {
            name: name.to_owned(),
            value: Some(value.into()),
        }
    }
}

/// Takes a command line apart; the program's name, its first word, is left out.
pub(super) fn parse(line: &[Vec<u8>]) -> Vec<Word> {
    let mut words = Vec::new();
    let mut rest = line.iter().skip(1);
    while let Some(word) = rest.next() {
        let Some(option) = word.strip_prefix(b"-") else {
            words.push(Word::Image(word.clone()));
            continue;
        };
        let option = option.strip_prefix(b"-").unwrap_or(option);
        let name = String::from_utf8_lossy(option).into_owned();
        let value = if WITHOUT_ARGUMENT.split(' ').any(|known| known == name) {
            None
        } else {
            rest.next().cloned()
        };
        words.push(Word::Option { name, value });
    }
    words
}

/// Puts it together, without the program's name.
pub(super) fn render(words: Vec<Word>) -> Vec<OsString> {
    let mut line = Vec::new();
    for word in words {
        match word {
            Word::Option { name, value } => {
                line.push(OsString::from(format!("-{name}")));
                line.extend(value.map(OsString::from_vec));
            }
            Word::Image(path) => line.push(OsString::from_vec(path)),
        }
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_line_comes_back_as_it_was() {
        let line = [
            "/usr/bin/qemu-system-x86_64",
            "-nodefaults",
            "--name",
            "vm42",
            "disk.img",
            "-append",
            "-S",
            "-S",
        ];
        let line: Vec<Vec<u8>> = line.iter().map(|word| word.as_bytes().to_vec()).collect();
        let words = parse(&line);
        assert_eq!(
            words.get(3),
            Some(&Word::with("append", "-S")),
            "an argument is no option"
        );
        assert_eq!(
            render(words),
            ["-nodefaults", "-name", "vm42", "disk.img", "-append", "-S", "-S"]
        );
    }
}
