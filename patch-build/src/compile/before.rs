//! Compiles files of the kernel as they are. Of a source that can't change each is compiled once.

use std::fs;
use std::path::PathBuf;

use super::command::{SavedCommand, dependencies};
use super::pace::Pace;
use super::{Error, Unit};
use crate::cache;
use crate::parallel::in_parallel;
use crate::plan::Planned;
use crate::tree::Tree;

/// Compiles C files (relative to the source) as they are. Those of a source that can't change are compiled once.
///
/// `progress` is told what takes time.
pub fn before(tree: &Tree, files: &[&str], progress: &dyn Fn(&str)) -> Result<Vec<Unit>, Error> {
    let kept = files.iter().map(|file| kept(tree, file, BY_MAKE));
    let kept = kept.collect::<Result<Vec<Option<Unit>>, Error>>()?;
    let missing = files.iter().zip(&kept).filter(|(_, kept)| kept.is_none());
    let missing = missing.map(|(file, _)| object_name(file));
    let missing = missing.collect::<Result<Vec<String>, Error>>()?;
    if !missing.is_empty() {
        progress(&format!("compiling {}", named(&missing)));
        for object in missing.iter().map(|name| tree.folder().join(name)) {
            // It may be half of one. Make leaves alone what is there.
            if tree.is_fixed() && object.exists() {
                fs::remove_file(&object).map_err(cache::Error::io("remove", &object))?;
            }
        }
        let goals: Vec<&str> = missing.iter().map(String::as_str).collect();
        tree.compile(&goals).map_err(|source| Error::Before {
            files: files.iter().map(|file| (*file).to_owned()).collect(),
            source,
        })?;
    }
    let units = files.iter().zip(kept).map(|(file, kept)| match kept {
        Some(unit) => Ok(unit),
        None => made(tree, file, BY_MAKE),
    });
    units.collect()
}

/// Makes objects of the plan, with the plan's own commands; where one fails, by make, which makes first what the file includes.
/// Those that can't be made are left out.
///
/// `progress` is told what takes time.
pub fn planned(tree: &Tree, planned: &[&Planned], progress: &dyn Fn(&str)) -> Result<Vec<Unit>, Error> {
    let kept = planned
        .iter()
        .map(|planned| kept(tree, &planned.source, planned.command.text()));
    let kept = kept.collect::<Result<Vec<Option<Unit>>, Error>>()?;
    let wanted = planned.iter().zip(&kept).filter(|(_, kept)| kept.is_none());
    let wanted: Vec<&Planned> = wanted.map(|(planned, _)| *planned).collect();
    for planned in &wanted {
        // One of an earlier run would be taken for the one that could not be made.
        let object = tree.folder().join(&planned.object);
        if object.exists() {
            fs::remove_file(&object).map_err(cache::Error::io("remove", &object))?;
        }
    }
    let pace = Pace::of(wanted.len());
    let done = in_parallel(
        &wanted,
        |_, planned| tree.compile_by(&planned.command.noted()).is_ok(),
        &|number, planned: &&Planned| progress(&format!("compiling {} ({})", planned.source, pace.at(number))),
    );
    let failed = wanted.iter().zip(done).filter(|(_, done)| !done);
    let failed: Vec<&str> = failed.map(|(planned, _)| planned.object.as_str()).collect();
    if !failed.is_empty() {
        make(tree, &failed, progress);
    }
    // One that was made by another command is none of the kernel's.
    let is_there = |planned: &Planned| {
        let Ok(name) = object_name(&planned.source) else {
            return false;
        };
        let text = fs::read_to_string(note(tree, &name)).unwrap_or_default();
        let is_its = SavedCommand::parse(&name, &text).is_some_and(|command| command.is_same(&planned.command));
        is_its && tree.folder().join(&name).exists()
    };
    let mut units = Vec::new();
    for (planned, kept) in planned.iter().zip(kept) {
        match kept {
            Some(unit) => units.push(unit),
            None if is_there(planned) => units.push(made(tree, &planned.source, planned.command.text())?),
            None => {}
        }
    }
    Ok(units)
}

