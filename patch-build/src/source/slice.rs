//! Whether a change of what a compiler reads changes what it makes: of preprocessed text only that counts which the code uses.
//!
//! A file's code is what its definitions are compiled to that others can see or that are kept in any case. From those, the names
//! in them lead to all declarations that they use, directly or through others; everything else the compiler reads and forgets.
//! Where two texts have the same such part, they are compiled to the same code. What is not understood counts as used.

use std::collections::{HashMap, HashSet};

use super::tokens::{Kind, Token, tokens};

/// Keywords and type names that no declaration introduces.
const KEYWORDS: [&str; 44] = [
    "__auto_type",
    "__const",
    "__const__",
    "__complex__",
    "__extension__",
    "__inline",
    "__inline__",
    "__int128",
    "__restrict",
    "__restrict__",
    "__seg_fs",
    "__seg_gs",
    "__signed",
    "__signed__",
    "__thread",
    "__volatile",
    "__volatile__",
    "_Atomic",
    "_Bool",
    "_Complex",
    "_Float128",
    "_Noreturn",
    "_Thread_local",
    "auto",
    "bool",
    "char",
    "const",
    "double",
    "extern",
    "float",
    "inline",
    "int",
    "long",
    "register",
    "restrict",
    "short",
    "signed",
    "static",
    "typedef",
    "unsigned",
    "void",
    "volatile",
    "_Float16",
    "_Float64",
];
/// What stands before parentheses that tell something of a declaration, and are no part of a declarator.
const GROUPS: [&str; 13] = [
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
/// Words in attributes that keep a definition in the object, whoever uses it.
const KEPT: [&str; 10] = [
    "used",
    "__used__",
    "section",
    "__section__",
    "constructor",
    "__constructor__",
    "destructor",
    "__destructor__",
    "retain",
    "__retain__",
];
/// Words in attributes that make a definition of a declaration.
const RENAMED: [&str; 6] = ["alias", "__alias__", "weakref", "__weakref__", "ifunc", "__ifunc__"];
/// What counts up in each file that uses it (`__COUNTER__`): names that differ in the number alone.
const COUNTED: [&str; 2] = ["__UNIQUE_ID_", "__compiletime_assert_"];

/// Whether two preprocessed C texts compile to the same code, but for the numbers of lines.
pub fn same_code(before: &str, after: &str) -> bool {
    let (before, after) = (words(before), words(after));
    let same = |one: &[Word<'_>], other: &[Word<'_>]| Renaming::default().same(one, other);
    if same(&before, &after) {
        return true;
    }
    let (before, after) = (used(&before), used(&after));
    same(&before, &after)
}

/// Whether two preprocessed texts of assembly are the same.
pub fn same_assembly(before: &str, after: &str) -> bool {
    fn lines(text: &str) -> impl Iterator<Item = Vec<&str>> {
        let lines = text.lines().filter(|line| !line.starts_with("# "));
        lines
            .map(|line| line.split_whitespace().collect::<Vec<_>>())
            .filter(|words| !words.is_empty())
    }
    lines(before).eq(lines(after))
}

/// A token of preprocessed text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Word<'a> {
    text: &'a str,
    kind: Kind,
    /// No space before it: two marks may be one operator.
    joined: bool,
}

impl Word<'_> {
    fn is(&self, mark: u8) -> bool {
        self.kind == Kind::Punctuation(mark)
    }

    fn is_name(&self) -> bool {
        self.kind == Kind::Word && !KEYWORDS.contains(&self.text)
    }
}

fn words(text: &str) -> Vec<Word<'_>> {
    let mut end = 0;
    let mut all = Vec::new();
    for Token { kind, range } in tokens(text) {
        let joined = range.start == end;
        end = range.end;
        let Some(text) = text.get(range) else {
            continue;
        };
        let is_mark_of_line = || {
            text.strip_prefix('#')
                .is_some_and(|rest| rest.trim_start().starts_with(|c: char| c.is_ascii_digit()))
        };
        match kind {
            Kind::Blank => {}
            Kind::Directive if is_mark_of_line() || text.starts_with("#pragma GCC diagnostic") => {}
            Kind::Punctuation(_) => all.push(Word { text, kind, joined }),
            _ => all.push(Word {
                text,
                kind,
                joined: false,
            }),
        }
    }
    all
}

/// Counted names of one text by those of another: each stands for one.
#[derive(Debug, Default)]
struct Renaming<'a> {
    there: HashMap<&'a str, &'a str>,
    back: HashMap<&'a str, &'a str>,
}

