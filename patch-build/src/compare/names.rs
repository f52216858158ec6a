//! What the compiler adds to names, and what of it tells things apart.
//!
//! GCC numbers static locals (`warned.3`) and the copies that it makes of functions (`f.isra.0`, `f.constprop.1`, `f.part.0`)
//! through a file; an unrelated change renumbers them.

/// Words that GCC puts behind a dot into the names of functions that it made out of others.
const MADE: [&str; 5] = ["isra", "constprop", "part", "cold", "localalias"];

/// Constants that only hold what is written in the code beside them; their contents tell them apart, and a copy will do.
const CONTENTS: [&str; 6] = [
    "CSWTCH.",
    "__func__.",
    "__FUNCTION__.",
    "__PRETTY_FUNCTION__.",
    "__msg.",
    "___fmt.",
];

/// Static variables of macros that note whether, or how often, something was said: a new one starts afresh, without harm.
const FORGETFUL: [&str; 8] = [
    "__already_done",
    "__already_done_nodef",
    "__warned",
    "__print_once",
    "_rs",
    "__key",
    "__ratelimit",
    "__once_key",
];

/// Names of macros that end in a line or a count: `__UNIQUE_ID()` (include/linux/compiler.h), `BTF_ID()` (include/linux/btf_ids.h).
const NUMBERED: [&str; 2] = ["__UNIQUE_ID_", "__BTF_ID__"];

/// A function's name without the numbers that the compiler put into it: `f.isra.0.cold` becomes `f.isra.cold`.
pub(crate) fn function(name: &str) -> String {
    let mut parts = name.split('.');
    let mut plain = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        if MADE.contains(&part) || !is_number(part) {
            plain.push('.');
            plain.push_str(part);
        }
    }
    plain
}

/// A variable's name without the number that the compiler put behind it: `warned.3` becomes `warned`.
fn plain(name: &str) -> &str {
    match name.rsplit_once('.') {
        Some((plain, number)) if is_number(number) && !plain.is_empty() => plain,
        _ => name,
    }
}

/// A variable's name without the compiler's number, nor that of a macro that counts: `__UNIQUE_ID_ddebug12.3` becomes
/// `__UNIQUE_ID_ddebug`.
pub(crate) fn variable(name: &str) -> &str {
    let plain = plain(name);
    if NUMBERED.iter().any(|prefix| plain.starts_with(prefix)) {
        return plain.trim_end_matches(|c: char| c.is_ascii_digit());
    }
    plain
}

/// The function that a part was split off from for being rarely run: `f` for `f.cold`.
pub(crate) fn warm_part(name: &str) -> Option<&str> {
    name.strip_suffix(".cold")
}

/// True for a copy that the compiler made to be called by the code of this very file, in a manner of its own: `f.isra.0`.
pub(crate) fn is_private_copy(name: &str) -> bool {
    const COPIES: [&str; 3] = ["isra", "constprop", "part"];
    name.split('.').skip(1).any(|part| COPIES.contains(&part))
}

/// The name as written in the source: `f` for `f.isra.0.cold`.
pub(crate) fn written(name: &str) -> &str {
    match name.split_once('.') {
        Some((plain, rest)) if !plain.is_empty() && MADE.iter().any(|made| rest.starts_with(made)) => plain,
        _ => name,
    }
}

/// True for a constant that is known by its contents.
pub(crate) fn is_known_by_contents(name: &str) -> bool {
    CONTENTS.iter().any(|prefix| name.starts_with(prefix))
}

/// True for a static variable that may start afresh.
pub(crate) fn is_forgetful(name: &str) -> bool {
    FORGETFUL.contains(&variable(name))
}

/// True for what only a count tells from others of its kind, as the source gives it no name of its own.
pub(crate) fn is_counted(name: &str) -> bool {
    is_known_by_contents(name) || is_forgetful(name) || NUMBERED.iter().any(|prefix| name.starts_with(prefix))
}

fn is_number(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_go_and_words_stay() {
        assert_eq!(function("f.isra.0.cold"), "f.isra.cold");
        assert!(is_private_copy("f.isra.0.cold") && !is_private_copy("f.cold") && !is_private_copy("isra.0"));
        assert_eq!(function("f.constprop.12"), "f.constprop");
        assert_eq!(function("f"), "f");
        assert_eq!(variable("warned.3"), "warned");
        assert_eq!(variable("cpu_info"), "cpu_info");
        assert_eq!(variable("a.b"), "a.b");
        assert_eq!(
            variable("__BTF_ID__struct__sk_buff__10884593"),
            "__BTF_ID__struct__sk_buff__"
        );
        assert_eq!(variable("__UNIQUE_ID_ddebug12.3"), "__UNIQUE_ID_ddebug");
        assert_eq!(variable("name5"), "name5");
    }

    #[test]
    fn what_macros_and_the_compiler_count_is_told_from_what_the_source_names() {
        for name in ["__UNIQUE_ID_ddebug12.3", "_rs.0", "__already_done.7", "__func__.1"] {
            assert!(is_counted(name), "{name}");
        }
        assert!(!is_counted("warned.3"));
    }

    #[test]
    fn the_written_name_has_no_word_of_the_compilers() {
        assert_eq!(written("f.part.0.isra.0"), "f");
        assert_eq!(written("f.x"), "f.x");
    }
}
