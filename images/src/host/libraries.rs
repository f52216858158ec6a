//! The libraries that a program of this machine needs.

use std::path::{Path, PathBuf};

use crate::command;

/// The loader and libraries that `program` starts with, as `ldd` finds them; none for a static program.
pub fn libraries(program: &Path) -> Result<Vec<PathBuf>, command::Error> {
    match command::output("ldd", &[&program.to_string_lossy()], Path::new("/")) {
        Ok(listed) => Ok(listed_in(&String::from_utf8_lossy(&listed))),
        // What `ldd` says of a static program is an error to it.
        Err(command::Error::Failed { stderr, .. }) if stderr.contains("not a dynamic executable") => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

/// `NAME => PATH (ADDRESS)` for a library, `PATH (ADDRESS)` for the loader, and what the kernel provides, without a path.
fn listed_in(text: &str) -> Vec<PathBuf> {
    let path = |line: &str| {
        let found = line.split_once("=>").map_or(line, |(_, found)| found);
        let path = found.split_whitespace().next()?;
        path.starts_with('/').then(|| PathBuf::from(path))
    };
    text.lines().filter_map(path).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_and_the_loader_are_found_and_the_vdso_is_left_out() {
        let text = "\tlinux-vdso.so.1 (0x00007ffd)\n\tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x7f)\n\
                    \t/lib64/ld-linux-x86-64.so.2 (0x7f)\n";
        let found = ["/lib/x86_64-linux-gnu/libc.so.6", "/lib64/ld-linux-x86-64.so.2"];
        assert_eq!(listed_in(text), found.map(PathBuf::from));
    }

    #[test]
    fn a_static_program_has_none() {
        assert!(libraries(Path::new("/bin/busybox")).unwrap().is_empty());
    }
}
