//! What a declaration at the top of a file introduces, and whether it is kept whoever uses it. What is not understood is kept.

use super::super::tokens::Kind;
use super::kept::{self, KEPT, RENAMED};
use super::words::Word;

/// What stands before parentheses that tell something of a declaration, and are no part of a declarator.
pub(in crate::source) const GROUPS: [&str; 13] = [
    "__attribute__",
    "__attribute",
    "asm",
    "__asm__",
    "__asm",
    "typeof",
    "__typeof__",
    "__typeof",
    "typeof_unqual",
    "__typeof_unqual__",
    "_Alignas",
    "__declspec",
    "_Pragma",
];
/// A declaration or definition at the top of a file.
#[derive(Debug, Default)]
pub(in crate::source) struct Declaration<'w, 'a> {
    pub(in crate::source) words: &'w [Word<'a>],
    pub(in crate::source) names: Vec<&'a str>,
    /// The compiler keeps it, or it is not understood.
    pub(in crate::source) is_root: bool,
}

/// A text's declarations.
pub(in crate::source) fn split<'w, 'a>(words: &'w [Word<'a>]) -> Vec<&'w [Word<'a>]> {
    let mut all = Vec::new();
    let (mut start, mut depth) = (0, 0_usize);
    let mut is_body = false;
    for (at, word) in words.iter().enumerate() {
        let so_far = words.get(start..at).unwrap_or_default();
        let mut ends = false;
        match word.kind {
            Kind::Punctuation(b'{') => {
                if depth == 0 {
                    is_body = begins_body(so_far);
                }
                depth += 1;
            }
            Kind::Punctuation(b'(' | b'[') => depth += 1,
            Kind::Punctuation(b'}' | b')' | b']') => {
                depth = depth.saturating_sub(1);
                ends = depth == 0 && is_body && word.is(b'}');
            }
            Kind::Punctuation(b';') => ends = depth == 0,
            // A pragma by itself, wherever it stands.
            Kind::Directive => ends = depth == 0,
            _ => {}
        }
        if ends {
            all.extend(words.get(start..=at));
            start = at + 1;
            is_body = false;
        }
    }
    all.extend(words.get(start..).filter(|rest| !rest.is_empty()));
    all
}

