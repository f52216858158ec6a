//! Which attributes keep a definition in the object, whoever uses it, and where they stand.

use super::super::tokens::Kind;
use super::declaration::{begins_body, closing};
use super::words::Word;

/// Words in attributes that keep a definition in the object, whoever uses it. A section alone does not.
pub(super) const KEPT: [&str; 8] = [
    "used",
    "__used__",
    "constructor",
    "__constructor__",
    "destructor",
    "__destructor__",
    "retain",
    "__retain__",
];
/// Words in attributes that make a definition of a declaration.
pub(super) const RENAMED: [&str; 6] = ["alias", "__alias__", "weakref", "__weakref__", "ifunc", "__ifunc__"];
/// A function without its body; any other declaration as it is. The compiler forgets an unused function with all that its body
/// declares, variables among them that an attribute would keep elsewhere.
pub(super) fn head<'w, 'a>(words: &'w [Word<'a>]) -> &'w [Word<'a>] {
    let mut at = 0;
    while let Some(word) = words.get(at) {
        let before = words.get(..at).unwrap_or_default();
        match word.kind {
            Kind::Punctuation(b'{') if begins_body(before) => return before,
            Kind::Punctuation(b'(' | b'[' | b'{') => at = closing(words, at),
            _ => at += 1,
        }
    }
    words
}

/// The words in a declaration's attributes. In brackets stand some of them, too (C23), and the lengths of arrays.
fn attributes<'w, 'a>(words: &'w [Word<'a>]) -> impl Iterator<Item = &'w Word<'a>> {
    const SPELLINGS: [&str; 3] = ["__attribute__", "__attribute", "__declspec"];
    let mut end = 0;
    words.iter().enumerate().filter_map(move |(at, word)| {
        let is_attribute = SPELLINGS.contains(&word.text) || word.is(b'[');
        if at >= end && is_attribute {
            let open = if word.is(b'[') { at } else { at + 1 };
            end = closing(words, open);
        }
        (at < end).then_some(word)
    })
}

/// Whether an attribute of a declaration has one of these words.
pub(super) fn says(words: &[Word<'_>], wanted: &[&str]) -> bool {
    attributes(words).any(|word| wanted.contains(&word.text))
}

#[cfg(test)]
mod tests {
    use super::super::declaration::{declaration, split};
    use super::super::words::words;

    /// Declarations of something called `it`, each alone in a file, and whether the compiler keeps `it`. gcc 10, 14 and 16 say the same.
    const ALONE: [(&str, bool); 17] = [
        ("static int it __attribute__((used)) = 1;", true),
        (
            "static const char it[] __attribute__((__used__, section(\"x\"))) = \"a\";",
            true,
        ),
        (
            "static int it(void) { return 1; }\nstatic int it(void) __attribute__((used));",
            true,
        ),
        (
            "static int it(void) __attribute__((used));\nstatic int it(void) { return 1; }",
            true,
        ),
        (
            "static void __attribute__((constructor)) it(void) { printk(\"\"); }",
            true,
        ),
        ("int it;", true),
        ("static int it __attribute__((section(\"x\"))) = 1;", false),
        (
            "static int __attribute__((__section__(\".init.text\"))) it(void) { return 1; }",
            false,
        ),
        (
            "static int it(void) __attribute__((section(\"x\")));\nstatic int it(void) { return 1; }",
            false,
        ),
        (
            "static inline void f(void) { static int it __attribute__((used, section(\"x\"))) = 1; it++; }",
            false,
        ),
        (
            "static void f(void) { static int it __attribute__((used)) = 1; it++; }",
            false,
        ),
        (
            "static inline int f(void) { static struct { int a; } __attribute__((section(\"x\"))) it = { 1 }; return it.a; }",
            false,
        ),
        (
            "static int f(void) { static int it __attribute__((__retain__, used)) = 1; return it; }",
            false,
        ),
        (
            "static inline void f(void) { extern int it(void) __attribute__((alias(\"sleepy\"))); it(); }",
            false,
        ),
        (
            "static int it(int used, int section, int alias) { return used + section + alias; }",
            false,
        ),
        ("static struct s { int used, alias; } it = { .used = 1 };", false),
        (
            "extern inline __attribute__((__gnu_inline__)) int it(int used) { return used; }",
            false,
        ),
    ];

    #[test]
    fn the_compiler_keeps_nothing_that_counts_as_unused() {
        use object::{Object, ObjectSymbol};
        for (number, (text, is_kept)) in ALONE.iter().enumerate() {
            let bytes = crate::testing::compiled(&format!("alone-{number}"), text, true);
            let elf = object::File::parse(&*bytes).unwrap();
            let is_it = |name: &str| name == "it" || name.starts_with("it.");
            let is_there = elf
                .symbols()
                .filter_map(|symbol| symbol.name().ok().map(is_it))
                .any(|is| is);
            assert_eq!(is_there, *is_kept, "the compiler: {text}");
            let words = words(text);
            let is_root = split(&words).into_iter().any(|one| declaration(one).is_root);
            assert_eq!(is_root, *is_kept, "{text}");
        }
    }
}
