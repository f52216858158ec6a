//! Reads C text as far as taking a function out of a file needs: tokens, and where each definition begins and ends.
//!
//! It knows no grammar; it relies on what the kernel's coding style (Documentation/process/coding-style.rst) promises:
//! a function's last brace stands in the first column, and no blank line parts a function's head. Grammars of C trip over
//! the kernel's macros: one that is well kept takes 10,000 lines of net/core/dev.c for one error.

use std::ops::Range;

use super::tokens::{Kind, Token, is_word, run_of, tokens};

/// What may stand between a function's parameters and its body, or before its type, and looks like its name.
const ANNOTATIONS: [&str; 8] = [
    "__acquires",
    "__aligned",
    "__attribute__",
    "__must_hold",
    "__printf",
    "__releases",
    "__section",
    "__no_sanitize",
];

/// What a file defines at its top level.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Definition<'a> {
    /// A function.
    Function(Function<'a>),
    /// A macro.
    Macro {
        /// Its name.
        name: &'a str,
        /// The whole definition, with its continued lines.
        text: &'a str,
    },
    /// Data, a type, or a declaration, up to its semicolon.
    Other {
        /// The whole declaration.
        text: &'a str,
    },
}

impl<'a> Definition<'a> {
    /// The whole definition.
    pub fn text(&self) -> &'a str {
        match self {
            Self::Function(function) => function.text,
            Self::Macro { text, .. } | Self::Other { text } => text,
        }
    }
}

/// A function that a file defines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Function<'a> {
    /// Its name; where a macro makes the function (`SYSCALL_DEFINE3(read, …)`), the macro's first argument.
    pub name: &'a str,
    /// The macro that makes it.
    pub made_by: Option<&'a str>,
    /// Whether only its own file sees it.
    pub is_static: bool,
    /// The whole definition.
    pub text: &'a str,
}

impl Function<'_> {
    /// Whether the function is meant by that name: its own, or one that a symbol table has for a system call (include/linux/syscalls.h,
    /// arch/x86/include/asm/syscall_wrapper.h of 6.1).
    pub fn is_called(&self, name: &str) -> bool {
        let compat = self.made_by.is_some_and(|by| by.starts_with("COMPAT_"));
        let prefixes: &[&str] = match self.made_by {
            Some(by) if !by.contains("SYSCALL_DEFINE") => &[""],
            Some(_) if compat => &["compat_sys_", "__do_compat_sys_", "__se_compat_sys_"],
            Some(_) => &["", "sys_", "__do_sys_", "__se_sys_", "__x64_sys_", "__ia32_sys_"],
            None => &[""],
        };
        prefixes
            .iter()
            .any(|prefix| name.strip_prefix(prefix) == Some(self.name))
    }
}

/// All functions that a file defines, in its order.
pub fn functions(text: &str) -> Vec<Function<'_>> {
    let function = |definition| match definition {
        Definition::Function(function) => Some(function),
        _ => None,
    };
    definitions(text).into_iter().filter_map(function).collect()
}

/// All that a file defines at its top level, in its order.
pub fn definitions(text: &str) -> Vec<Definition<'_>> {
    let mut all = Vec::new();
    let mut head = Head::default();
    let mut body: Option<Head> = None;
    let mut braces = 0_usize;
    for token in tokens(text) {
        let first_column = token.range.start == 0 || text.as_bytes().get(token.range.start - 1) == Some(&b'\n');
        match token.kind {
            Kind::Punctuation(b'}') => {
                braces = if first_column { 0 } else { braces.saturating_sub(1) };
                if braces == 0
                    && let Some(finished) = body.take()
                {
                    all.extend(finished.function(text, token.range.end).map(Definition::Function));
                    head = Head::default();
                }
            }
            Kind::Punctuation(b'{') => {
                if braces == 0 && head.is_function() {
                    body = Some(std::mem::take(&mut head));
                }
                braces += 1;
            }
            Kind::Punctuation(b';') if braces == 0 => {
                let range = std::mem::take(&mut head).start.map(|start| start..token.range.end);
                let text = range.and_then(|range| text.get(range));
                all.extend(text.map(|text| Definition::Other { text }));
            }
            Kind::Directive | Kind::Blank if braces == 0 => {
                // A declaration may have blank lines within its braces only.
                head = Head::default();
                all.extend(text.get(token.range).and_then(definition_of_macro));
            }
            Kind::Directive => all.extend(text.get(token.range).and_then(definition_of_macro)),
            _ if braces == 0 => head.push(text, &token),
            _ => {}
        }
    }
    all
}

/// Reads a preprocessor line.
fn definition_of_macro(line: &str) -> Option<Definition<'_>> {
    let rest = line
        .strip_prefix('#')?
        .trim_start()
        .strip_prefix("define")?
        .trim_start();
    let name = rest.get(..run_of(rest.as_bytes(), is_word))?;
    (!name.is_empty()).then_some(Definition::Macro { name, text: line })
}

