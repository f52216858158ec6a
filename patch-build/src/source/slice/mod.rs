//! Whether a change of what a compiler reads changes what it makes: of preprocessed text only that counts which the code uses.
//!
//! A file's code is what its definitions are compiled to that others can see or that are kept in any case. From those, the names
//! in them lead to all declarations that they use, directly or through others; everything else the compiler reads and forgets.
//! Where two texts have the same such part, they are compiled to the same code. What is not understood counts as used.

use std::collections::{BTreeSet, HashMap, HashSet};

pub(super) mod declaration;
mod kept;
pub(super) mod words;

use super::both::MARKS;
use super::tokens::Kind;
use declaration::{Declaration, declaration, split};
use kept::RENAMED;
use words::{Renaming, Word, words};

/// Whether two preprocessed C texts compile to the same code, but for the numbers of lines. The compiler must be one that forgets what
/// no code uses.
pub fn same_code(before: &str, after: &str) -> bool {
    same_code_of(&words(before), &words(after))
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

/// The same of a text that has both forms of what changed ([`crate::source::both`]), preprocessed with `-dU`; `None` where it is not said:
/// a macro that differs is used, or the marks are not in their order.
pub(crate) fn same_in_both(text: &str, macros: &BTreeSet<String>, forgets_unused: bool) -> Option<bool> {
    let mut words = words(text);
    if !macros.is_empty() && words.iter().filter_map(used_macro).any(|name| macros.contains(name)) {
        return None;
    }
    words.retain(|word| used_macro(word).is_none());
    if forgets_unused && uses_nothing_of_one_side(&words) {
        return Some(true);
    }
    let [before, after] = sides(&words)?;
    Some(if forgets_unused {
        same_code_of(&before, &after)
    } else {
        Renaming::default().same(&before, &after)
    })
}

/// The macro that the compiler says to be expanded, or tested.
fn used_macro<'a>(word: &Word<'a>) -> Option<&'a str> {
    let line = word.text.strip_prefix('#').filter(|_| word.kind == Kind::Directive)?;
    let rest = line.strip_prefix("define ").or_else(|| line.strip_prefix("undef "))?;
    rest.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_')).next()
}

/// Which mark a word is, and of which place.
fn mark<'a>(word: &Word<'a>) -> Option<(usize, &'a str)> {
    let numbers = MARKS.iter().map(|mark| word.text.strip_prefix(mark));
    numbers.enumerate().find_map(|(which, number)| Some((which, number?)))
}

/// The words of each form; `None` where the marks are not in their order.
fn sides<'a>(words: &[Word<'a>]) -> Option<[Vec<Word<'a>>; 2]> {
    let [mut before, mut after] = [Vec::with_capacity(words.len()), Vec::with_capacity(words.len())];
    let mut now: Option<(usize, &str)> = None;
    let mut all = words.iter();
    while let Some(word) = all.next() {
        if let Some((which, number)) = mark(word) {
            now = match (now, which) {
                (None, 0) => Some((0, number)),
                (Some((0, same)), 1) if same == number => Some((1, number)),
                (Some((1, same)), 2) if same == number => None,
                _ => return None,
            };
            all.next().filter(|word| word.is(b';'))?;
            continue;
        }
        if now.is_none_or(|(side, _)| side == 0) {
            before.push(*word);
        }
        if now.is_none_or(|(side, _)| side == 1) {
            after.push(*word);
        }
    }
    now.is_none().then_some([before, after])
}

