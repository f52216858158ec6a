//! Text that a tenant wrote, on its way to an operator's terminal: names of tasks, the kernel's banner.

/// True for what neither moves a cursor nor turns the direction of writing.
pub(crate) fn is_plain(c: char) -> bool {
    c.is_alphanumeric() || c.is_ascii_graphic() || c == ' '
}

/// The text up to the first NUL, with a question mark for what is not plain, or no UTF-8.
pub(crate) fn plain(bytes: &[u8]) -> String {
    let text = bytes.split(|&byte| byte == 0).next().unwrap_or_default();
    let plain = |c| if is_plain(c) { c } else { '?' };
    String::from_utf8_lossy(text).chars().map(plain).collect()
}

#[cfg(test)]
mod tests {
    use super::plain;

    #[test]
    fn escapes_newlines_and_turned_text_become_question_marks() {
        assert_eq!(plain(b"kworker/0:1-ev\0rest"), "kworker/0:1-ev");
        assert_eq!(plain(b"a\x1b[2Jb\nc\x7f"), "a?[2Jb?c?");
        assert_eq!(plain("b\u{e4}r\u{202e}x\u{9b}".as_bytes()), "b\u{e4}r?x?");
        assert_eq!(plain(b"\xffx"), "?x");
    }
}
