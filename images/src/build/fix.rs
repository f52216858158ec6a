//! A livepatch module out of a fixed source file: the fixed functions with what they need of their file, renamed, and
//! the patch that names the old ones.

use patch_build::source::c_text::{self, Function};

use super::{Error, Module};

/// Turns `WARN_ON` and its kind into their bare condition: a warning is a trap that the kernel looks up in the module's
/// bug table, and vmpatch does not register such tables. `linux/bug.h` comes first so that every later header sees it.
const WITHOUT_WARNINGS: &str = "#include <linux/bug.h>\n\
                                #undef __WARN_FLAGS\n\
                                #define __WARN_FLAGS(flags) do { (void)(flags); } while (0)\n";

/// Functions of one source file, as they are after a fix.
#[derive(Clone, Copy, Debug)]
pub struct FixedFunctions<'a> {
    /// The file, for messages.
    pub file: &'a str,
    /// The file's text with the fix.
    pub text: &'a str,
    /// The functions that the fix changed.
    pub functions: &'a [&'a str],
}

impl FixedFunctions<'_> {
    /// The livepatch module of that name that replaces the functions.
    ///
    /// The file's static functions that they call are carried along; other functions and all data must be exported by
    /// the kernel, else the build says which one is not.
    pub fn module(&self, name: &str) -> Result<Module, Error> {
        Ok(Module::new(name).source(name, self.source()?))
    }

    fn source(&self) -> Result<String, Error> {
        let defined = c_text::functions(self.text);
        let carried = self.carried(&defined)?;
        let mut parts = vec![
            "#define pr_fmt(fmt) KBUILD_MODNAME \": \" fmt\n".to_owned(),
            WITHOUT_WARNINGS.to_owned(),
        ];
        parts.push(c_text::includes(self.text).join("\n"));
        parts.push("#include \"livepatch.h\"\n".to_owned());
        for function in defined.iter().filter(|function| carried.contains(&function.name)) {
            let linkage = if function.is_static { "" } else { "static " };
            parts.push(format!("{linkage}{}\n", self.with_new_names(function.text)));
        }
        let patches = self
            .functions
            .iter()
            .map(|name| format!("PATCH({name}, {})", new_name(name)));
        parts.push(format!("LIVEPATCH({});\n", patches.collect::<Vec<_>>().join(", ")));
        Ok(parts.join("\n"))
    }

    /// The names of the functions to carry: the fixed ones, and the static ones that they call, directly or not.
    fn carried<'t>(&self, defined: &[Function<'t>]) -> Result<Vec<&'t str>, Error> {
        let mut carried: Vec<&str> = Vec::new();
        let mut wanted: Vec<&str> = self.functions.to_vec();
        while let Some(name) = wanted.pop() {
            if carried.contains(&name) {
                continue;
            }
            let definitions: Vec<_> = defined.iter().filter(|function| function.name == name).collect();
            let [function] = definitions.as_slice() else {
                return Err(Error::NotOneDefinition {
                    file: self.file.to_owned(),
                    function: name.to_owned(),
                    found: definitions.len(),
                });
            };
            carried.push(function.name);
            let helper = |word: &&str| {
                defined
                    .iter()
                    .any(|function| function.is_static && function.name == *word)
            };
            wanted.extend(c_text::words(function.text).filter(helper));
        }
        Ok(carried)
    }

    fn with_new_names(&self, text: &str) -> String {
        let rename = |text: String, name: &&str| c_text::renamed(&text, name, &new_name(name));
        self.functions.iter().fold(text.to_owned(), rename)
    }
}

fn new_name(old: &str) -> String {
    format!("livepatch_{old}")
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: &str = "#include <linux/a.h>\n#include \"b.h\"\n\nstatic int low(int a)\n{\n\treturn a;\n}\n\n\
                        static int high(int a)\n{\n\treturn low(a);\n}\n\nint other(void)\n{\n\treturn 0;\n}\n\n\
                        int fixed(int a)\n{\n\treturn a ? fixed(high(a)) : other();\n}\n";

    fn fixed<'a>(functions: &'a [&'a str]) -> FixedFunctions<'a> {
        FixedFunctions {
            file: "x.c",
            text: FILE,
            functions,
        }
    }

    #[test]
    fn static_helpers_come_along_and_the_fixed_function_gets_a_new_name() {
        let source = fixed(&["fixed"]).source().unwrap();
        let low = source.find("static int low(int a)").unwrap();
        let high = source.find("static int high(int a)").unwrap();
        let new =
            source.find("static int livepatch_fixed(int a)\n{\n\treturn a ? livepatch_fixed(high(a)) : other();\n}");
        assert!(low < high && high < new.unwrap(), "{source}");
        assert!(
            source.contains("#include <linux/a.h>") && !source.contains("b.h"),
            "{source}"
        );
        assert!(!source.contains("int other(void)"), "{source}");
        assert!(
            source.ends_with("LIVEPATCH(PATCH(fixed, livepatch_fixed));\n"),
            "{source}"
        );
    }

    #[test]
    fn a_function_that_the_file_does_not_define_is_an_error() {
        let message = fixed(&["missing"]).source().unwrap_err().to_string();
        assert_eq!(message, "x.c has 0 definitions of missing, not one");
    }
}