/// The lines of a file that include a system-wide header (`<…>`), in its order.
pub fn includes(text: &str) -> Vec<&str> {
    let wanted = |line: &&str| line.starts_with("#include <");
    text.lines().filter(wanted).collect()
}

/// The names and keywords that a text uses.
pub fn words(text: &str) -> impl Iterator<Item = &str> {
    let word = |token: Token| (token.kind == Kind::Word).then(|| text.get(token.range)).flatten();
    tokens(text).into_iter().filter_map(word)
}

/// The names that a declaration (see [`Definition::Other`]) introduces: variables, prototypes, the tag and the enumerators
/// of a type, the first argument of a macro that defines something.
pub fn declared(text: &str) -> impl Iterator<Item = &str> {
    let mut names = Vec::new();
    let mut depth = 0_usize;
    let mut is_enum = false;
    let mut is_tag = false;
    let mut in_value = false;
    let mut last: Option<&str> = None;
    let mut wants_argument = false;
    let mut has_enumerator = false;
    for token in tokens(text) {
        let word = text.get(token.range.clone()).unwrap_or_default();
        match token.kind {
            Kind::Word if depth == 0 && !in_value => {
                is_enum |= word == "enum";
                last = Some(word);
                if is_tag {
                    names.push(word);
                }
                is_tag = ["struct", "union", "enum"].contains(&word);
            }
            Kind::Word if wants_argument => {
                names.push(word);
                wants_argument = false;
            }
            Kind::Word if is_enum && depth == 1 && !has_enumerator => {
                names.push(word);
                has_enumerator = true;
            }
            Kind::Punctuation(b'{' | b'(' | b'[') => {
                if depth == 0 && !in_value {
                    let is_macro = last.is_some_and(|last| last.chars().all(|c| !c.is_ascii_lowercase()));
                    wants_argument = token.kind == Kind::Punctuation(b'(') && is_macro;
                    names.extend(last.take().filter(|_| token.kind != Kind::Punctuation(b'{')));
                }
                depth += 1;
            }
            Kind::Punctuation(b'}' | b')' | b']') => depth = depth.saturating_sub(1),
            Kind::Punctuation(b'=' | b',' | b';') if depth == 0 => {
                names.extend(last.take());
                in_value = token.kind == Kind::Punctuation(b'=');
            }
            Kind::Punctuation(b',') if depth == 1 => has_enumerator = false,
            _ => {}
        }
    }
    names.into_iter()
}

/// The text with one name replaced by another wherever it stands as a whole word, outside comments and constants.
pub fn renamed(text: &str, from: &str, to: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut done = 0;
    for token in tokens(text) {
        if token.kind == Kind::Word && text.get(token.range.clone()) == Some(from) {
            out.push_str(text.get(done..token.range.start).unwrap_or_default());
            out.push_str(to);
            done = token.range.end;
        }
    }
    out.push_str(text.get(done..).unwrap_or_default());
    out
}

/// What was read since the last declaration ended.
#[derive(Debug, Default)]
struct Head {
    start: Option<usize>,
    is_static: bool,
    /// The word before the first parenthesis that is no annotation's.
    name: Option<Range<usize>>,
    /// The first word within that parenthesis.
    argument: Option<Range<usize>>,
    parentheses: usize,
    last_word: Option<Range<usize>>,
    has_value: bool,
}

impl Head {
    fn push(&mut self, text: &str, token: &Token) {
        self.start.get_or_insert(token.range.start);
        let word = text.get(token.range.clone()).unwrap_or_default();
        match token.kind {
            Kind::Punctuation(b'(') => {
                if self.parentheses == 0 && self.name.is_none() {
                    self.name = self.last_word.take().filter(|word| {
                        let word = text.get(word.clone()).unwrap_or_default();
                        !ANNOTATIONS.contains(&word)
                    });
                }
                self.parentheses += 1;
            }
            Kind::Punctuation(b')') => self.parentheses = self.parentheses.saturating_sub(1),
            Kind::Punctuation(b'=') => self.has_value = true,
            Kind::Word if self.parentheses > 0 && self.name.is_some() => {
                self.argument.get_or_insert(token.range.clone());
            }
            Kind::Word if self.parentheses > 0 => {}
            Kind::Word => {
                self.is_static |= word == "static";
                self.last_word = Some(token.range.clone());
            }
            _ => {}
        }
    }

    fn is_function(&self) -> bool {
        self.name.is_some() && self.parentheses == 0 && !self.has_value
    }

