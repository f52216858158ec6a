//! Small static programs that run in a guest. Each prints one line and ends with a status: 0 the kernel behaves as it does
//! with the fix, 1 it shows the flaw, 2 the program could not tell.

use std::fs;
use std::path::{Path, PathBuf};

use super::{Error, digest};
use crate::cache::{self, Cache};
use crate::command;

/// Names and texts of all programs.
const PROGRAMS: [(&str, &str); 2] = [
    ("lsrr", include_str!("../../programs/lsrr.c")),
    ("siocatmark", include_str!("../../programs/siocatmark.c")),
];

const RESULT_H: &str = include_str!("../../programs/result.h");

const COMPILER: &str = "gcc-12";
const FLAGS: [&str; 7] = ["-static", "-O1", "-s", "-Wall", "-Wextra", "-Werror", "-I."];

/// Builds all programs, unless that has been done before. Returns the folder in the cache that holds them, each under its
/// own name.
pub fn build(cache: &Cache) -> Result<PathBuf, Error> {
    let mut inputs = vec![RESULT_H];
    inputs.extend(FLAGS);
    inputs.extend(PROGRAMS.iter().flat_map(|(name, text)| [*name, *text]));
    let folder = cache.folder(&format!("programs/{}", digest(&inputs)), |folder| {
        let header = folder.join("result.h");
        write(&header, RESULT_H)?;
        PROGRAMS
            .iter()
            .try_for_each(|(name, text)| compile(folder, name, text))?;
        fs::remove_file(&header).map_err(cache::Error::io("remove", &header))?;
        Ok::<(), Error>(())
    })?;
    Ok(folder)
}

fn compile(folder: &Path, name: &str, text: &str) -> Result<(), Error> {
    let source = folder.join(format!("{name}.c"));
    write(&source, text)?;
    let source_name = format!("{name}.c");
    let args = [&FLAGS[..], &["-o", name, &source_name]].concat();
    command::output(COMPILER, &args, folder)?;
    fs::remove_file(&source).map_err(cache::Error::io("remove", &source))?;
    Ok(())
}

fn write(path: &Path, text: &str) -> Result<(), Error> {
    Ok(fs::write(path, text).map_err(cache::Error::io("write", path))?)
}
