//! Takes single functions out of a newer version of a source file into the older one.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::ops::Range;

use super::c_text::{self, Definition, Function};

/// Helpers may need helpers; no fix goes deeper than this.
const HELPERS_MAX: usize = 200;

/// Why a function could not be taken over.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Not exactly one definition of it.
    #[error("{file} of {version} has {found} definitions of {function}, not one")]
    NotOneDefinition {
        /// The source file.
        file: String,
        /// The version that was looked at.
        version: String,
        /// The function.
        function: String,
        /// How many definitions of it the file has.
        found: usize,
    },
    /// The function did not change.
    #[error("{function} is the same in both versions of {file}; functions that differ: {differ}")]
    Same {
        /// The source file.
        file: String,
        /// The function.
        function: String,
        /// The functions of the file that both versions have and that differ.
        differ: String,
    },
    /// More new helpers than any fix has.
    #[error("{file}: the named functions need more than {HELPERS_MAX} definitions that only the newer version has")]
    TooManyHelpers {
        /// The source file.
        file: String,
    },
}

/// Two versions of a source file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Versions<'a> {
    /// The file, for messages.
    pub file: &'a str,
    /// The older version's name, for messages.
    pub from: &'a str,
    /// The older version's text.
    pub old: &'a str,
    /// The newer version's name, for messages.
    pub to: &'a str,
    /// The newer version's text.
    pub new: &'a str,
}

/// What came of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Taken {
    /// The older text with the named functions of the newer one.
    pub text: String,
    /// The definitions that came along, by the names that were looked for.
    pub helpers: Vec<String>,
}

impl Versions<'_> {
    /// The older text, in which the functions of those names are the newer version's. Everything else stays as it was.
    ///
    /// Functions, macros, types and data of the file that these functions use and that only the newer version has come
    /// along, each before what follows it in the newer version.
    pub fn take(&self, functions: &[&str]) -> Result<Taken, Error> {
        let (old, new) = (c_text::definitions(self.old), c_text::definitions(self.new));
        let mut edits: BTreeMap<(usize, usize), Vec<String>> = BTreeMap::new();
        let mut carried = Vec::new();
        for name in functions {
            let after = one(self.file, self.to, &new, name)?;
            let before = one(self.file, self.from, &old, name)?;
            if before.text == after.text {
                return Err(Error::Same {
                    file: self.file.to_owned(),
                    function: (*name).to_owned(),
                    differ: differ(&old, &new),
                });
            }
            if let Some(range) = range_of(self.old, before.text) {
                edits.insert((range.start, range.end), vec![after.text.to_owned()]);
            }
            carried.push(after.text);
        }
        let helpers = self.helpers(&carried, &new)?;
        for (definition, _) in &helpers {
            let at = self.place(*definition, &old, &new);
            edits
                .entry((at, at))
                .or_default()
                .push(format!("{}\n\n", definition.text()));
        }
        Ok(Taken {
            text: edited(self.old, &edits),
            helpers: helpers.into_iter().map(|(_, name)| name.to_owned()).collect(),
        })
    }

    /// The newer version's definitions that `carried` texts use, directly or not, and of whose names the older version has
    /// never heard; in the newer version's order.
    fn helpers<'n>(
        &self,
        carried: &[&'n str],
        new: &[Definition<'n>],
    ) -> Result<Vec<(Definition<'n>, &'n str)>, Error> {
        let known: HashSet<&str> = c_text::words(self.old).collect();
        let mut wanted: Vec<&str> = carried.iter().flat_map(|text| c_text::words(text)).collect();
        let mut seen: HashSet<&str> = HashSet::new();
        let mut found: BTreeMap<usize, &str> = BTreeMap::new();
        while let Some(word) = wanted.pop() {
            if known.contains(word) || !seen.insert(word) {
                continue;
            }
            for (index, definition) in new.iter().enumerate().filter(|(_, one)| defines(one, word)) {
                found.insert(index, word);
                wanted.extend(c_text::words(definition.text()));
            }
            if found.len() > HELPERS_MAX {
                return Err(Error::TooManyHelpers {
                    file: self.file.to_owned(),
                });
            }
        }
        Ok(found
            .into_iter()
            .filter_map(|(index, word)| Some((*new.get(index)?, word)))
            .collect())
    }

    /// Where a definition of the newer version goes in the older one: before the first definition behind it that the older
    /// one has, too; else at the end.
    fn place(&self, definition: Definition<'_>, old: &[Definition<'_>], new: &[Definition<'_>]) -> usize {
        let behind = new
            .iter()
            .skip_while(|one| one.text().as_ptr() != definition.text().as_ptr())
            .skip(1);
        let in_old = |one: &Definition<'_>| {
            let same = |other: &&Definition<'_>| match (one, other) {
                (Definition::Function(a), Definition::Function(b)) => (a.name, a.made_by) == (b.name, b.made_by),
                _ => one.text() == other.text(),
            };
            old.iter().find(same).and_then(|same| range_of(self.old, same.text()))
        };
        let range = behind.into_iter().find_map(in_old);
        range.map_or(self.old.len(), |range| line_start(self.old, range.start))
    }
}

