//! A changed header before and after the change as one text, so that the compiler preprocesses both at once.
//!
//! The text is the old one. Where declarations differ, both forms stand behind one another, with marks before, between and behind them. Of
//! macros that differ one form is there: nothing depends on it where the compiler says (`-dU`) that none of them is expanded or tested.

use std::collections::BTreeSet;
use std::ops::Range;

use super::slice::declaration::split;
use super::slice::words::Word;
use super::tokens::{Kind, Token, is_word, run_of, tokens};
use crate::lcs;

/// How the marks begin that stand before the old form, between the two, and behind the new one. A number follows.
pub(super) const MARKS: [&str; 3] = ["__vmpatch_before_", "__vmpatch_after_", "__vmpatch_end_"];

/// What may be one operator with the mark before it.
const OPERATORS: &[u8] = b"+-<>=&|.#";

/// Both texts in one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Both {
    /// The text.
    pub text: String,
    /// The macros that differ.
    pub macros: BTreeSet<String>,
}

/// A text's words, and where they are.
struct Words<'a> {
    words: Vec<Word<'a>>,
    ranges: Vec<Range<usize>>,
}

/// A declaration, or a line of the preprocessor.
struct Item<'w, 'a> {
    words: &'w [Word<'a>],
    /// With what is between the words.
    text: &'a str,
    range: Range<usize>,
}

/// What an item that differs may be.
enum What<'a> {
    Declaration,
    /// With what stands between its name and its body: the parameters of one that takes arguments.
    Macro(&'a str, &'a str),
}

/// A place where the texts differ, by the numbers of items.
type Hunk = (Range<usize>, Range<usize>);

/// Both texts as one; `None` where more differs than declarations and macros, or where those stand in each other's way.
pub(crate) fn both(old: &str, new: &str) -> Option<Both> {
    let words = [Words::of(old), Words::of(new)];
    let [old_items, new_items] = [words[0].items(old)?, words[1].items(new)?];
    let mut both = Both::default();
    let mut declarations = Vec::new();
    let mut at = 0;
    for (number, (removed, added)) in hunks(&old_items, &new_items)?.into_iter().enumerate() {
        let before = removed.start.checked_sub(1).and_then(|last| old_items.get(last));
        let before = before.map_or(0, |item| item.range.end);
        let [removed, added] = [old_items.get(removed)?, new_items.get(added)?];
        let start = removed.first().map_or(before, |item| item.range.start);
        let end = removed.last().map_or(before, |item| item.range.end);
        both.text.push_str(old.get(at..start)?);
        at = end;
        both.text.push_str(&macros(removed, added, &mut both.macros)?);
        let line = |at: usize| Some(old.get(..at)?.matches('\n').count() + 1);
        let (first, last) = (line(start)?, line(end)?);
        let [before, between, behind] = MARKS;
        for (mark, line, items) in [(before, first, removed), (between, first, added), (behind, last, &[])] {
            both.text.push_str(&format!("\n{mark}{number} ;\n#line {line}\n"));
            for item in items
                .iter()
                .filter(|item| matches!(what(item), Some(What::Declaration)))
            {
                both.text.push_str(item.text);
                both.text.push('\n');
                declarations.push(item);
            }
        }
        // The rest of the line has its number.
        both.text.truncate(both.text.trim_end_matches('\n').len() + 1);
    }
    both.text.push_str(old.get(at..)?);
    let is_free = |item: &&Item<'_, '_>| !item.mentions(&both.macros);
    declarations.iter().all(is_free).then_some(both)
}

/// The lines of the macros that differ at a place: of each the new form if there is one.
fn macros(removed: &[Item<'_, '_>], added: &[Item<'_, '_>], names: &mut BTreeSet<String>) -> Option<String> {
    let mut text = String::new();
    let mut forms: [Vec<(&str, &str)>; 2] = Default::default();
    for (items, forms) in [added, removed].into_iter().zip(&mut forms) {
        for item in items {
            if let What::Macro(name, parameters) = what(item)? {
                forms.push((name, parameters));
            }
        }
    }
    let [come, gone] = &forms;
    // One that takes other arguments would be expanded at other places.
    let is_kept = |form: &&(&str, &str)| come.iter().all(|other| other.0 != form.0 || other == *form);
    if !gone.iter().all(|form| is_kept(&form)) {
        return None;
    }
    for (item, is_old) in added
        .iter()
        .map(|item| (item, false))
        .chain(removed.iter().map(|item| (item, true)))
    {
        let Some(What::Macro(name, _)) = what(item) else {
            continue;
        };
        if !(is_old && come.iter().any(|other| other.0 == name)) {
            text.push_str(&format!("\n{}\n", item.text));
        }
        names.insert(name.to_owned());
    }
    Some(text)
}

