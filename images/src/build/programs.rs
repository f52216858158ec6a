//! Small static programs that run in a guest (`images/programs/`). Each prints one line and ends with a status: 0 the kernel
//! behaves as it does with the fix, 1 it shows the flaw, 2 the program could not tell.
//!
//! Ten show a published flaw of 6.1.170, which their first lines name: `siocatmark` and `lsrr` (each a [`Cve`](super::Cve)),
//! `tcpfilter`, `textpoke` and `assoclen` as any user, `msgid`, `timens`, `tmpfile`, `tracefilter` and `txqueue` as root. The others
//! show whether the module of their name in [`hand_written`](super::hand_written) is in force; these do more:
//!
//! - `pair load SECONDS TASKS` keeps that many tasks in the functions of the module, prints `started`, and in the end
//!   `old N new N mixed N lost N`; its status is 0 unless a call found a mix or was lost. With 0 seconds it ends at SIGTERM.
//! - `load` keeps memory, a disk and a TCP port busy, and checks what it does.
//! - `insmods`, `forks`, `oom` and `fexit` are what a guest does in a storm: modules loaded and unloaded, tasks that end, memory that
//!   runs out, BPF programs. Each repeats its round until SIGTERM, then prints `rounds N wrong N`.
//! - `exit_tail` leaves a task behind that sleeps at its end, in the function of the module, and prints `unlisted`.
//! - `nested` runs a guest of its own by `/dev/kvm`, which never leaves its user mode, and prints `running`.
//! - `version load TASKS` keeps that many tasks in the function of the module [`version`](super::hand_written::version), prints `started`,
//!   and at SIGTERM how often each version has answered.
//! - `pause sleep` prints `sleeping`, sleeps in the function of the module until SIGUSR1, then prints its line.

use std::fs;
use std::path::{Path, PathBuf};

use super::{Error, digest};
use crate::cache::{self, Cache};
use crate::command;

/// Names and texts of all programs.
const PROGRAMS: [(&str, &str); 32] = [
    ("assoclen", include_str!("../../programs/assoclen.c")),
    ("exit_tail", include_str!("../../programs/exit_tail.c")),
    ("faults", include_str!("../../programs/faults.c")),
    ("fexit", include_str!("../../programs/fexit.c")),
    ("forks", include_str!("../../programs/forks.c")),
    ("hash", include_str!("../../programs/hash.c")),
    ("insmods", include_str!("../../programs/insmods.c")),
    ("kstrtoint", include_str!("../../programs/kstrtoint.c")),
    ("load", include_str!("../../programs/load.c")),
    ("lsrr", include_str!("../../programs/lsrr.c")),
    ("msgid", include_str!("../../programs/msgid.c")),
    ("oom", include_str!("../../programs/oom.c")),
    ("nested", include_str!("../../programs/nested.c")),
    ("outlives", include_str!("../../programs/outlives.c")),
    ("pair", include_str!("../../programs/pair.c")),
    ("pause", include_str!("../../programs/pause.c")),
    ("printk", include_str!("../../programs/printk.c")),
    ("references", include_str!("../../programs/references.c")),
    ("readlink", include_str!("../../programs/readlink.c")),
    ("sections", include_str!("../../programs/sections.c")),
    ("static_key", include_str!("../../programs/static_key.c")),
    ("siocatmark", include_str!("../../programs/siocatmark.c")),
    ("symbols", include_str!("../../programs/symbols.c")),
    ("tasks", include_str!("../../programs/tasks.c")),
    ("tcpfilter", include_str!("../../programs/tcpfilter.c")),
    ("textpoke", include_str!("../../programs/textpoke.c")),
    ("timens", include_str!("../../programs/timens.c")),
    ("tmpfile", include_str!("../../programs/tmpfile.c")),
    ("tracefilter", include_str!("../../programs/tracefilter.c")),
    ("txqueue", include_str!("../../programs/txqueue.c")),
    ("version", include_str!("../../programs/version.c")),
    ("warns", include_str!("../../programs/warns.c")),
];

/// The headers that they share.
const HEADERS: [(&str, &str); 4] = [
    ("result.h", include_str!("../../programs/result.h")),
    ("rounds.h", include_str!("../../programs/rounds.h")),
    ("sysinfo.h", include_str!("../../programs/sysinfo.h")),
    ("unprivileged.h", include_str!("../../programs/unprivileged.h")),
];

const COMPILER: &str = "gcc-12";
const FLAGS: [&str; 7] = ["-static", "-O1", "-s", "-Wall", "-Wextra", "-Werror", "-I."];

/// Builds all programs, unless that has been done before. Returns the folder in the cache that holds them, each under its
/// own name.
pub fn build(cache: &Cache) -> Result<PathBuf, Error> {
    let mut inputs = FLAGS.to_vec();
    inputs.extend(HEADERS.map(|(_, text)| text));
    inputs.extend(PROGRAMS.iter().flat_map(|(name, text)| [*name, *text]));
    let folder = cache.folder(&format!("programs/{}", digest(&inputs)), |folder| {
        let work = folder.join("build");
        fs::create_dir(&work).map_err(cache::Error::io("make the folder", &work))?;
        HEADERS
            .iter()
            .try_for_each(|(name, text)| write(&work.join(name), text))?;
        PROGRAMS
            .iter()
            .try_for_each(|(name, text)| compile(&work, name, text))?;
        fs::remove_dir_all(&work).map_err(cache::Error::io("remove", &work))?;
        Ok::<(), Error>(())
    })?;
    Ok(folder)
}

/// Compiles a program in `work` and leaves it in the folder above.
fn compile(work: &Path, name: &str, text: &str) -> Result<(), Error> {
    let (source, program) = (format!("{name}.c"), format!("../{name}"));
    write(&work.join(&source), text)?;
    command::output(COMPILER, &[&FLAGS[..], &["-o", &program, &source]].concat(), work)?;
    Ok(())
}

fn write(path: &Path, text: &str) -> Result<(), Error> {
    Ok(fs::write(path, text).map_err(cache::Error::io("write", path))?)
}