/// The only definition of a function.
fn one<'a>(file: &str, version: &str, all: &[Definition<'a>], name: &str) -> Result<Function<'a>, Error> {
    let called = |definition: &Definition<'a>| match definition {
        Definition::Function(function) if function.is_called(name) => Some(*function),
        _ => None,
    };
    let found: Vec<Function<'a>> = all.iter().filter_map(called).collect();
    match found.as_slice() {
        [function] => Ok(*function),
        found => Err(Error::NotOneDefinition {
            file: file.to_owned(),
            version: version.to_owned(),
            function: name.to_owned(),
            found: found.len(),
        }),
    }
}

/// The names of the functions that both have and that differ.
fn differ(old: &[Definition<'_>], new: &[Definition<'_>]) -> String {
    let functions = |all: &[Definition<'_>]| -> BTreeMap<String, String> {
        let function = |one: &Definition<'_>| match one {
            Definition::Function(function) => Some((function.name.to_owned(), function.text.to_owned())),
            _ => None,
        };
        all.iter().filter_map(function).collect()
    };
    let (old, new) = (functions(old), functions(new));
    let differ = |(name, text): &(&String, &String)| old.get(*name).is_some_and(|other| other != *text);
    let names: BTreeSet<&str> = new.iter().filter(differ).map(|(name, _)| name.as_str()).collect();
    match names.len() {
        0 => "none".to_owned(),
        _ => names.into_iter().collect::<Vec<_>>().join(", "),
    }
}

/// Whether a definition is that of a name.
fn defines(definition: &Definition<'_>, wanted: &str) -> bool {
    match definition {
        Definition::Function(function) => function.name == wanted,
        Definition::Macro { name, .. } => *name == wanted,
        Definition::Other { text } => c_text::declared(text).any(|name| name == wanted),
    }
}

/// Where in `text` its part `part` lies.
fn range_of(text: &str, part: &str) -> Option<Range<usize>> {
    let start = (part.as_ptr() as usize).checked_sub(text.as_ptr() as usize)?;
    let range = start..start.checked_add(part.len())?;
    (text.get(range.clone())? == part).then_some(range)
}

/// Where the comment and the attributes above a definition would begin is unknown; where its line does is not.
fn line_start(text: &str, at: usize) -> usize {
    let before = text.get(..at).unwrap_or_default();
    let start = before.rfind('\n').map_or(0, |newline| newline + 1);
    // A comment that stands right above stays with what it tells of.
    let above = before.get(..start).unwrap_or_default();
    if above.ends_with("*/\n") {
        return above.rfind("/*").map_or(start, |comment| comment);
    }
    start
}

/// `text` with ranges of it replaced.
fn edited(text: &str, edits: &BTreeMap<(usize, usize), Vec<String>>) -> String {
    let mut out = String::with_capacity(text.len());
    let mut done = 0;
    for ((start, end), parts) in edits {
        out.push_str(text.get(done..*start).unwrap_or_default());
        parts.iter().for_each(|part| out.push_str(part));
        done = *end;
    }
    out.push_str(text.get(done..).unwrap_or_default());
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    const OLD: &str = "#include <a.h>\n\nstatic int low(int a)\n{\n\treturn a;\n}\n\n/* Says one thing. */\nint high(int a)\n{\n\treturn low(a);\n}\n\n\
                       int other(void)\n{\n\treturn 0;\n}\n";
    const NEW: &str = "#include <a.h>\n\n#define LIMIT 3\n\nstatic int low(int a)\n{\n\treturn a + 1;\n}\n\nstatic int count;\n\n\
                       static int helper(int a)\n{\n\treturn a > LIMIT ? count : a;\n}\n\n\
                       int high(int a)\n{\n\treturn low(helper(a));\n}\n\nint other(void)\n{\n\treturn 1;\n}\n";

    fn versions<'a>() -> Versions<'a> {
        Versions {
            file: "x.c",
            from: "1",
            old: OLD,
            to: "2",
            new: NEW,
        }
    }

    #[test]
    fn a_function_comes_with_the_helpers_that_are_new_and_all_else_stays() {
        let taken = versions().take(&["high"]).unwrap();
        assert_eq!(taken.helpers, ["LIMIT", "count", "helper"]);
        assert_eq!(
            taken.text,
            "#include <a.h>\n\n#define LIMIT 3\n\nstatic int low(int a)\n{\n\treturn a;\n}\n\nstatic int count;\n\n\
             static int helper(int a)\n{\n\treturn a > LIMIT ? count : a;\n}\n\n/* Says one thing. */\n\
             int high(int a)\n{\n\treturn low(helper(a));\n}\n\nint other(void)\n{\n\treturn 0;\n}\n"
        );
    }

    #[test]
    fn a_function_that_did_not_change_is_refused_with_those_that_did() {
        let same = Versions {
            new: &NEW.replace("low(helper(a))", "low(a)"),
            ..versions()
        };
        assert_eq!(
            same.take(&["high"]).unwrap_err().to_string(),
            "high is the same in both versions of x.c; functions that differ: low, other"
        );
    }

    #[test]
    fn a_function_that_one_version_does_not_have_is_refused() {
        assert_eq!(
            versions().take(&["helper"]).unwrap_err().to_string(),
            "x.c of 1 has 0 definitions of helper, not one"
        );
        assert_eq!(
            versions().take(&["none"]).unwrap_err().to_string(),
            "x.c of 2 has 0 definitions of none, not one"
        );
    }
}