/// Where the items differ.
fn hunks(old: &[Item<'_, '_>], new: &[Item<'_, '_>]) -> Option<Vec<Hunk>> {
    let mut hunks: Vec<Hunk> = Vec::new();
    let (mut next_old, mut next_new) = (0, 0);
    let places = lcs::places(old, new)?;
    let common = places
        .iter()
        .enumerate()
        .filter_map(|(there, at)| Some(((*at)?, there)));
    for (at, there) in common.chain([(old.len(), new.len())]) {
        if at > next_old || there > next_new {
            hunks.push((next_old..at, next_new..there));
        }
        (next_old, next_new) = (at + 1, there + 1);
    }
    Some(hunks)
}

/// What an item is; `None` for what may be none of a change.
fn what<'a>(item: &Item<'_, 'a>) -> Option<What<'a>> {
    const CONDITIONS: [&str; 6] = ["if", "ifdef", "ifndef", "elif", "else", "endif"];
    if let [
        Word {
            text,
            kind: Kind::Directive,
            ..
        },
    ] = item.words
    {
        let rest = directive(text)?.1.strip_prefix("define")?;
        let rest = rest.strip_prefix([' ', '\t'])?.trim_start();
        let name = rest.get(..run_of(rest.as_bytes(), is_word))?;
        let rest = rest.get(name.len()..)?;
        let parameters = match rest.strip_prefix('(') {
            Some(inside) => rest.get(..inside.find(')')? + 2)?,
            None => "",
        };
        return (!name.is_empty()).then_some(What::Macro(name, parameters));
    }
    let mut depth = 0_usize;
    for word in item.words.iter().filter(|word| word.kind == Kind::Directive) {
        match directive(word.text)?.0 {
            name if name.starts_with("if") && CONDITIONS.contains(&name) => depth += 1,
            "endif" => depth = depth.checked_sub(1)?,
            name if CONDITIONS.contains(&name) && depth > 0 => {}
            _ => return None,
        }
    }
    let ends = item.words.last().is_some_and(|word| word.is(b';') || word.is(b'}'));
    (depth == 0 && ends).then_some(What::Declaration)
}

/// The name of a line of the preprocessor, and the line from there on.
fn directive(text: &str) -> Option<(&str, &str)> {
    let rest = text.strip_prefix('#')?.trim_start();
    Some((rest.get(..run_of(rest.as_bytes(), is_word))?, rest))
}

impl<'a> Words<'a> {
    fn of(text: &'a str) -> Self {
        let (mut words, mut ranges) = (Vec::new(), Vec::new());
        let mut end = 0;
        for Token { kind, range } in tokens(text) {
            let joined = range.start == end && matches!(kind, Kind::Punctuation(mark) if OPERATORS.contains(&mark));
            end = range.end;
            if let (false, Some(text)) = (kind == Kind::Blank, text.get(range.clone())) {
                words.push(Word { text, kind, joined });
                ranges.push(range);
            }
        }
        Self { words, ranges }
    }

    fn items<'w>(&'w self, text: &'a str) -> Option<Vec<Item<'w, 'a>>> {
        let mut next = 0;
        let mut items = Vec::new();
        for words in split(&self.words) {
            let ranges = self.ranges.get(next..next + words.len())?;
            next += words.len();
            let range = ranges.first()?.start..ranges.last()?.end;
            items.push(Item {
                words,
                text: text.get(range.clone())?,
                range,
            });
        }
        Some(items)
    }
}

impl Item<'_, '_> {
    /// Whether it has one of those names in it.
    fn mentions(&self, names: &BTreeSet<String>) -> bool {
        let mut words = self.text.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'));
        !names.is_empty() && words.any(|word| names.contains(word))
    }
}

