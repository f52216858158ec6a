//! A move into another QEMU that goes wrong: the guest runs on in exactly one process, patched as before, nothing of the attempt is
//! left, and the message says what was wrong.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::Child;
use std::sync::LazyLock;
use std::thread::sleep;
use std::time::Duration;

use e2e::bed::{self, Lent};
use e2e::kit::{self, Modules};
use e2e::monitor::Monitor;
use e2e::moving::{INSTALLED, Keeper, successors, temporary_names, wait_for, wait_for_way};
use e2e::probe::{Seen, see};
use e2e::processes;
use e2e::report::states;
use e2e::sleeper::Sleeper;
use e2e::vmpatch::{Answer, Vmpatch};
use host_agent::lock::DomainLock;
use images::build::hand_written::Applied;
use images::guest::{Guest, Ram};
use images::kernel::Kernel;
use images::qemu;
use nix::sys::signal::Signal;

static MODULE: LazyLock<String> = LazyLock::new(|| Modules::of(&Kernel::CLOUD_6_1).applied(Applied::Pair));

/// The program in the guest that tells old, new, and mixed.
const PROGRAM: &str = "pair";
/// Slow enough that a move is still under way when it is disturbed: 256 MiB of RAM take seconds.
const SLOWLY: &str = "--bandwidth=16";

/// A guest that must not be harmed, patched, with what disturbs its moves.
struct Stage {
    // Its end is before that of the guest, which others use afterwards.
    #[expect(dead_code, reason = "it works by being dropped")]
    keeper: Keeper,
    guest: Lent,
    vmpatch: Vmpatch,
    folder: PathBuf,
}

impl Stage {
    fn new() -> Self {
        let mut config = kit::guest(Kernel::CLOUD_6_1).ram(Ram::Private);
        // A machine that QEMU 7.2 knows, with a device that it does not.
        config.machine = "pc-q35-7.2".to_owned();
        let guest = bed::lend(config.qemu_arg("-device").qemu_arg("igb"));
        let vmpatch = Vmpatch::on(&guest);
        vmpatch.apply(&MODULE);
        let folder = std::env::temp_dir().join(format!("vmpatch-upgrade-{}-{}", std::process::id(), guest.name()));
        fs::create_dir_all(&folder).unwrap();
        let keeper = Keeper::of(&guest);
        Self {
            keeper,
            guest,
            vmpatch,
            folder,
        }
    }

    fn script(&self, text: &str) -> String {
        let number = fs::read_dir(&self.folder).unwrap().count();
        let path = self.folder.join(format!("qemu-system-{number}"));
        fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        path.display().to_string()
    }

    /// A program that says to be QEMU, and does `script` when it is to be one.
    fn program(&self, script: &str) -> String {
        self.script(&format!(
            "if [ \"$1\" = --version ]; then exec {INSTALLED} --version; fi\n{script}"
        ))
    }

    fn upgrade(&self, qemu: &str, options: &[&str]) -> Answer {
        self.vmpatch.run(&[&["upgrade", "--qemu", qemu], options].concat())
    }

    /// Starts a slow move, and returns with the new process when the guest is on its way.
    fn start(&self, options: &[&str]) -> (Child, u32) {
        let line = ["upgrade", "--qemu", INSTALLED, SLOWLY];
        let child = self.vmpatch.start(&[&line, options].concat());
        let new = wait_for(|| self.successors().first().copied());
        wait_for_way(&self.guest);
        (child, new)
    }

    fn finish(&self, child: Child) -> Answer {
        self.vmpatch.finish(&["upgrade"], child)
    }

    fn successors(&self) -> Vec<u32> {
        successors(self.guest.name())
    }

