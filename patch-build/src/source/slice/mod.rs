//! Whether a change of what a compiler reads changes what it makes: of preprocessed text only that counts which the code uses.
//!
//! A file's code is what its definitions are compiled to that others can see or that are kept in any case. From those, the names
//! in them lead to all declarations that they use, directly or through others; everything else the compiler reads and forgets.
//! Where two texts have the same such part, they are compiled to the same code. What is not understood counts as used.

use std::collections::{HashMap, HashSet};

pub(super) mod declaration;
mod kept;
pub(super) mod words;

use super::tokens::Kind;
use declaration::{Declaration, declaration, split};
use kept::RENAMED;
use words::{Renaming, Word, words};

/// Whether two preprocessed C texts compile to the same code, but for the numbers of lines. The compiler must be one that forgets what
/// no code uses.
pub fn same_code(before: &str, after: &str) -> bool {
    let (before, after) = (words(before), words(after));
    Renaming::default().same(&before, &after) || Renaming::default().same(&used(&before), &used(&after))
}

/// Whether two preprocessed C texts are the same, but for spaces and the numbers of lines.
pub fn same_words(before: &str, after: &str) -> bool {
    Renaming::default().same(&words(before), &words(after))
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
    fn to_a_compiler_that_forgets_nothing_each_word_matters() {
        let changed = FILE.replace("s->a + LIMIT", "s->a - 1");
        assert!(same_code(FILE, &changed) && !same_words(FILE, &changed));
        assert!(same_words(FILE, &FILE.replace("int high", "# 9 \"x.h\"\nint  high")));
    }

    #[test]
    fn assembly_is_the_same_but_for_marks_of_lines() {
        assert!(same_assembly("# 1 \"x.h\"\nmov  a\n", "\n# 9 \"y.h\"\nmov a\n"));
        assert!(!same_assembly("mov a\n", "mov b\n"));
    }
}
