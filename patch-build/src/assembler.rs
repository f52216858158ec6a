//! Has the assembler keep what the compiler said. Of a reference to a static variable or function GNU as keeps only the section and
//! how far into it (gas/write.c of binutils 2.40, `adjust_reloc_syms`), which may be the end of one variable and the start of the
//! next; a call or jump within a section it does itself. For a global symbol it does neither.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use crate::cache;

/// The section in which the names stand of symbols that are local to the file, each with a zero byte behind it.
pub(crate) const LOCALS: &str = ".vmpatch.locals";

/// Takes the place of `as` in the first folder of `PATH`, and runs the next one that is found there. What it adds is read behind the
/// compiler's text: static functions and variables that have names are global. `-mshared` keeps jumps to global functions of the same section.
pub(crate) const SCRIPT: &str = r#"#!/bin/sh
PATH=${PATH#*:}
for text; do :; done
awk '
$1 == ".type" && $3 ~ /^[@%](object|function)$/ && $2 !~ /^\.L/ { sub(",$", "", $2); if (!seen[$2]++) names[++count] = $2 }
$1 ~ /^\.(globl|global|weak|comm|lcomm|local)$/ { sub(",.*", "", $2); skipped[$2] }
END {
	for (i = 1; i <= count; i++) if (!(names[i] in skipped)) print ".globl " names[i]
	print ".section .vmpatch.locals"
	for (i = 1; i <= count; i++) if (!(names[i] in skipped)) print ".asciz \"" names[i] "\""
}' "$text" | as -mshared "$@" -
"#;

/// Makes a folder with that script, for `PATH`.
///
/// Errors: the folder could not be written to.
pub(crate) fn write(folder: &Path) -> Result<(), cache::Error> {
    let program = folder.join("as");
    fs::create_dir_all(folder).map_err(cache::Error::io("make the folder", folder))?;
    fs::write(&program, SCRIPT).map_err(cache::Error::io("write", &program))?;
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).map_err(cache::Error::io("write", &program))
}