impl PartialEq for Item<'_, '_> {
    fn eq(&self, other: &Self) -> bool {
        self.words == other.words
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEADER: &str = "#ifndef H_H\n#define H_H\n/* of\n all */\n#define ONE 1\n\
        static inline int low(int a)\n{\n#ifdef X\n\ta++;\n#endif\n\treturn a;\n}\nint f(void); /* x */\n#endif\n";

    fn changed(from: &str, to: &str) -> Option<Both> {
        assert!(HEADER.contains(from), "{from}");
        both(HEADER, &HEADER.replacen(from, to, 1))
    }

    fn text(from: &str, to: &str) -> String {
        let both = changed(from, to).unwrap();
        assert_eq!(both.macros.len(), 0);
        both.text
    }

    #[test]
    fn both_forms_of_a_declaration_stand_between_marks() {
        assert_eq!(
            text("int f(void);", "long f(void);"),
            HEADER.replace(
                "int f(void);",
                "\n__vmpatch_before_0 ;\n#line 13\nint f(void);\n\n__vmpatch_after_0 ;\n#line 13\nlong f(void);\n\n\
                 __vmpatch_end_0 ;\n#line 13\n"
            )
        );
        assert_eq!(
            text("int f(void);", ""),
            HEADER.replace(
                "int f(void);",
                "\n__vmpatch_before_0 ;\n#line 13\nint f(void);\n\n__vmpatch_after_0 ;\n#line 13\n\n__vmpatch_end_0 ;\n#line 13\n"
            )
        );
        let new = text("int f(void);", "int f(void); int g(void);");
        assert!(new.contains(
            "int f(void);\n__vmpatch_before_0 ;\n#line 13\n\n__vmpatch_after_0 ;\n#line 13\nint g(void);\n\n"
        ));
        assert!(text("return a;", "return a + 1;").contains("#ifdef X\n\ta++;\n#endif\n\treturn a + 1;\n}\n"));
    }

    #[test]
    fn comments_and_spaces_are_no_difference() {
        assert_eq!(text("/* of\n all */", "// none"), HEADER);
        assert_eq!(text("int f(void);", "int\tf( void );"), HEADER);
        assert!(both("int a = b - -c;", "int a = b --c;").is_some_and(|both| both.text.contains(MARKS[0])));
        assert!(both("#define A(x) x\n", "#define A (x) x\n").is_none());
    }

    #[test]
    fn of_macros_the_new_form_is_there_and_of_those_that_are_gone_the_old_one() {
        let both = changed("#define ONE 1\n", "#define ONE 2\n#define TWO(a) a\n").unwrap();
        assert!(both.text.contains("#define ONE 2\n") && both.text.contains("#define TWO(a) a\n"));
        assert!(!both.text.contains("#define ONE 1\n"));
        assert_eq!(both.macros, BTreeSet::from(["ONE".to_owned(), "TWO".to_owned()]));
        let both = changed("#define ONE 1\n", "").unwrap();
        assert!(both.text.contains("#define ONE 1\n") && both.macros.contains("ONE"));
    }

    #[test]
    fn of_other_changes_there_is_no_one_text() {
        for (from, to) in [
            ("#define ONE 1", "#include <x.h>"),
            ("#define ONE 1", "#define ONE(a) 1"),
            ("#define ONE 1", "#undef ONE"),
            ("#ifdef X", "#define X\n#ifdef X"),
            ("#define ONE 1", "#ifdef ONE\n#endif"),
            ("int f(void);", "#define more 1\nint f(void) { return more; }"),
            ("#define H_H", "#define H_H\n#pragma pack(1)"),
            ("int f(void);", "int f(void)"),
        ] {
            assert_eq!(changed(from, to), None, "{to}");
        }
        // Braces that conditions change.
        let tangled =
            "#ifdef X\nint g(int a) {\n#else\nint g(long a) {\n#endif\nreturn a; }\nint h(int a) { return 1; }\n";
        assert_eq!(both(tangled, &tangled.replace("return 1", "return 2")), None);
    }

    /// A header with a change, a file that includes it, and whether the compiler makes the same of that.
    const FILES: [(&str, &str, &str, bool); 17] = [
        ("", "static inline int more(int a) { return a + 1; }\n", "", true),
        (
            "",
            "static inline int more(int a) { return a + 1; }\n",
            "int g(int a) { return a - 1; }",
            true,
        ),
        (
            "static inline int low(int a) { return a + 1; }\n",
            "static inline int low(int a) { return a + 2; }\n",
            "int g(int a) { return low(a); }",
            false,
        ),
        (
            "static inline int low(int a) { return a + 1; }\n",
            "static inline int low(int a) { return a + 2; }\n",
            "#define call(a, b) a##b\nint g(int a) { return call(lo, w)(a); }",
            false,
        ),
        (
            "struct s { int a; };\n",
            "struct s { int b, a; };\n",
            "int g(struct s *s) { return s->a; }",
            false,
        ),
        (
            "struct s { int a; };\n",
            "struct s { int b, a; };\n",
            "int g(struct s *s) { return 1; }",
            false,
        ),
        (
            "struct s { int a; };\n",
            "struct s { int b, a; };\n",
            "int g(void *p) { return 1; }",
            true,
        ),
        (
            "enum e { A, B };\n",
            "enum e { N, A, B };\n",
            "int g(void) { return B; }",
            false,
        ),
        (
            "#define ONE 1\n",
            "#define ONE 2\n",
            "int g(void) { return ONE; }",
            false,
        ),
        ("#define ONE 1\n", "#define ONE 2\n", "int g(void) { return 1; }", true),
        (
            "#define ONE 1\n",
            "#define ONE 2\n",
            "#if ONE == 2\nint g(void) { return 1; }\n#endif",
            false,
        ),
        (
            "",
            "#define ONE\n",
            "#ifndef ONE\nint g(void) { return 1; }\n#endif",
            false,
        ),
        (
            "#define ONE\n",
            "",
            "#ifdef ONE\nint g(void) { return 1; }\n#endif",
            false,
        ),
        (
            "",
            "#define ONE 1, 2\n",
            "#define third(a, b, c, ...) c\n#define of(...) third(__VA_ARGS__, 3, 4)\nint g(void) { return of(ONE); }",
            false,
        ),
        (
            "",
            "#define ONE 1, 2\n",
            "#define third(a, b, c, ...) c\n#define of(...) third(__VA_ARGS__, 3, 4)\n#define joined(a, b) of(a##b)\n\
             int g(void) { return joined(O, NE); }",
            false,
        ),
        (
            "#define ONE(a) a\n",
            "#define ONE(a) 2\n",
            "int g(int ONE) { return ONE; }",
            true,
        ),
        ("", "int object = 1;\n", "int g(void) { return 1; }", false),
    ];

    #[test]
    fn the_compiler_makes_the_same_of_what_is_said_to_be_the_same() {
        use std::fs;
        use std::process::Command;
        let folder = std::env::temp_dir().join(format!("vmpatch-both-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let gcc = |header: &str, file: &str, options: &[&str]| {
            fs::write(folder.join("h.h"), header).unwrap();
            fs::write(folder.join("x.c"), file).unwrap();
            let mut gcc = Command::new("gcc");
            gcc.args(options).args(["-o", "x.out", "x.c"]).current_dir(&folder);
            let output = gcc.output().unwrap();
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            fs::read(folder.join("x.out")).unwrap()
        };
        for (old, new, file, is_same) in FILES {
            let around =
                |text: &str| format!("#ifndef H_H\n#define H_H\nextern int one;\n{text}extern int other;\n#endif\n");
            let (old, new) = (around(old), around(new));
            let file = format!("#include \"h.h\"\n#include \"h.h\"\nint f(void) {{ return one; }}\n{file}\n");
            let compiled = [&old, &new].map(|header| gcc(header, &file, &["-O2", "-c"]));
            let both = both(&old, &new).unwrap();
            let text = String::from_utf8(gcc(&both.text, &file, &["-E", "-P", "-dU"])).unwrap();
            let said = crate::source::slice::same_in_both(&text, &both.macros, true);
            assert!(compiled[0] == compiled[1] || said != Some(true), "{new}{file}");
            assert_eq!(said == Some(true), is_same, "{new}{file}{text}");
        }
        fs::remove_dir_all(&folder).unwrap();
    }
}
