//! Where the parts of a diff belong. patch(1) takes the nearest place at which a part fits; where a source has a piece of text more than
//! once, that may be another function than the one that the diff was made for.

use std::ops::Range;

/// Places that are named to people.
const SHOWN_MAX: usize = 5;

/// Why a part has no place.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// It would fit everywhere.
    #[error(
        "the patch changes {file} at line {line} without a line of context: make it with context (diff -u, git diff)"
    )]
    NoContext {
        /// The file.
        file: String,
        /// Its line, by the diff.
        line: usize,
    },
    /// It fits at several places.
    #[error(
        "the patch's change of {file} at line {line} fits at lines {places} of the kernel's source, and neither its line nor its function tells \
         which one is meant: make the diff against this source"
    )]
    Ambiguous {
        /// The file.
        file: String,
        /// Its line, by the diff.
        line: usize,
        /// The lines at which it fits.
        places: String,
    },
}

/// A file of the source that a diff changes.
pub(super) struct Old {
    pub name: String,
    pub text: String,
}

/// The diff with each part (`@@ … @@`) at the line of the file where it belongs. `header` gives the file that a header (`---` and
/// `+++`) means. A part that fits nowhere stays as it is.
pub(super) fn placed(diff: &str, header: &dyn Fn(&str, &str) -> Option<Old>) -> Result<String, Error> {
    let mut lines = diff.split_inclusive('\n').peekable();
    let mut out = String::with_capacity(diff.len());
    let mut file: Option<Old> = None;
    while let Some(line) = lines.next() {
        if let (Some(old), Some(new)) = (
            line.strip_prefix("--- "),
            lines.peek().and_then(|next| next.strip_prefix("+++ ")),
        ) {
            file = header(old, new);
        }
        let (Some(old), Some(mut head)) = (&file, Head::parse(line)) else {
            out.push_str(line);
            continue;
        };
        let mut body = Vec::new();
        let (mut olds, mut news) = (head.old_count, head.new_count);
        while olds + news > 0 {
            let Some(line) = lines.next() else { break };
            match line.as_bytes().first() {
                Some(b'-') => olds = olds.saturating_sub(1),
                Some(b'+') => news = news.saturating_sub(1),
                Some(b'\\') => {}
                _ => (olds, news) = (olds.saturating_sub(1), news.saturating_sub(1)),
            }
            body.push(line);
        }
        head.place(old, &body)?;
        out.push_str(&head.text());
        out.extend(body);
    }
    Ok(out)
}

/// The first line of a part.
struct Head<'d> {
    old_start: usize,
    old_count: usize,
    new_count: usize,
    /// The old place's count, if it is told, and the new place, as they stand there.
    middle: &'d str,
    /// The line above that begins a function, or what looks like one; may be cut off.
    function: &'d str,
    rest: &'d str,
}

impl<'d> Head<'d> {
    /// `@@ -12,7 +12,8 @@ function`; a count of 1 may be missing.
    fn parse(line: &'d str) -> Option<Self> {
        let (ranges, rest) = line.strip_prefix("@@ -")?.split_once(" @@")?;
        let (old, new) = ranges.split_once(" +")?;
        let count = |range: &str| match range.split_once(',') {
            None => Some(1),
            Some((_, count)) => count.parse().ok(),
        };
        let start = old.split(',').next()?;
        Some(Self {
            old_start: start.parse().ok()?,
            old_count: count(old)?,
            new_count: count(new)?,
            middle: ranges.get(start.len()..)?,
            function: rest.trim(),
            rest,
        })
    }

    fn text(&self) -> String {
        format!("@@ -{}{} @@{}", self.old_start, self.middle, self.rest)
    }

    /// Gives the part the line of `old` where it belongs.
    fn place(&mut self, old: &Old, body: &[&str]) -> Result<(), Error> {
        let (file, line) = (old.name.clone(), self.old_start);
        let is_old = |line: &&&str| !line.starts_with(['+', '\\']);
        let wanted: Vec<&str> = body.iter().filter(is_old).map(|line| content(line)).collect();
        if wanted.is_empty() {
            return Err(Error::NoContext { file, line });
        }
        let old: Vec<&str> = old.text.lines().collect();
        let places: Vec<usize> = old
            .windows(wanted.len())
            .enumerate()
            .filter(|(_, lines)| *lines == wanted)
            .map(|(at, _)| at + 1)
            .collect();
        match self.meant(&old, &places) {
            Some(place) => self.old_start = place,
            None if places.is_empty() => {}
            None => {
                let places = shown(&places);
                return Err(Error::Ambiguous { file, line, places });
            }
        }
        Ok(())
    }

    /// The one of several lines that the part's line and function both can mean, and one of the two does.
    fn meant(&self, old: &[&str], places: &[usize]) -> Option<usize> {
        if let [only] = places {
            return Some(*only);
        }
        let of_function = |place: &&usize| {
            let above = || function_above(old, 0..place.saturating_sub(1));
            self.function.is_empty() || above().is_some_and(|line| line.starts_with(self.function))
        };
        let candidates: Vec<usize> = places.iter().filter(of_function).copied().collect();
        let by_line = places.contains(&self.old_start).then_some(self.old_start);
        match (candidates.as_slice(), by_line) {
            ([only], None) => Some(*only),
            (candidates, Some(line)) if candidates.contains(&line) => Some(line),
            _ => None,
        }
    }
}

/// What a line of a part says, without its mark; some programs drop the mark of an empty one.
fn content(line: &str) -> &str {
    let line = line.trim_end_matches(['\n', '\r']);
    line.get(1..).unwrap_or_default()
}

/// The last of some lines that begins a function, as git (`diff=cpp`) and diff's `-p` see it: with a letter, and not a label.
fn function_above<'o>(old: &[&'o str], lines: Range<usize>) -> Option<&'o str> {
    let begins = |line: &&&str| {
        let is_label = line.trim_end().ends_with(':') && !line.contains([' ', '(']);
        line.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_') && !is_label
    };
    old.get(lines)?.iter().rev().find(begins).map(|line| line.trim_end())
}

/// Lines for people.
fn shown(places: &[usize]) -> String {
    let all: Vec<String> = places.iter().take(SHOWN_MAX).map(usize::to_string).collect();
    match all.split_last() {
        Some((last, [])) => last.clone(),
        Some((last, rest)) if places.len() <= SHOWN_MAX => format!("{} and {last}", rest.join(", ")),
        _ => format!("{} and {} more", all.join(", "), places.len() - SHOWN_MAX),
    }
}