    /// The guest runs in the one process where it was, patched, and nothing is left of the move.
    fn is_as_before(&self, context: &Answer) {
        wait_for(|| self.successors().is_empty().then_some(()));
        assert_eq!(Monitor::second(&self.guest).run_state(), "running", "{context}");
        let status = self.vmpatch.status();
        assert_eq!(status["guest"]["pid"], self.guest.pid(), "{context}");
        assert_eq!(
            states(&status),
            [("test_pair", "applied", vec!["patched"; 2])],
            "{context}"
        );
        assert_eq!(see(&self.guest, PROGRAM), Seen::Fixed, "{context}");
        assert_eq!(temporary_names(&self.guest), [""; 0], "{context}");
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.folder);
    }
}

#[test]
fn a_program_that_is_no_good_is_named_and_the_guest_stays() {
    let stage = Stage::new();
    let mute = stage.script("exec sleep 1000");
    let mute_line = ["upgrade", "--qemu", &mute];
    let waiting = stage.vmpatch.start(&mute_line);
    let bookworm = qemu::bookworm().unwrap_or_else(|error| panic!("{error}"));
    let cases = [
        ("/no/such/program".to_owned(), 3, "/no/such/program can't be started"),
        ("/bin/true".to_owned(), 3, "/bin/true is not a QEMU system emulator"),
        (
            stage.program("echo out of order >&2; exit 1"),
            1,
            "the new process ended (exit status: 1): out of order",
        ),
        (
            bookworm.display().to_string(),
            1,
            "'igb' is not a valid device model name",
        ),
        (
            stage.program(&format!("exec {INSTALLED} \"$@\" -device virtio-rng-pci,id=more")),
            3,
            "another device than the old one (more, not no other)",
        ),
        (
            stage.program(&format!("{INSTALLED} \"$@\"")),
            3,
            "started another process: it must become QEMU itself",
        ),
    ];
    for (program, code, words) in cases {
        let answer = stage.upgrade(&program, &[]).expect(code);
        assert!(answer.complaint().contains(words), "{words:?} is not in: {answer}");
        stage.is_as_before(&answer);
    }
    let answer = stage.vmpatch.finish(&mute_line, waiting).expect(3);
    assert!(answer.complaint().contains("did not answer `--version`"), "{answer}");
}

#[test]
fn a_program_that_hangs_is_given_up() {
    let stage = Stage::new();
    let hung = stage.program("exec sleep 1000");
    let answer = stage.upgrade(&hung, &["--within", "1"]).expect(1);
    assert!(answer.complaint().contains("did not answer"), "{answer}");
    stage.is_as_before(&answer);

    let child = stage.vmpatch.start(&["upgrade", "--qemu", &hung]);
    sleep(Duration::from_secs(1));
    processes::kill_group(child.id(), Signal::SIGINT);
    let answer = stage.finish(child).expect(1);
    assert!(answer.complaint().ends_with("moving the guest: cancelled"), "{answer}");
    stage.is_as_before(&answer);

    let (child, new) = stage.start(&["--within", "3"]);
    processes::kill(new, Signal::SIGSTOP);
    let answer = stage.finish(child).expect(1);
    assert!(answer.complaint().contains("had not moved within 3 s"), "{answer}");
    stage.is_as_before(&answer);
}

#[test]
fn a_move_that_is_cut_off_leaves_the_guest_running_in_its_old_process() {
    let stage = Stage::new();
    let (child, new) = stage.start(&[]);
    processes::kill(new, Signal::SIGKILL);
    let answer = stage.finish(child).expect(1);
    assert!(
        answer.complaint().contains("the new process ended (signal: 9"),
        "{answer}"
    );
    stage.is_as_before(&answer);

    let (child, _) = stage.start(&[]);
    let other = stage.vmpatch.run(&["apply", &MODULE]).expect(5);
    assert!(other.complaint().contains("another vmpatch"), "{other}");
    processes::kill_group(child.id(), Signal::SIGINT);
    let answer = stage.finish(child).expect(1);
    assert!(answer.complaint().ends_with("moving the guest: cancelled"), "{answer}");
    stage.is_as_before(&answer);

    let answer = stage.upgrade(INSTALLED, &[SLOWLY, "--within", "1"]).expect(1);
    assert!(answer.complaint().contains("had not moved within 1 s"), "{answer}");
    stage.is_as_before(&answer);
}