    fn function<'a>(&self, text: &'a str, end: usize) -> Option<Function<'a>> {
        let name = text.get(self.name.clone()?)?;
        let made_by = name.chars().all(|c| !c.is_ascii_lowercase()).then_some(name);
        Some(Function {
            name: match (made_by, self.argument.clone()) {
                (Some(_), Some(argument)) => text.get(argument)?,
                _ => name,
            },
            made_by,
            is_static: self.is_static,
            text: text.get(self.start?..end)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(text: &str) -> Vec<(&str, bool)> {
        functions(text).iter().map(|f| (f.name, f.is_static)).collect()
    }

    #[test]
    fn a_function_is_taken_whole_without_its_neighbours() {
        let text = "static int x;\n\n/* int f(void) { */\nstatic int\nf(int a) /* { */\n{\n\tif (a) {\n\t\tputs(\"}\\\"\");\n\t}\n\treturn '}';\n}\nEXPORT_SYMBOL(f);\n";
        let found = functions(text);
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].name, "f");
        assert!(found[0].is_static);
        assert!(found[0].text.starts_with("static int\nf(int a)"), "{}", found[0].text);
        assert!(found[0].text.ends_with("return '}';\n}"), "{}", found[0].text);
    }

    #[test]
    fn declarations_types_and_initialised_data_are_no_functions() {
        let text = "int f(int);\nstruct s {\n\tint (*f)(int);\n};\nstatic const struct s s = {\n\t.f = g(h),\n};\nint g(void)\n{\n}\n";
        assert_eq!(names(text), [("g", false)]);
    }

    #[test]
    fn a_system_call_is_known_by_its_own_name_and_its_symbols() {
        let text = "SYSCALL_DEFINE2(link, const char __user *, a,\n\t\tint, b)\n{\n}\nCOMPAT_SYSCALL_DEFINE1(link, int, a)\n{\n}\n";
        let found = functions(text);
        let called = |name: &str| found.iter().filter(|f| f.is_called(name)).count();
        assert_eq!(names(text), [("link", false), ("link", false)]);
        assert_eq!(
            ["link", "__do_sys_link", "__x64_sys_link", "compat_sys_link"].map(called),
            [1; 4]
        );
        assert_eq!(called("sys"), 0);
    }

    #[test]
    fn macros_data_and_types_are_definitions_too() {
        let text = "#include <a.h>\n# define A(x) \\\n\t(x)\nstatic int a = {\n\n\t1,\n};\n\nstruct s {\n#define B 1\n\tint b;\n};\nint f(void);\n";
        let found: Vec<&str> = definitions(text).iter().map(Definition::text).collect();
        assert_eq!(
            found,
            [
                "# define A(x) \\\n\t(x)",
                "static int a = {\n\n\t1,\n};",
                "#define B 1",
                "struct s {\n#define B 1\n\tint b;\n};",
                "int f(void);"
            ]
        );
    }

    #[test]
    fn a_declaration_introduces_its_variables_its_tag_and_its_enumerators() {
        let names = |text: &'static str| declared(text).collect::<Vec<_>>();
        assert_eq!(names("static int a = b(c), d[E];"), ["a", "d"]);
        assert_eq!(names("struct s {\n\tint b;\n};"), ["s"]);
        assert_eq!(names("enum e { A, B = C(1), D };"), ["e", "A", "B", "D"]);
        assert_eq!(names("static DEFINE_MUTEX(lock);"), ["DEFINE_MUTEX", "lock"]);
        assert_eq!(names("static void f(struct s *s, int a);"), ["f"]);
    }

    #[test]
    fn annotations_are_not_taken_for_the_name() {
        let text = "static __printf(1, 2) void f(const char *s, ...)\n{\n}\nvoid g(void)\n\t__acquires(RCU)\n{\n}\n";
        assert_eq!(names(text), [("f", true), ("g", false)]);
    }

    #[test]
    fn a_brace_more_in_one_branch_of_a_condition_is_made_good_by_the_last_brace() {
        let text = "int f(int a)\n{\n#ifdef A\n\tif (a) {\n#else\n\tif (!a) {\n#endif\n\t}\n}\n\nint g(void)\n{\n}\n";
        assert_eq!(names(text), [("f", false), ("g", false)]);
    }

    #[test]
    fn a_macro_line_without_semicolon_is_not_taken_along() {
        let text = "BTF_SET_END(x)\n\nint f(void)\n{\n}\n#define M(a) \\\n\tint a(void) { }\nint g(void)\n{\n}\n";
        let found = functions(text);
        assert_eq!(found[0].text, "int f(void)\n{\n}");
        assert_eq!(found[1].text, "int g(void)\n{\n}");
    }

    #[test]
    fn only_whole_words_are_renamed() {
        let text = "f(ff, f) /* f */ + \"f\" + s.f";
        assert_eq!(renamed(text, "f", "new"), "new(ff, new) /* f */ + \"f\" + s.new");
    }

    #[test]
    fn text_that_ends_in_the_middle_of_something_is_read_to_its_end() {
        for text in ["/* x", "\"x", "'", "// x", "#define x \\", "int f(void) {", "}"] {
            assert_eq!(functions(text), [], "{text}");
        }
    }
}
