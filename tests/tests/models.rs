//! When it is safe to patch: tasks that sleep or work inside what is to be changed, and guests at rest or at work.

use std::sync::LazyLock;
use std::time::Duration;

use e2e::bed::{self, Lent};
use e2e::kit::{self, Modules};
use e2e::probe::{Seen, see};
use e2e::report::states;
use e2e::vmpatch::{Answer, Vmpatch};
use images::build::hand_written::Applied;

use images::channel::Running;
use images::guest::Guest;
use images::kernel::Kernel;

static MODULES: LazyLock<Modules> = LazyLock::new(|| Modules::of(&Kernel::CLOUD_6_1));
/// How long a program in the guest may take to get somewhere; the host may be busy with other guests.
const PROGRAM_LIMIT: Duration = Duration::from_secs(30);

fn guest() -> Lent {
    bed::lend(kit::guest(Kernel::CLOUD_6_1))
}

/// A task that sleeps in the system call pause().
struct Sleeper {
    running: Running,
}

impl Sleeper {
    fn start(guest: &Guest) -> Self {
        let running = guest.spawn(&["/opt/pause", "sleep"]).expect("the guest runs a program");
        running.wait_for_stdout("sleeping", PROGRAM_LIMIT).unwrap();
        let sleeper = Self { running };
        // It says so just before it does.
        let stat = format!("/proc/{}/wchan", sleeper.running.pid());
        let asleep = || guest.text(&["cat", &stat]).is_ok_and(|wchan| wchan != "0");
        assert!((0..100).any(|_| asleep()), "it never sleeps");
        sleeper
    }

    /// Wakes it and gives what it saw: which function it has slept in.
    fn wake(self, guest: &Guest) -> Seen {
        guest.text(&["kill", "-USR1", &self.running.pid().to_string()]).unwrap();
        match self.running.wait(PROGRAM_LIMIT).unwrap().status.code() {
            Some(0) => Seen::Fixed,
            Some(1) => Seen::Flawed,
            other => panic!("pause ended with {other:?}"),
        }
    }
}

/// The message names who is in the way, and it came within the deadline.
#[track_caller]
fn names(answer: &Answer, sleeper: &Sleeper, function: &str) {
    let complaint = answer.complaint();
    for part in [&format!("{}", sleeper.running.pid()), "pause", function] {
        assert!(complaint.contains(part), "no {part}: {answer}");
    }
    assert!(answer.took < Duration::from_secs(10), "{:?}: {answer}", answer.took);
}

#[test]
fn a_task_asleep_in_the_old_function_is_named_and_the_patch_goes_in_when_it_has_left() {
    let guest = guest();
    let vmpatch = Vmpatch::on(&guest);
    let module = MODULES.applied(Applied::Pause);
    let apply = ["apply", "--timeout", "2", &module];
    let sleeper = Sleeper::start(&guest);

    let blocked = vmpatch.run(&apply).expect(4);
    names(&blocked, &sleeper, "__x64_sys_pause");
    assert_eq!(states(&vmpatch.status()), []);

    assert_eq!(sleeper.wake(&guest), Seen::Flawed);
    vmpatch.run(&apply).expect(0);
    assert_eq!(see(&guest, "pause"), Seen::Fixed);
}
