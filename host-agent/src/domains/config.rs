//! QEMU's configuration files (`-readconfig`), which hold some managers' monitors (Incus's, for one).
//!
//! Format: QEMU's `util/qemu-config.c` (10.0; the same since 0.14): `[group]` or `[group "id"]`, then `key = "value"`
//! lines, where nothing is escaped.

use super::params::Params;

/// The sections of a file: each one's group, and its parameters with the id among them. A line that QEMU would not
/// have taken is passed over, as that QEMU would not be running.
pub(super) fn sections(text: &[u8]) -> Vec<(String, Params)> {
    let mut sections: Vec<(String, Params)> = Vec::new();
    for line in String::from_utf8_lossy(text).lines() {
        if let Some((group, id)) = header(line) {
            let mut params = Params::default();
            if let Some(id) = id {
                params.set(b"id", id.as_bytes());
            }
            sections.push((group.to_owned(), params));
        } else if let Some((key, value)) = setting(line)
            && let Some((_, params)) = sections.last_mut()
        {
            params.set(key.as_bytes(), value.as_bytes());
        }
    }
    sections
}

/// `[group]` or `[group "id"]`.
fn header(line: &str) -> Option<(&str, Option<&str>)> {
    let inner = line.strip_prefix('[')?.trim_end().strip_suffix(']')?;
    match inner.split_once('"') {
        Some((group, id)) => Some((group.trim(), Some(id.strip_suffix('"')?))),
        None => Some((inner, None)),
    }
}

/// `key = "value"`.
fn setting(line: &str) -> Option<(&str, &str)> {
    let (key, value) = line.split_once('=')?;
    let (value, _) = value.trim_start().strip_prefix('"')?.split_once('"')?;
    Some((key.trim(), value)).filter(|(key, _)| !key.starts_with('#'))
}

#[cfg(test)]
mod tests {
    use super::sections;

    #[test]
    fn sections_keep_their_order_and_their_ids() {
        let text =
            b"# Console\n[chardev \"monitor\"]\nbackend = \"socket\"\npath=\"/run/a b,c\"\n  server = \"on\"\n\n\
                     [name]\nguest = \"\"\n[name]\n# guest = \"evil\"\nguest = \"vm = 42\"\n";
        let found = sections(text);
        let groups: Vec<_> = found.iter().map(|(group, _)| group.as_str()).collect();
        assert_eq!(groups, ["chardev", "name", "name"]);
        let value = |index: usize, key| found.get(index).and_then(|(_, params)| params.text(key));
        assert_eq!(value(0, "id").as_deref(), Some("monitor"));
        assert_eq!(value(0, "path").as_deref(), Some("/run/a b,c"));
        assert_eq!(value(0, "server").as_deref(), Some("on"));
        assert_eq!((value(1, "id"), value(1, "guest").as_deref()), (None, Some("")));
        assert_eq!(value(2, "guest").as_deref(), Some("vm = 42"));
    }

    #[test]
    fn what_is_no_configuration_file_has_no_sections() {
        for text in [
            &b"\x7fELF\0\0[=]"[..],
            b"",
            b"a = \"b\"",
            b"[",
            b"[a \"b]\nc = \"d\"",
            b"[x\ny=z",
        ] {
            assert_eq!(sections(text), [], "{}", String::from_utf8_lossy(text));
        }
    }
}
