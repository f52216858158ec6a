//! The command that the kernel's build compiled a file with, as it notes it down.

use std::path::Path;

use crate::plan::plain;
use crate::tree::SECTIONS;

/// A command for the shell, run in the tree's folder, that makes one object file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SavedCommand {
    /// The object, relative to the tree: `net/unix/af_unix.o`.
    object: String,
    text: String,
}

impl SavedCommand {
    /// Reads the text of `.NAME.o.cmd` (scripts/Kbuild.include of 6.1, `make-cmd`; scripts/basic/fixdep.c writes it): the
    /// first line is `cmd_OBJECT := COMMAND`, `savedcmd_OBJECT` since 6.3.
    pub(crate) fn parse(object: &str, text: &str) -> Option<Self> {
        let line = text.lines().next()?;
        let line = line.strip_prefix("saved").unwrap_or(line).strip_prefix("cmd_")?;
        // One of another folder is spelled with `..` (arch/x86/kvm/Makefile of 6.1).
        let (spelled, command) = line.split_once(" := ")?;
        if plain(spelled)? != object {
            return None;
        }
        Some(Self {
            object: spelled.to_owned(),
            text: command.replace("$(pound)", "#").replace("$$", "$"),
        })
    }

    /// A command that make would run.
    pub(crate) fn new(object: &str, text: &str) -> Self {
        Self {
            object: object.to_owned(),
            text: text.to_owned(),
        }
    }

    /// Whether both make the same object in the same manner.
    pub(super) fn is_same(&self, other: &Self) -> bool {
        self.object == other.object && self.words().eq(other.words())
    }

    /// As the shell takes it.
    pub(crate) fn text(&self) -> &str {
        &self.text
    }

    /// Its words, as far as spaces part them.
    pub(crate) fn words(&self) -> impl Iterator<Item = &str> {
        self.text.split(' ').filter(|word| !word.is_empty())
    }

    /// The object, as make spells it.
    pub(super) fn object(&self) -> &str {
        &self.object
    }

    /// The module that the file is compiled for, by the name that `/proc/modules` has; `None` for the kernel itself.
    pub(crate) fn module(&self) -> Option<&str> {
        let mut words = self.text.split(' ');
        words.clone().find(|word| *word == "-DMODULE")?;
        let name = words.find_map(|word| word.strip_prefix("-DKBUILD_MODNAME="))?;
        Some(name.trim_matches(['\'', '"']))
    }

    /// Whether it compiles for the place in memory where the kernel is (arch/x86/Makefile of 6.1: `-mcmodel=kernel`); the boot
    /// loader's side, the vDSO and the like are compiled for others.
    pub(crate) fn is_of_running_kernel(&self) -> bool {
        let model = self.words().filter(|word| word.starts_with("-mcmodel=")).last();
        model == Some("-mcmodel=kernel")
    }

    /// Whether the compiler forgets what no code uses (gcc's manual, Optimize Options; crypto/Makefile of 6.1 has a file with `-O0`).
    pub(super) fn forgets_unused(&self) -> bool {
        const KEEPING: [&str; 4] = [
            "-fno-toplevel-reorder",
            "-fno-unit-at-a-time",
            "-fkeep-inline-functions",
            "-fkeep-static-functions",
        ];
        let level = self.words().filter(|word| word.starts_with("-O")).last();
        level.is_some_and(|level| level != "-O0") && !self.words().any(|word| KEEPING.contains(&word))
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

    /// The command with the note that make leaves behind it (scripts/Kbuild.include of 6.1, `cmd_and_fixdep`).
    pub(super) fn noted(&self) -> String {
        let (folder, name) = self.object.rsplit_once('/').unwrap_or(("", &self.object));
        let (list, note) = (format!("{folder}/.{name}.d"), format!("{folder}/.{name}.cmd"));
        let saved = self.text.replace('$', "$$").replace('#', "$(pound)");
        let saved = saved.replace('\'', "'\\''");
        format!(
            "mkdir -p {folder}; {}; scripts/basic/fixdep {list} {object} '{saved}' > {note}; rm -f {list}",
            self.text.trim_end().trim_end_matches(';'),
            object = self.object,
        )
    }

    /// The compiler's part of the command, to preprocess only into the file `output`; from another source folder, if one is given.
    pub(super) fn preprocessing(&self, moved: Option<(&Path, &Path)>, output: &Path) -> String {
        let [from, to] = moved.map_or_else(Default::default, |(from, to)| {
            [from, to].map(|path| format!("{}/", path.display()))
        });
        let list = format!("-Wp,-MMD,{}.d", output.display());
        let mut kept = Vec::new();
        let mut words = self.text.split(' ');
        while let Some(word) = words.next() {
            let bare = word.trim_end_matches(';');
            match bare {
                "-o" => drop(words.next()),
                "-c" => {}
                "&&" => break,
                bare if bare.starts_with("-Wp,-M") => kept.push(list.clone()),
                bare if from.is_empty() => kept.push(bare.to_owned()),
                bare => kept.push(bare.replace(&from, &to)),
            }
            if bare.len() < word.len() {
                break;
            }
        }
        kept.push(format!("-E -o {}", output.display()));
        kept.join(" ")
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
pub(crate) fn dependencies(rule: &str) -> impl Iterator<Item = &str> {
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
    fn the_compiler_alone_is_told_to_preprocess() {
        assert_eq!(
            saved().preprocessing(Some((Path::new("/src"), Path::new("new"))), Path::new("/out/1.i")),
            "gcc-12 -Wp,-MMD,/out/1.i.d -Inew/include -I./include -pg -mfentry -DMODULE -DA='\"#$\"' \
             -DKBUILD_MODNAME='\"af_alg\"' new/crypto/af-alg.c    -E -o /out/1.i"
        );
    }

    #[test]
    fn a_command_leaves_the_note_that_make_would() {
        let noted = saved().noted();
        let start = "scripts/basic/fixdep crypto/.af-alg.o.d crypto/af-alg.o '";
        let (_, rest) = noted.split_once(start).unwrap();
        assert!(rest.contains("-DA='\\''\"$(pound)$$\"'\\''"), "{rest}");
        assert!(
            rest.ends_with("' > crypto/.af-alg.o.cmd; rm -f crypto/.af-alg.o.d"),
            "{rest}"
        );
    }

    #[test]
    fn an_object_may_be_spelled_by_the_folder_that_takes_it() {
        let text = "cmd_arch/x86/kvm/../../../virt/kvm/k.o := gcc-12 -c -o arch/x86/kvm/../../../virt/kvm/k.o\n";
        assert!(SavedCommand::parse("virt/kvm/k.o", text).is_some());
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

    #[test]
    fn what_is_not_optimised_keeps_what_no_code_uses() {
        let forgets = |flags: &str| SavedCommand::new("x.o", &format!("gcc {flags} -c -o x.o x.c")).forgets_unused();
        assert!(forgets("-O2") && forgets("-O0 -Os"));
        assert!(!forgets("-O2 -O0") && !forgets("") && !forgets("-O2 -fno-toplevel-reorder"));
    }
}
