//! Compiles a C text as the one file of an external module: by make once for each tree, later with the command that make used.

use std::fs;
use std::path::{Path, PathBuf};

use crate::compile::command::{SavedCommand, dependencies};
use crate::plan::plain;
use crate::tree::{Error, Tree};
use crate::{cache, seal};

/// Where it is compiled.
const FOLDER: &str = "vmpatch-extra";
/// Where a tree notes how make compiles the file of such a module.
const COMMAND: &str = "vmpatch-extra-command";
/// Stands for the module's name in that note. No path and no flag has it.
const NAME: &str = "vmpatch_name_of_module";

/// How make compiles the file.
struct Command {
    /// The folder that it runs in, relative to the tree.
    folder: &'static str,
    text: String,
}

impl Tree {
    /// Compiles a C text as the one file of an external module of that name, without linking it. The object has no debug
    /// information.
    ///
    /// Errors: the text does not compile, or the cache could not be used.
    pub fn compile_extra(&self, module: &str, text: &str) -> Result<Vec<u8>, Error> {
        let work = self.folder().join(FOLDER);
        let Some(command) = self
            .extra_command(&work)?
            .and_then(|note| Command::parse(&note, module))
        else {
            return self.make_extra(&work, module, text).map(|(object, _)| object);
        };
        let key: [&[u8]; 4] = [b"extra", module.as_bytes(), command.text.as_bytes(), text.as_bytes()];
        if let Some([object]) = self.kept(&key).as_deref() {
            return Ok(object.clone());
        }
        start(&work)?;
        let file = work.join("glue.c");
        fs::write(&file, text).map_err(cache::Error::io("write", &file))?;
        self.shell(&format!("cd ./{}; {}", command.folder, command.text))?;
        let list = work.join(".glue.o.d");
        let rule = fs::read_to_string(&list).map_err(cache::Error::io("read", &list))?;
        let from = self.folder().join(command.folder);
        // The text itself is part of the key.
        let inputs = dependencies(&rule).map(|path| from.join(path));
        let inputs: Vec<PathBuf> = inputs.filter(|path| path.file_name() != file.file_name()).collect();
        let object = work.join("glue.o");
        let object = fs::read(&object).map_err(cache::Error::io("read", &object))?;
        self.keep(&key, &inputs, &[&object])?;
        finish(&work)?;
        Ok(object)
    }

    /// The note of how make compiles the file of a module, made unless it is there; `None` where the source can change.
    fn extra_command(&self, work: &Path) -> Result<Option<String>, Error> {
        if !self.is_fixed() {
            return Ok(None);
        }
        if let Some(note) = seal::note(self.folder(), COMMAND) {
            return Ok(Some(note));
        }
        let (_, made) = self.make_extra(work, NAME, "")?;
        let note = Command::of_make(&made, work).map(|command| command.noted());
        // An empty note has no command in it, and is not asked for again.
        let note = note.unwrap_or_default();
        seal::write_note(self.folder(), COMMAND, &note)?;
        Ok(Some(note))
    }

    /// The object, and make's note of it. Make takes a second for its own questions.
    fn make_extra(&self, work: &Path, module: &str, text: &str) -> Result<(Vec<u8>, String), Error> {
        let io = |action| cache::Error::io(action, work);
        start(work)?;
        let kbuild = format!("obj-m := {module}.o\n{module}-y := glue.o\nccflags-y := -g0\n");
        fs::write(work.join("Kbuild"), kbuild).map_err(io("write to"))?;
        fs::write(work.join("glue.c"), text).map_err(io("write to"))?;
        let goals = [format!("M={}", work.display()), "glue.o".to_owned()];
        self.make(self.search_path(), &goals.each_ref().map(String::as_str))?;
        let object = fs::read(work.join("glue.o")).map_err(io("read from"))?;
        let note = fs::read_to_string(work.join(".glue.o.cmd")).map_err(io("read from"))?;
        finish(work)?;
        Ok((object, note))
    }
}

impl Command {
    /// The command in make's own note; `None` where another one runs objtool on the object (scripts/Makefile.build of 5.10).
    fn of_make(note: &str, work: &Path) -> Option<Self> {
        let whole = work.join("glue.o");
        // make changes into the module's folder since 6.13 (Makefile, `KBUILD_EXTMOD_OUTPUT`).
        let (folder, command) = [("", whole.to_str()?), (FOLDER, "glue.o")]
            .into_iter()
            .find_map(|(folder, object)| Some((folder, SavedCommand::parse(&plain(object)?, note)?)))?;
        let text = command.text().to_owned();
        let is_whole = command.words().any(|word| word.ends_with("tools/objtool/objtool"));
        (is_whole && text.contains(NAME)).then_some(Self { folder, text })
    }

    /// As a tree notes it: the folder in the first line.
    fn noted(&self) -> String {
        format!("{}\n{}\n", self.folder, self.text)
    }

    /// Reads what [`Command::noted`] wrote, for a module of that name.
    fn parse(note: &str, module: &str) -> Option<Self> {
        let (folder, rest) = note.split_once('\n')?;
        let folder = ["", FOLDER].into_iter().find(|known| *known == folder)?;
        // Whole up to its end, or the note is cut off.
        let text = rest.strip_suffix('\n')?.replace(NAME, module);
        Some(Self { folder, text })
    }
}

fn start(work: &Path) -> Result<(), cache::Error> {
    if work.exists() {
        fs::remove_dir_all(work).map_err(cache::Error::io("remove what an interrupted run left in", work))?;
    }
    fs::create_dir(work).map_err(cache::Error::io("make the folder", work))
}

fn finish(work: &Path) -> Result<(), cache::Error> {
    fs::remove_dir_all(work).map_err(cache::Error::io("remove", work))
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOTE: &str = "savedcmd_/t/vmpatch-extra/glue.o := gcc-12 -Wp,-MMD,/t/vmpatch-extra/.glue.o.d -DMODULE \
        -DKBUILD_MODNAME='\"fix_a\"' -D__KBUILD_MODNAME=kmod_fix_a -c -o /t/vmpatch-extra/glue.o /t/vmpatch-extra/glue.c ; \
        ./tools/objtool/objtool --orc /t/vmpatch-extra/glue.o\n";

    fn of_make(note: &str) -> Option<Command> {
        Command::of_make(&note.replace("fix_a", NAME), Path::new("/t/vmpatch-extra"))
    }

    #[test]
    fn a_command_of_make_is_that_of_any_module() {
        let noted = of_make(NOTE).unwrap().noted();
        let other = Command::parse(&noted, "fix_b").unwrap();
        let (_, text) = NOTE.trim_end().split_once(" := ").unwrap();
        assert_eq!((other.folder, other.text), ("", text.replace("fix_a", "fix_b")));
        assert!(Command::parse(noted.trim_end(), "fix_b").is_none());
    }

    #[test]
    fn a_command_runs_where_make_ran_it() {
        let since = NOTE.replace("/t/vmpatch-extra/", "").replace("./tools", "/t/tools");
        assert_eq!(of_make(&since).unwrap().folder, FOLDER);
    }

    #[test]
    fn a_command_that_does_not_run_objtool_makes_half_of_the_object() {
        let (half, _) = NOTE.split_once(" ; ").unwrap();
        assert!(of_make(half).is_none());
        assert!(Command::parse("", "fix_b").is_none());
    }
}