#[test]
fn a_guest_that_is_being_patched_is_not_moved() {
    let stage = Stage::new();
    let module = Modules::of(&Kernel::CLOUD_6_1).applied(Applied::Pause);
    let sleeper = Sleeper::start(&stage.guest);
    let line = ["apply", &module, "--timeout", "12"];
    let apply = stage.vmpatch.start(&line);
    wait_for(|| is_locked(&stage.guest).then_some(()));
    let answer = stage.upgrade(INSTALLED, &[]).expect(5);
    assert!(answer.complaint().contains("another vmpatch"), "{answer}");
    assert_eq!(sleeper.wake(&stage.guest), Seen::Flawed);
    stage.vmpatch.finish(&line, apply).expect(0);
    stage.vmpatch.run(&["revert", "--all"]).expect(0);
    stage.vmpatch.apply(&MODULE);
    stage.is_as_before(&answer);
}

#[test]
fn of_two_moves_at_once_one_is_done_and_the_other_says_so() {
    let mut guest = Guest::boot(kit::guest(Kernel::CLOUD_6_1).ram(Ram::Private)).unwrap();
    let _keeper = Keeper::of(&guest);
    let vmpatch = Vmpatch::on(&guest);
    let line = ["upgrade", "--qemu", INSTALLED];
    let (first, second) = (vmpatch.start(&line), vmpatch.start(&line));
    let answers = [first, second].map(|child| vmpatch.finish(&line, child));
    let [done, other] = match answers {
        [first, second] if first.code == Some(0) => [first, second],
        [first, second] => [second, first],
    };
    done.expect(0);
    let other = other.expect(5);
    let words = format!(
        "the guest has just left process {}: another vmpatch has moved it",
        guest.pid()
    );
    assert!(other.complaint().starts_with(&words), "{other}");
    let pid = vmpatch.status()["guest"]["pid"].as_u64().unwrap();
    guest.follow(u32::try_from(pid).unwrap()).unwrap();
}

/// Whether a vmpatch is at work on the guest.
fn is_locked(guest: &Guest) -> bool {
    DomainLock::acquire(i32::try_from(guest.pid()).unwrap()).is_err()
}

#[test]
fn a_vmpatch_that_is_killed_while_a_guest_moves_leaves_the_guest_running_in_its_old_process() {
    let stage = Stage::new();
    let (child, _) = stage.start(&[]);
    processes::kill(child.id(), Signal::SIGKILL);
    // Whoever watches over the move has the same standard error, so this waits for its end, too.
    let answer = stage.finish(child);
    assert!(
        answer
            .stderr
            .contains("its process was killed; the guest was not moved"),
        "{answer}"
    );
    stage.is_as_before(&answer);

    let (child, new) = stage.start(&[]);
    let watchers = processes::with_arguments(&["watch-move", &stage.guest.pid().to_string()]);
    assert_eq!(watchers.len(), 1);
    processes::kill(child.id(), Signal::SIGKILL);
    watchers
        .into_iter()
        .for_each(|pid| processes::kill(pid, Signal::SIGKILL));
    let answer = stage.finish(child);
    let lines = stage.vmpatch.run_bare(&["domains", "--json"]).expect(0).json();
    let ours = lines
        .as_array()
        .unwrap()
        .iter()
        .filter(|line| line["name"] == stage.guest.name());
    let errors: Vec<_> = ours.map(|line| line["error"].as_str().unwrap_or_default()).collect();
    assert!(
        matches!(errors[..], [error] if error.contains(&format!("moves to process {new}"))),
        "{lines}"
    );
    let next = stage.vmpatch.run(&["status"]).expect(0);
    assert!(
        next.stderr.contains("had been cut off: the guest was not moved"),
        "{next}"
    );
    stage.is_as_before(&answer);
}