/// Whether the marks stand between declarations, and the code uses none of those that only one form has.
fn uses_nothing_of_one_side(words: &[Word<'_>]) -> bool {
    let mut both = Vec::new();
    let mut one_side: HashSet<&str> = HashSet::new();
    let mut next: (usize, Option<&str>) = (0, None);
    for words in split(words) {
        if let [first, _] = words
            && let Some((which, number)) = mark(first)
        {
            if which != next.0 || next.1.is_some_and(|same| same != number) {
                return false;
            }
            next = if which == 2 {
                (0, None)
            } else {
                (which + 1, Some(number))
            };
            continue;
        }
        // Within a declaration.
        if words.iter().any(|word| mark(word).is_some()) {
            return false;
        }
        let one = declaration(words);
        if next.0 == 0 {
            both.push(one);
        } else if one.is_root {
            return false;
        } else {
            one_side.extend(one.names);
        }
    }
    if next.0 != 0 {
        return false;
    }
    let mut uses = false;
    reached(&both, |name| uses |= one_side.contains(name));
    !uses
}

fn same_code_of(before: &[Word<'_>], after: &[Word<'_>]) -> bool {
    Renaming::default().same(before, after) || Renaming::default().same(&used(before), &used(after))
}

/// The words of all declarations that the code uses, in their order.
fn used<'a>(words: &[Word<'a>]) -> Vec<Word<'a>> {
    let all: Vec<Declaration<'_, 'a>> = split(words).into_iter().map(declaration).collect();
    let mut numbers = reached(&all, |_| {});
    numbers.sort_unstable();
    let used = numbers.iter().filter_map(|number| all.get(*number));
    used.flat_map(|one| one.words.iter().copied()).collect()
}

/// The numbers of the declarations that the code uses; `mentioned` is told each name in them, once.
fn reached<'a>(all: &[Declaration<'_, 'a>], mut mentioned: impl FnMut(&'a str)) -> Vec<usize> {
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
        mentions(one.words, |name| {
            if seen.insert(name) {
                mentioned(name);
                let numbers = by_name.get(name).into_iter().flatten();
                wanted.extend(numbers.filter(|number| reached.insert(**number)));
            }
        });
    }
    reached.into_iter().collect()
}

/// Names that a declaration may mean something by. Assembly and aliases name others in strings.
fn mentions<'a>(words: &[Word<'a>], mut told: impl FnMut(&'a str)) {
    let in_strings = words
        .iter()
        .any(|word| ["asm", "__asm__", "__asm"].contains(&word.text) || RENAMED.contains(&word.text));
    for word in words {
        match word.kind {
            Kind::Word => {
                if let Some(own) = word.text.strip_prefix("__builtin_") {
                    told(own);
                }
                told(word.text);
            }
            Kind::Constant if in_strings && word.text.contains('"') => {
                let parts = word.text.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'));
                parts.filter(|part| !part.is_empty()).for_each(&mut told);
            }
            _ => {}
        }
    }
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

    #[test]
    fn both_forms_in_one_text_are_compared_as_the_code_uses_them() {
        let text = |old: &str, new: &str, user: &str| {
            let [before, between, behind] = MARKS;
            format!("int a(void);\n{before}0 ;\n{old}\n{between}0 ;\n{new}\n{behind}0 ;\n{user}\n")
        };
        let macros = BTreeSet::from(["ONE".to_owned()]);
        let same = |text: &str| same_in_both(text, &macros, true);
        let (old, new) = (
            "static int low(void) { return 1; }",
            "static int low(void) { return 2; }",
        );
        assert_eq!(same(&text(old, new, "int f(void) { return a(); }")), Some(true));
        assert_eq!(same(&text(old, new, "int f(void) { return low(); }")), Some(false));
        assert_eq!(same(&text(old, old, "int f(void) { return low(); }")), Some(true));
        assert_eq!(same(&text("", "int object;", "")), Some(false));
        // Within a declaration.
        let inside = format!("int f(int a) {{\n{}}}\n", text("a++;", "a--;", "return a;"));
        assert_eq!(same(&inside), Some(false));
        assert_eq!(same(&inside.replace("a--", "a++")), Some(true));
        let used = text(old, new, "#define ONE 1\nint f(void) { return a(); }");
        assert_eq!(same(&used), None);
        assert_eq!(same(&used.replace("define ONE 1", "undef ONE")), None);
        assert_eq!(same(&used.replace("ONE", "TWO")), Some(true));
        for (from, to) in [(MARKS[1], ""), (MARKS[1], MARKS[0]), (MARKS[2], MARKS[1])] {
            let text = text(old, new, "int f(void) { return low(); }");
            assert_eq!(same(&text.replacen(from, to, 1)), None, "{to}");
        }
        assert_eq!(same_in_both(&text(old, new, ""), &macros, false), Some(false));
    }
}
