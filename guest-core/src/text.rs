//! Text for an operator: from the guest, made safe for a terminal (a tenant may have chosen it), and of errors.

use std::error::Error;

/// The error and its causes, none of them twice in a row.
pub(crate) fn chain(error: &(dyn Error + 'static)) -> String {
    let causes = std::iter::successors(Some(error), |error| (*error).source());
    let mut lines: Vec<_> = causes.map(ToString::to_string).collect();
    lines.dedup();
    lines.join(": ")
}

/// True for a character that neither moves the cursor nor changes the direction of writing.
pub(crate) fn is_plain(c: char) -> bool {
    c.is_alphanumeric() || c.is_ascii_graphic() || c == ' '
}

/// The text up to the first NUL. Characters that are not plain, and bytes that are not UTF-8, become question marks.
pub(crate) fn plain(bytes: &[u8]) -> String {
    let text = bytes.split(|&byte| byte == 0).next().unwrap_or_default();
    let plain = |c| if is_plain(c) { c } else { '?' };
    String::from_utf8_lossy(text).chars().map(plain).collect()
}

#[cfg(test)]
mod tests {
    use super::plain;

    #[test]
    fn escapes_newlines_and_changes_of_direction_become_question_marks() {
        assert_eq!(plain(b"kworker/0:1-ev\0rest"), "kworker/0:1-ev");
        assert_eq!(plain(b"a\x1b[2Jb\nc\x7f"), "a?[2Jb?c?");
        assert_eq!(plain("b\u{e4}r\u{202e}x\u{9b}".as_bytes()), "b\u{e4}r?x?");
        assert_eq!(plain(b"\xffx"), "?x");
    }
}