/// Whether a brace behind these words opens a function: no value is given, and it is not that of a type.
pub(in crate::source) fn begins_body(head: &[Word<'_>]) -> bool {
    let top = top(head);
    !top.iter().any(|item| matches!(item, Item::Mark(b'=')))
        && !matches!(top.last(), Some(Item::Type { .. }))
        && top.iter().any(|item| matches!(item, Item::Group(_)))
}

/// What a declaration is made of at its top.
#[derive(Debug)]
pub(in crate::source) enum Item<'w, 'a> {
    Name(&'a str),
    Keyword(&'a str),
    /// A type with a tag or a body.
    Type {
        names: Vec<&'a str>,
    },
    /// Words in parentheses.
    Group(&'w [Word<'a>]),
    Brackets,
    Braces,
    Mark(u8),
    Constant,
}

/// Reads the top of a declaration, without attributes and the like.
pub(in crate::source) fn top<'w, 'a>(words: &'w [Word<'a>]) -> Vec<Item<'w, 'a>> {
    let mut items = Vec::new();
    let mut at = 0;
    while let Some(word) = words.get(at) {
        at += 1;
        match word.kind {
            Kind::Word if GROUPS.contains(&word.text) => {
                // `asm volatile (…)`
                while words.get(at).is_some_and(|word| word.kind == Kind::Word) {
                    at += 1;
                }
                if words.get(at).is_some_and(|word| word.is(b'(')) {
                    at = closing(words, at);
                }
            }
            Kind::Word if ["struct", "union", "enum"].contains(&word.text) => {
                let start = at - 1;
                while let Some(word) = words.get(at) {
                    if GROUPS.contains(&word.text) && words.get(at + 1).is_some_and(|word| word.is(b'(')) {
                        at = closing(words, at + 1);
                    } else if word.is_name() {
                        at += 1;
                        break;
                    } else {
                        break;
                    }
                }
                let mut names = Vec::new();
                if words.get(at).is_some_and(|word| word.is(b'{')) {
                    at = closing(words, at);
                    names = introduced(words.get(start..at).unwrap_or_default());
                }
                items.push(Item::Type { names });
            }
            Kind::Word if word.is_name() => items.push(Item::Name(word.text)),
            Kind::Word => items.push(Item::Keyword(word.text)),
            Kind::Punctuation(b'(') => {
                let end = closing(words, at - 1);
                items.push(Item::Group(words.get(at..end.saturating_sub(1)).unwrap_or_default()));
                at = end;
            }
            Kind::Punctuation(b'[') => {
                at = closing(words, at - 1);
                items.push(Item::Brackets);
            }
            Kind::Punctuation(b'{') => {
                at = closing(words, at - 1);
                items.push(Item::Braces);
            }
            Kind::Punctuation(mark) => items.push(Item::Mark(mark)),
            _ => items.push(Item::Constant),
        }
    }
    items
}

/// Behind the mark that closes the one at `open`.
pub(in crate::source) fn closing(words: &[Word<'_>], open: usize) -> usize {
    let mut depth = 0_usize;
    for (at, word) in words.iter().enumerate().skip(open) {
        match word.kind {
            Kind::Punctuation(b'(' | b'[' | b'{') => depth += 1,
            Kind::Punctuation(b')' | b']' | b'}') => depth = depth.saturating_sub(1),
            _ => {}
        }
        if depth == 0 {
            return at + 1;
        }
    }
    words.len()
}

/// The tags and enumerators that a type's text introduces, those of types within it among them.
pub(in crate::source) fn introduced<'a>(words: &[Word<'a>]) -> Vec<&'a str> {
    let mut names = Vec::new();
    let mut enumerates: Vec<bool> = Vec::new();
    let mut kind = None;
    let mut tag = None;
    let mut wants = false;
    for word in words {
        match word.kind {
            Kind::Word if ["struct", "union", "enum"].contains(&word.text) => (kind, tag) = (Some(word.text), None),
            Kind::Word if kind.is_some() && word.is_name() => tag = Some(word.text),
            Kind::Word if wants => {
                names.push(word.text);
                wants = false;
            }
            Kind::Punctuation(b'{') => {
                names.extend(tag.take());
                wants = kind.take() == Some("enum");
                enumerates.push(wants);
            }
            Kind::Punctuation(b'}') => {
                enumerates.pop();
                wants = false;
            }
            Kind::Punctuation(b'(' | b'[') => enumerates.push(false),
            Kind::Punctuation(b')' | b']') => drop(enumerates.pop()),
            Kind::Punctuation(b',') => wants = enumerates.last() == Some(&true),
            Kind::Punctuation(b';' | b'*') => (kind, tag) = (None, None),
            _ => {}
        }
    }
    names
}

pub(in crate::source) fn declaration<'w, 'a>(words: &'w [Word<'a>]) -> Declaration<'w, 'a> {
    let root = Declaration {
        words,
        names: Vec::new(),
        is_root: true,
    };
    let items = top(words);
    let has = |wanted: &str| {
        items
            .iter()
            .any(|item| matches!(item, Item::Keyword(word) if *word == wanted))
    };
    let head = kept::head(words);
    let is_kept = kept::says(head, &KEPT);
    let is_empty = items.iter().all(|item| matches!(item, Item::Mark(b';')));
    if words.iter().any(|word| word.kind == Kind::Directive) || (is_empty && words.len() > 1) {
        return root;
    }
    let mut names: Vec<&str> = Vec::new();
    for item in &items {
        if let Item::Type { names: own } = item {
            names.extend(own);
        }
    }
    let has_value = items.iter().any(|item| matches!(item, Item::Mark(b'=')));
    let has_body = !has_value && items.iter().any(|item| matches!(item, Item::Braces));
    let mut declares_object = false;
    for (number, part) in items.split(|item| matches!(item, Item::Mark(b',' | b';'))).enumerate() {
        if part.is_empty() {
            continue;
        }
        let value = part.iter().position(|item| matches!(item, Item::Mark(b'=' | b':')));
        let part = part.get(..value.unwrap_or(part.len())).unwrap_or_default();
        let own = declared(part);
        let is_only_type = number == 0 && own.is_empty() && part.iter().any(|item| matches!(item, Item::Type { .. }));
        if own.is_empty() && !is_only_type && !is_empty {
            return root;
        }
        // `f(…)` declares a function, `(*f)(…)` does not.
        let is_function = part.iter().enumerate().any(|(at, item)| {
            let is_called = at.checked_sub(1).and_then(|at| part.get(at));
            matches!(item, Item::Group(inside) if !is_declarator(inside, part.get(at + 1)))
                && matches!(is_called, Some(Item::Name(_)))
        });
        declares_object |= !own.is_empty() && !is_function;
        names.extend(own);
    }
    let is_inline_only = has("extern") && kept::says(head, &["gnu_inline", "__gnu_inline__"]);
    let is_root = match () {
        () if kept::says(head, &RENAMED) => true,
        () if has("typedef") => false,
        () if has_body => is_kept || !(has("static") || is_inline_only),
        () if has_value => is_kept || !has("static"),
        () if has("extern") => false,
        // Of a function, too: what is declared once as kept is kept where it is defined.
        () if has("static") => is_kept,
        // `int x;` is a variable.
        () => declares_object,
    };
    Declaration { words, names, is_root }
}