/// Makes what objects (by the names that make knows) are made of, as far as that can be made without compiling objects.
///
/// A rule of the build compares an object's command with the one before, and then does what `rule_cc_o_c` says, for assembly `rule_as_o_S`
/// (scripts/Makefile.build of 6.1, scripts/Makefile.lib of 7.2): here nothing, once all is there that the object is made of. The build's
/// own programs are compiled by other rules.
pub fn make_inputs(tree: &Tree, objects: &[&str]) {
    let mut goals = vec!["-k", "rule_cc_o_c=@:", "rule_as_o_S=@:"];
    goals.extend(objects.iter().filter(|object| !object.contains("..")));
    drop(tree.make(tree.search_path(), &goals));
}

/// Makes objects (by the names that make knows) as far as they can be made; what can't has no object.
pub fn make(tree: &Tree, objects: &[&str], progress: &dyn Fn(&str)) {
    let names: Vec<String> = objects.iter().map(|name| (*name).to_owned()).collect();
    progress(&format!("compiling {}", named(&names)));
    let mut goals = vec!["-k"];
    goals.extend(objects.iter().filter(|object| !object.contains("..")));
    drop(tree.compile(&goals));
}

/// Compiles a file that [`before`] compiled once more, as the kernel's own build does: without a section for each function. In the
/// sections of a whole file jumps are shorter here and there, and loops are aligned otherwise. Of a source that can't change it is
/// compiled once.
pub fn as_shipped(tree: &Tree, file: &str) -> Result<Vec<u8>, Error> {
    let name = object_name(file)?;
    let (_, command) = saved(tree, &name)?;
    let key: [&[u8]; 3] = [b"as shipped", file.as_bytes(), command.text().as_bytes()];
    if let Some([object]) = tree.kept(&key).as_deref() {
        return Ok(object.clone());
    }
    let path = tree.folder().join(name).with_extension("vmpatch-as-shipped.o");
    tree.shell(&command.as_shipped(&path)).map_err(|source| Error::Before {
        files: vec![file.to_owned()],
        source,
    })?;
    let object = fs::read(&path).map_err(cache::Error::io("read", &path))?;
    let list = path.with_extension("o.d");
    let rule = fs::read_to_string(&list).map_err(cache::Error::io("read", &list))?;
    let inputs: Vec<PathBuf> = dependencies(&rule).map(|input| tree.folder().join(input)).collect();
    tree.keep(&key, &inputs, &[&object])?;
    for made in [&path, &list] {
        fs::remove_file(made).map_err(cache::Error::io("remove", made))?;
    }
    Ok(object)
}

/// The C files of some objects, for people.
fn named(objects: &[String]) -> String {
    const SHOWN_MAX: usize = 3;
    let mut names: Vec<String> = objects.iter().map(|object| object.replace(".o", ".c")).collect();
    if names.len() > SHOWN_MAX {
        let more = names.len() - SHOWN_MAX;
        names.truncate(SHOWN_MAX);
        return format!("{} and {more} more", names.join(", "));
    }
    names.join(", ")
}

/// In the place of a command that make knows and we do not.
const BY_MAKE: &str = "";

/// A file that was compiled before by that command.
fn kept(tree: &Tree, file: &str, command: &str) -> Result<Option<Unit>, Error> {
    match tree.kept(&key(file, command)).as_deref() {
        Some([note, object]) => unit(tree, file, &String::from_utf8_lossy(note), object.clone()).map(Some),
        _ => Ok(None),
    }
}

/// A file that was just compiled by that command; keeps its object.
fn made(tree: &Tree, file: &str, command: &str) -> Result<Unit, Error> {
    let name = object_name(file)?;
    let (text, _) = saved(tree, &name)?;
    let path = tree.folder().join(&name);
    let object = fs::read(&path).map_err(cache::Error::io("read", &path))?;
    let inputs: Vec<PathBuf> = inputs(&text).map(|input| tree.folder().join(input)).collect();
    tree.keep(&key(file, command), &inputs, &[text.as_bytes(), &object])?;
    if tree.is_fixed() {
        fs::remove_file(&path).map_err(cache::Error::io("remove", &path))?;
    }
    unit(tree, file, &text, object)
}