impl<'a> Renaming<'a> {
    fn same(mut self, one: &[Word<'a>], other: &[Word<'a>]) -> bool {
        one.len() == other.len() && one.iter().zip(other).all(|(one, other)| self.agree(one, other))
    }

    fn agree(&mut self, one: &Word<'a>, other: &Word<'a>) -> bool {
        // A mark behind a mark may be one operator with it; what is behind a name is another thing in any case.
        if one.kind != other.kind
            || (one.joined != other.joined
                && matches!(
                    one.kind,
                    Kind::Punctuation(b'+' | b'-' | b'<' | b'>' | b'=' | b'&' | b'|' | b'.' | b'#')
                ))
        {
            return false;
        }
        if one.kind == Kind::Word && counted(one.text).is_some() && counted(one.text) == counted(other.text) {
            let there = *self.there.entry(one.text).or_insert(other.text);
            let back = *self.back.entry(other.text).or_insert(one.text);
            return there == other.text && back == one.text;
        }
        one.text == other.text
    }
}

/// The part of a counted name before its number.
fn counted(name: &str) -> Option<&str> {
    let stem = name.trim_end_matches(|c: char| c.is_ascii_digit());
    (stem.len() < name.len() && COUNTED.iter().any(|prefix| name.starts_with(prefix))).then_some(stem)
}

/// A declaration or definition at the top of a file.
#[derive(Debug, Default)]
struct Declaration<'w, 'a> {
    words: &'w [Word<'a>],
    names: Vec<&'a str>,
    /// The compiler keeps it, or it is not understood.
    is_root: bool,
}

/// The words of all declarations that the code uses, in their order.
fn used<'a>(words: &[Word<'a>]) -> Vec<Word<'a>> {
    let all: Vec<Declaration<'_, 'a>> = split(words).into_iter().map(declaration).collect();
    let mut by_name: HashMap<&str, Vec<usize>> = HashMap::new();
    for (number, one) in all.iter().enumerate() {
        for name in &one.names {
            by_name.entry(name).or_default().push(number);
        }
    }
    let roots = all.iter().enumerate().filter(|(_, one)| one.is_root);
    let mut wanted: Vec<usize> = roots.map(|(number, _)| number).collect();
    let mut reached: HashSet<usize> = wanted.iter().copied().collect();
    let mut seen: HashSet<&str> = HashSet::new();
    while let Some(one) = wanted.pop().and_then(|number| all.get(number)) {
        for name in mentioned(one.words) {
            if seen.insert(name) {
                let numbers = by_name.get(name).into_iter().flatten();
                wanted.extend(numbers.filter(|number| reached.insert(**number)));
            }
        }
    }
    let mut numbers: Vec<usize> = reached.into_iter().collect();
    numbers.sort_unstable();
    numbers
        .iter()
        .filter_map(|number| all.get(*number))
        .flat_map(|one| one.words.iter().copied())
        .collect()
}

/// Names that a declaration may mean something by. Assembly and aliases name others in strings.
fn mentioned<'w, 'a>(words: &'w [Word<'a>]) -> impl Iterator<Item = &'a str> + 'w {
    let in_strings = words
        .iter()
        .any(|word| ["asm", "__asm__", "__asm"].contains(&word.text) || RENAMED.contains(&word.text));
    words.iter().flat_map(move |word| -> Vec<&'a str> {
        match word.kind {
            Kind::Word => {
                let own = word.text.strip_prefix("__builtin_").into_iter();
                own.chain([word.text]).collect()
            }
            Kind::Constant if in_strings && word.text.contains('"') => {
                let parts = word.text.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'));
                parts.filter(|part| !part.is_empty()).collect()
            }
            _ => Vec::new(),
        }
    })
}

