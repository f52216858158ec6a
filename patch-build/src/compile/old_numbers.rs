//! A changed text in which unchanged lines have the numbers that they had: a number of a line alone is no change of code, but WARN(),
//! debug prints and the like keep it.

use crate::lcs;

/// The new text of a file, with a `#line` before each run of lines that have other numbers than in the old one.
pub(super) fn with_old_numbers(old: &str, new: &str) -> String {
    let (old_lines, new_lines): (Vec<&str>, Vec<&str>) = (old.lines().collect(), new.lines().collect());
    let Some(places) = lcs::places(&old_lines, &new_lines) else {
        return new.to_owned();
    };
    let mut text = String::with_capacity(new.len() + 64);
    // The number that the compiler gives to the next line.
    let mut next = 1;
    let mut is_continued = false;
    for (line, place) in new_lines.iter().zip(places) {
        if let Some(number) = place
            .map(|place| place + 1)
            .filter(|number| *number != next && !is_continued)
        {
            text.push_str(&format!("#line {number}\n"));
            next = number;
        }
        text.push_str(line);
        text.push('\n');
        next += 1;
        is_continued = line.ends_with('\\');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_behind_a_change_keep_their_numbers() {
        assert_eq!(
            with_old_numbers("a\nb\nc\n", "a\nx\ny\nb\nc\n"),
            "a\nx\ny\n#line 2\nb\nc\n"
        );
        assert_eq!(with_old_numbers("a\nb\n", "a\nx\n"), "a\nx\n");
        assert_eq!(with_old_numbers("a \\\nb\n", "a \\\nx \\\nb\n"), "a \\\nx \\\nb\n");
    }

    #[test]
    fn lines_between_two_changes_keep_their_numbers_too() {
        assert_eq!(
            with_old_numbers("a\nb\nc\nd\n", "x\na\nb\nc\ny\nd\n"),
            "x\n#line 1\na\nb\nc\ny\n#line 4\nd\n"
        );
        assert_eq!(
            with_old_numbers("a\nb\nc\nd\n", "a\nc\ny\nd\n"),
            "a\n#line 3\nc\ny\n#line 4\nd\n"
        );
    }
}
