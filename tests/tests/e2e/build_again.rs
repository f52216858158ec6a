//! What `vmpatch build` compiles: of the same fix again nothing.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use e2e::fixes::FIXES;
use e2e::vmpatch;

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
        let log = self.0.join("log");
        drop(fs::remove_file(&log));
        let path = format!("{}:{}", self.0.display(), std::env::var("PATH").unwrap());
        let output = self.output();
        drop(fs::remove_file(&output));
        let ended = Command::new(vmpatch::program().unwrap())
            .args(arguments)
            .env("PATH", path)
            .output()
            .unwrap();
        assert!(ended.status.success(), "{}", String::from_utf8_lossy(&ended.stderr));
        let commands = fs::read_to_string(log).unwrap_or_default();
        (fs::read(output).unwrap(), commands.lines().map(str::to_owned).collect())
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