fn key<'k>(file: &'k str, command: &'k str) -> [&'k [u8]; 3] {
    [b"before", file.as_bytes(), command.as_bytes()]
}

/// Make's note of how it made an object, and the command in it.
fn saved(tree: &Tree, object: &str) -> Result<(String, SavedCommand), Error> {
    let note = note(tree, object);
    let text = fs::read_to_string(&note).map_err(cache::Error::io("read", &note))?;
    let command = SavedCommand::parse(object, &text).ok_or_else(|| Error::NoCommand {
        note,
        object: object.to_owned(),
    })?;
    Ok((text, command))
}

/// The files that an object was made of, out of make's note (scripts/basic/fixdep.c).
fn inputs(note: &str) -> impl Iterator<Item = &str> {
    let rules = note.lines().skip_while(|line| !line.starts_with("source_"));
    let words = rules
        .take_while(|line| !line.contains(": $(deps_"))
        .flat_map(str::split_whitespace);
    words
        .filter(|word| {
            !word.starts_with("source_") && !word.starts_with("deps_") && ![":=", "\\", "$(wildcard"].contains(word)
        })
        .filter(|word| !word.ends_with(')'))
}

/// A unit out of make's note and the object.
fn unit(tree: &Tree, file: &str, note: &str, object: Vec<u8>) -> Result<Unit, Error> {
    let name = object_name(file)?;
    let command = SavedCommand::parse(&name, note).ok_or_else(|| Error::NoCommand {
        note: self::note(tree, &name),
        object: name.clone(),
    })?;
    // fixdep notes every setting that the file or a header of it mentions (scripts/basic/fixdep.c).
    let asks = |setting: &&String| note.contains(&format!("$(wildcard include/config/{setting})"));
    if let Some(setting) = tree.other_settings().iter().find(asks) {
        return Err(Error::OtherSetting {
            file: file.to_owned(),
            setting: setting.clone(),
        });
    }
    Ok(Unit {
        source: file.to_owned(),
        module: command.module().map(str::to_owned),
        object,
        command,
    })
}

/// Where the build notes how it made an object.
fn note(tree: &Tree, object: &str) -> PathBuf {
    let (folder, name) = object.rsplit_once('/').unwrap_or(("", object));
    tree.folder().join(folder).join(format!(".{name}.cmd"))
}

fn object_name(file: &str) -> Result<String, Error> {
    let stem = file
        .strip_suffix(".c")
        .ok_or_else(|| Error::NotC { file: file.to_owned() })?;
    Ok(format!("{stem}.o"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_object_that_an_earlier_run_left_is_not_that_of_a_file_that_can_not_be_compiled() {
        let root = std::env::temp_dir().join(format!("vmpatch-before-{}", std::process::id()));
        drop(fs::remove_dir_all(&root));
        let tree = Tree::bare(&root);
        let command = "false -mcmodel=kernel -c -o a/x.o /src/a/x.c";
        fs::create_dir_all(tree.folder().join("a")).unwrap();
        fs::write(tree.folder().join("a/x.o"), "old").unwrap();
        let note = format!("cmd_a/x.o := {command}\n\nsource_a/x.o := /src/a/x.c\n");
        fs::write(tree.folder().join("a/.x.o.cmd"), note).unwrap();
        let planned = Planned {
            object: "a/x.o".to_owned(),
            source: "a/x.c".to_owned(),
            made: false,
            command: SavedCommand::new("a/x.o", command),
        };
        let units = super::planned(&tree, &[&planned], &|_| {}).unwrap();
        assert_eq!(units.len(), 0);
        fs::remove_dir_all(&root).unwrap();
    }

    #[test]
    fn the_files_that_an_object_was_made_of_are_in_its_note() {
        let note = "cmd_a/x.o := gcc-12 -c a.h\n\nsource_a/x.o := /src/a/x.c\n\ndeps_a/x.o := \\\n    $(wildcard include/config/A) \\\n  \
                    /src/include/b.h \\\n  include/c.h \\\n\na/x.o: $(deps_a/x.o)\n\n$(deps_a/x.o):\n";
        assert_eq!(
            inputs(note).collect::<Vec<_>>(),
            ["/src/a/x.c", "/src/include/b.h", "include/c.h"]
        );
    }
}
