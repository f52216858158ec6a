//! The command that the kernel's build compiled a file with, as it notes it down.

use std::path::Path;

use crate::tree::SECTIONS;

/// A command for the shell, run in the tree's folder, that makes one object file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct SavedCommand {
    /// The object, relative to the tree: `net/unix/af_unix.o`.
    object: String,
    text: String,
}

impl SavedCommand {
    /// Reads the text of `.NAME.o.cmd` (scripts/Kbuild.include of 6.1, `make-cmd`; scripts/basic/fixdep.c writes it): the
    /// first line is `cmd_OBJECT := COMMAND`, `savedcmd_OBJECT` since 6.3.
    pub(super) fn parse(object: &str, text: &str) -> Option<Self> {
        let line = text.lines().next()?;
        let line = line.strip_prefix("saved").unwrap_or(line).strip_prefix("cmd_")?;
        let command = line.strip_prefix(object)?.strip_prefix(" := ")?;
        Some(Self {
            object: object.to_owned(),
            text: command.replace("$(pound)", "#").replace("$$", "$"),
        })
    }

    /// The module that the file is compiled for, by the name that `/proc/modules` has; `None` for the kernel itself.
    pub(super) fn module(&self) -> Option<&str> {
        let mut words = self.text.split(' ');
        words.clone().find(|word| *word == "-DMODULE")?;
        let name = words.find_map(|word| word.strip_prefix("-DKBUILD_MODNAME="))?;
        Some(name.trim_matches(['\'', '"']))
    }

    /// Whether the compiler makes call sites for ftrace.
    pub(super) fn has_ftrace(&self) -> bool {
        let mut on = false;
        for word in self.text.split(' ') {
            match word {
                "-pg" | "-mfentry" => on = true,
                word if word.starts_with("-fpatchable-function-entry=") => on = true,
                "-mno-fentry" => on = false,
                _ => {}
            }
        }
        on
    }

    /// The same command with another source folder and another object; the list of headers goes to `OBJECT.d`.
    pub(super) fn redirected(&self, from: &Path, to: &Path, object: &Path) -> String {
        let [from, to] = [from, to].map(|path| format!("{}/", path.display()));
        self.for_object(object, |word| Some(word.replace(&from, &to)))
    }

    /// The same command for another object, without the flags that only comparing takes; the list of headers goes to `OBJECT.d`.
    pub(super) fn as_shipped(&self, object: &Path) -> String {
        self.for_object(object, |word| (!SECTIONS.contains(&word)).then(|| word.to_owned()))
    }

    /// The same command for another object; what becomes of all other words, `other` says.
    fn for_object(&self, object: &Path, other: impl Fn(&str) -> Option<String>) -> String {
        let object = object.display().to_string();
        let (folder, name) = self.object.rsplit_once('/').unwrap_or(("", &self.object));
        let depends = format!("-Wp,-MMD,{folder}/.{name}.d");
        let word = |word: &str| {
            if word == self.object {
                Some(object.clone())
            } else if word == depends {
                Some(format!("-Wp,-MMD,{object}.d"))
            } else {
                other(word)
            }
        };
        self.text.split(' ').filter_map(word).collect::<Vec<_>>().join(" ")
    }
}

/// The files that an object was made of, out of the list that `-MMD` leaves: a rule for make with continued lines.
pub(super) fn dependencies(rule: &str) -> impl Iterator<Item = &str> {
    let files = rule.split_once(':').map_or("", |(_, files)| files);
    files.split_whitespace().filter(|word| *word != "\\")
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAVED: &str = "savedcmd_crypto/af-alg.o := gcc-12 -Wp,-MMD,crypto/.af-alg.o.d -I/src/include -I./include -pg -mfentry \
                         -DMODULE -DA='\"$(pound)$$\"' -DKBUILD_MODNAME='\"af_alg\"' -c -o crypto/af-alg.o /src/crypto/af-alg.c   ; \
                         ./tools/objtool/objtool --orc crypto/af-alg.o\n\nsource_crypto/af-alg.o := x\n";

    fn saved() -> SavedCommand {
        SavedCommand::parse("crypto/af-alg.o", SAVED).unwrap()
    }

    #[test]
    fn a_command_is_redirected_to_another_source_and_another_object() {
        let command = saved().redirected(Path::new("/src"), Path::new("/new"), Path::new("/out/1.o"));
        assert_eq!(
            command,
            "gcc-12 -Wp,-MMD,/out/1.o.d -I/new/include -I./include -pg -mfentry -DMODULE -DA='\"#$\"' \
             -DKBUILD_MODNAME='\"af_alg\"' -c -o /out/1.o /new/crypto/af-alg.c   ; ./tools/objtool/objtool --orc /out/1.o"
        );
    }

    #[test]
    fn the_command_says_which_module_the_file_belongs_to() {
        assert_eq!(saved().module(), Some("af_alg"));
        let builtin = SAVED.replace("-DMODULE ", "");
        assert_eq!(SavedCommand::parse("crypto/af-alg.o", &builtin).unwrap().module(), None);
    }

    #[test]
    fn as_shipped_it_is_compiled_without_sections_for_all_that_is_in_it() {
        let with = SAVED.replace("-pg", "-pg -ffunction-sections -fdata-sections");
        let command = SavedCommand::parse("crypto/af-alg.o", &with).unwrap();
        let text = command.as_shipped(Path::new("/tmp/x.o"));
        assert!(
            text.contains(" -pg -mfentry ") && text.contains("-o /tmp/x.o /src/crypto/af-alg.c"),
            "{text}"
        );
        assert!(!text.contains("sections"), "{text}");
    }

    #[test]
    fn the_command_says_whether_the_file_has_ftrace_sites() {
        assert!(saved().has_ftrace());
        let without = SAVED.replace("-pg -mfentry ", "");
        assert!(!SavedCommand::parse("crypto/af-alg.o", &without).unwrap().has_ftrace());
    }

    #[test]
    fn a_note_of_another_object_is_none() {
        assert_eq!(SavedCommand::parse("crypto/x.o", SAVED), None);
    }

    #[test]
    fn dependencies_are_what_stands_behind_the_colon() {
        let all: Vec<&str> = dependencies("a.o: /src/a.c \\\n /src/include/b.h include/c.h\n").collect();
        assert_eq!(all, ["/src/a.c", "/src/include/b.h", "include/c.h"]);
    }
}