/// Whether words in parentheses may be a declarator themselves, `(*f)` or `(f)`, and no parameters.
pub(in crate::source) fn is_declarator(inside: &[Word<'_>], next: Option<&Item<'_, '_>>) -> bool {
    matches!(next, Some(Item::Group(_) | Item::Brackets))
        || inside.first().is_some_and(|word| word.is(b'*') || word.is(b'('))
}

/// The names that a declarator introduces; more than one where that is not sure.
pub(in crate::source) fn declared<'a>(part: &[Item<'_, 'a>]) -> Vec<&'a str> {
    let name = |item: Option<&Item<'_, 'a>>| match item {
        Some(Item::Name(name)) => Some(*name),
        _ => None,
    };
    let group = part.iter().position(|item| matches!(item, Item::Group(_)));
    let Some(at) = group else {
        return part
            .iter()
            .rev()
            .find_map(|item| name(Some(item)))
            .into_iter()
            .collect();
    };
    let before = name(at.checked_sub(1).and_then(|at| part.get(at)));
    let Some(Item::Group(inside)) = part.get(at) else {
        return Vec::new();
    };
    let mut names: Vec<&str> = before.into_iter().collect();
    if before.is_none() || is_declarator(inside, part.get(at + 1)) {
        let mut at = 0;
        while let Some(word) = inside.get(at) {
            if GROUPS.contains(&word.text) && inside.get(at + 1).is_some_and(|word| word.is(b'(')) {
                at = closing(inside, at + 1);
            } else if word.is_name() {
                names.push(word.text);
                break;
            } else {
                at += 1;
            }
        }
    }
    names
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::slice::words::words;

    #[test]
    fn names_are_found_in_every_kind_of_declaration() {
        let of = |text: &str| {
            let words = words(text);
            let one = declaration(&words);
            (
                one.names.into_iter().map(str::to_owned).collect::<Vec<_>>(),
                one.is_root,
            )
        };
        let inert = |names: &[&str]| (names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>(), false);
        assert_eq!(of("typedef int (*call_t)(struct s *s, int n);"), inert(&["call_t"]));
        assert_eq!(of("typedef unsigned long size, *where[4];"), inert(&["size", "where"]));
        assert_eq!(
            of("enum e { A = 1 << 2, B = sizeof(int), C };"),
            inert(&["e", "A", "B", "C"])
        );
        assert_eq!(
            of(
                "struct __attribute__((packed)) s { enum { IN, OUT } way; struct t { int x, y; } t; int (*f)(int a, int b); };"
            ),
            inert(&["s", "IN", "OUT", "t"])
        );
        assert_eq!(of("struct s;"), inert(&[]));
        assert_eq!(
            of("extern struct s *get(const char *name) __attribute__((__cold__)) asm(\"real\");"),
            inert(&["get"])
        );
        assert_eq!(
            of("static __attribute__((x(1))) inline u32 (*pick(int how))(void) { return 0; }"),
            inert(&["u32", "pick"])
        );
        assert_eq!(of("extern int (printk)(const char *fmt, ...);"), inert(&["printk"]));
        assert_eq!(of("extern __typeof__(struct s) one, two[3];"), inert(&["one", "two"]));
        assert_eq!(
            of("static const struct s table[] = { { .a = f(1, 2) }, };"),
            inert(&["table"])
        );
        for kept in [
            "u64 (*hook)(u32);",
            "long f(void) __attribute__((alias(\"g\")));",
            "int f(void) { return 1; }",
        ] {
            assert!(of(kept).1, "{kept}");
        }
        assert_eq!(
            of("_Static_assert(sizeof(int) == 4, \"x\");"),
            inert(&["_Static_assert"])
        );
    }
}