/// A text's declarations.
fn split<'w, 'a>(words: &'w [Word<'a>]) -> Vec<&'w [Word<'a>]> {
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
fn begins_body(head: &[Word<'_>]) -> bool {
    let top = top(head);
    !top.iter().any(|item| matches!(item, Item::Mark(b'=')))
        && !matches!(top.last(), Some(Item::Type { .. }))
        && top.iter().any(|item| matches!(item, Item::Group(_)))
}

/// What a declaration is made of at its top.
#[derive(Debug)]
enum Item<'w, 'a> {
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
fn top<'w, 'a>(words: &'w [Word<'a>]) -> Vec<Item<'w, 'a>> {
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
fn closing(words: &[Word<'_>], open: usize) -> usize {
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
fn introduced<'a>(words: &[Word<'a>]) -> Vec<&'a str> {
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

fn declaration<'w, 'a>(words: &'w [Word<'a>]) -> Declaration<'w, 'a> {
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
    let is_kept = words.iter().any(|word| KEPT.contains(&word.text));
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
    let is_inline_only = has("extern") && words.iter().any(|word| word.text.contains("gnu_inline"));
    let is_root = match () {
        () if words.iter().any(|word| RENAMED.contains(&word.text)) => true,
        () if has("typedef") => false,
        () if has_body => is_kept || !(has("static") || is_inline_only),
        () if has_value => is_kept || !has("static"),
        () if has("extern") => false,
        () if has("static") => is_kept && declares_object,
        // `int x;` is a variable.
        () => declares_object,
    };
    Declaration { words, names, is_root }
}

/// Whether words in parentheses may be a declarator themselves, `(*f)` or `(f)`, and no parameters.
fn is_declarator(inside: &[Word<'_>], next: Option<&Item<'_, '_>>) -> bool {
    matches!(next, Some(Item::Group(_) | Item::Brackets))
        || inside.first().is_some_and(|word| word.is(b'*') || word.is(b'('))
}

/// The names that a declarator introduces; more than one where that is not sure.
fn declared<'a>(part: &[Item<'_, 'a>]) -> Vec<&'a str> {
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

    const FILE: &str = "struct s { int a; };\nstatic inline int get(struct s *s) { return s->a; }\n\
        static inline int other(struct s *s) { return s->a + LIMIT; }\nextern int limit(void);\n\
        static int low(struct s *s) { return get(s); }\nint high(struct s *s) { return low(s); }\n";

    fn same(from: &str, to: &str) -> bool {
        assert!(FILE.contains(from), "{from}");
        same_code(FILE, &FILE.replacen(from, to, 1))
    }

    #[test]
    fn what_no_code_uses_may_change() {
        assert!(same("s->a + LIMIT", "s->a - 1"));
        assert!(same("extern int limit(void)", "extern long limit(void)"));
        assert!(same(
            "extern int",
            "enum { NEW = 1, OLD };\nstatic inline int more(void) { return NEW; }\nextern int"
        ));
        assert!(same("static int low", "# 12 \"x.h\" 3\n\nstatic  int\nlow"));
    }

    #[test]
    fn what_code_uses_on_whatever_way_may_not() {
        assert!(!same("int a;", "long a;"));
        assert!(!same("return s->a; }", "return s->a + 1; }"));
        assert!(!same("return get(s)", "return other(s)"));
        assert!(!same("extern int limit", "int limit_of = 1;\nextern int limit"));
        assert!(!same("extern int limit", "asm(\".globl x\");\nextern int limit"));
        assert!(!same("extern int limit", "int tentative;\nextern int limit"));
        assert!(!same(
            "extern int limit",
            "static int kept __attribute__((__used__)) = 1;\nextern int limit"
        ));
        assert!(!same("extern int limit", "#pragma pack(1)\nextern int limit"));
    }

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

    #[test]
    fn an_enumerator_and_a_name_in_assembly_are_uses() {
        let enumerated = "enum e { A, B };\nint f(void) { return B; }\n";
        assert!(!same_code(enumerated, &enumerated.replace("A, ", "A, N, ")));
        let named = "static inline int g(void) { return 1; }\nvoid f(void) { asm volatile(\"call g\"); }\n";
        assert!(!same_code(named, &named.replace("return 1", "return 2")));
        let built_in = "static inline int abs(int a) { return 1; }\nint f(int a) { return __builtin_abs(a); }\n";
        assert!(!same_code(built_in, &built_in.replace("return 1", "return 2")));
    }

    #[test]
    fn names_that_are_counted_may_count_on() {
        let text =
            "int f(void) { int __UNIQUE_ID_a1 = 1; int __UNIQUE_ID_b2 = 2; return __UNIQUE_ID_a1 - __UNIQUE_ID_b2; }\n";
        assert!(same_code(text, &text.replace("b2", "b7").replace("a1", "a5")));
        let other = text.replace("a1 - __UNIQUE_ID_b2", "b2 - __UNIQUE_ID_a1");
        assert!(!same_code(text, &other));
        assert!(!same_code("int a = 1 - -b;", "int a = 1 --b;"));
    }

    #[test]
    fn assembly_is_the_same_but_for_marks_of_lines() {
        assert!(same_assembly("# 1 \"x.h\"\nmov  a\n", "\n# 9 \"y.h\"\nmov a\n"));
        assert!(!same_assembly("mov a\n", "mov b\n"));
    }
}
