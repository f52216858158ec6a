//! What `vmpatch build` compiles: of the same fix again nothing.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use e2e::fixes::FIXES;
use e2e::vmpatch;
use patch_build::cache::Cache;

/// A folder with a compiler that notes what it is asked to compile and to preprocess.
struct Noted(PathBuf);

impl Noted {
    fn new(name: &str) -> Self {
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("again-{}-{name}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let script = format!(
            "#!/bin/sh\ncase \"$*\" in */dev/null*) ;; *' -c '*|*' -E '*) echo \"$*\" >>{}/log ;; esac\nexec /usr/bin/gcc-12 \"$@\"\n",
            folder.display()
        );
        let program = folder.join("gcc-12");
        fs::write(&program, script).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        Self(folder)
    }

    /// Builds, and returns the module with the commands that were run for it.
    fn build(&self, arguments: &[&str]) -> (Vec<u8>, Vec<String>) {
        let (module, commands, _) = self.build_in(None, arguments);
        (module, commands)
    }

    /// Builds in that cache; returns what vmpatch said, too.
    fn build_in(&self, cache: Option<&Path>, arguments: &[&str]) -> (Vec<u8>, Vec<String>, String) {
        let log = self.0.join("log");
        drop(fs::remove_file(&log));
        let path = format!("{}:{}", self.0.display(), std::env::var("PATH").unwrap());
        let output = self.output();
        drop(fs::remove_file(&output));
        let mut command = Command::new(vmpatch::program().unwrap());
        command.args(arguments).env("PATH", path);
        command.envs(cache.map(|cache| ("VMPATCH_CACHE", cache)));
        let ended = command.output().unwrap();
        let said = String::from_utf8_lossy(&ended.stderr).into_owned();
        assert!(ended.status.success(), "{said}");
        let commands = fs::read_to_string(log).unwrap_or_default();
        let commands = commands.lines().map(str::to_owned).collect();
        (fs::read(output).unwrap(), commands, said)
    }

    fn output(&self) -> PathBuf {
        self.0.join("livepatch-again.ko")
    }
}

impl Drop for Noted {
    fn drop(&mut self) {
        drop(fs::remove_dir_all(&self.0));
    }
}

#[test]
fn the_same_fix_again_compiles_nothing_and_gives_the_same_module() {
    let noted = Noted::new("same");
    let output = noted.output().display().to_string();
    let arguments = FIXES[0].arguments(&output);
    let (first, commands) = noted.build(&arguments);
    assert!(
        commands.iter().any(|command| command.contains("af_unix.c")),
        "{commands:?}"
    );
    let (second, commands) = noted.build(&arguments);
    assert_eq!(commands, Vec::<String>::new());
    assert!(first == second, "another module");
}

#[test]
fn what_was_changed_in_the_prepared_source_is_not_compiled_with() {
    let noted = Noted::new("changed");
    let output = noted.output().display().to_string();
    let arguments = [&["-vv"], FIXES[0].arguments(&output).as_slice()].concat();
    let cache = noted.0.join("cache");
    fs::create_dir(&cache).unwrap();
    for shared in ["packages", "sources"] {
        let of_all = Cache::from_env().unwrap().root().join(shared);
        fs::create_dir_all(&of_all).unwrap();
        symlink(of_all, cache.join(shared)).unwrap();
    }
    let (first, ..) = noted.build_in(Some(&cache), &arguments);
    let trees = fs::read_dir(cache.join("builds")).unwrap();
    let tree = trees
        .map(|entry| entry.unwrap().path())
        .find(|path| path.is_dir())
        .unwrap();
    // Without it, members of `struct sock` that the fix reads are elsewhere.
    for (file, from, to) in [
        (".config", "CONFIG_SECURITY=y", "# CONFIG_SECURITY is not set"),
        ("include/generated/autoconf.h", "#define CONFIG_SECURITY 1", ""),
    ] {
        let path = tree.join(file);
        let text = fs::read_to_string(&path).unwrap();
        let line = format!("\n{from}\n");
        assert!(text.contains(&line), "{file}");
        fs::write(path, text.replace(&line, &format!("\n{to}\n"))).unwrap();
    }
    let (second, _, said) = noted.build_in(Some(&cache), &arguments);
    assert!(
        said.contains(".config (SECURITY from y to none) of the prepared source is not what it was"),
        "{said}"
    );
    assert!(first == second, "another module");
    let (_, commands, _) = noted.build_in(Some(&cache), &arguments);
    assert_eq!(commands, Vec::<String>::new());
}
