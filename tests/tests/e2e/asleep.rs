//! Tasks that sleep where a stack is not plain: below code that the kernel has made while it ran, with return addresses that a
//! tracer keeps elsewhere, or on no list of tasks. Neither may they be overlooked, nor be in the way of patches that do not concern them.

use std::time::{Duration, Instant};

use e2e::bed::{self, assert_healthy};
use e2e::ftrace::Ftrace;
use e2e::kit::{self, Modules};
use e2e::probe::{Seen, see};
use e2e::report::{redirects, states};
use e2e::sleeper::Sleeper;
use e2e::spoil::{Header, Spoiled};
use e2e::vmpatch::Vmpatch;
use images::build::hand_written::Applied;
use images::guest::Guest;
use images::kernel::Kernel;

/// The function that tasks sleep in, by its name in the kernel's types, and by the one by which the module `pause` replaces it.
const SLEPT_IN: [&str; 2] = ["__do_sys_pause", "__x64_sys_pause"];
/// A function that the module `pair` replaces.
const REPLACED: &str = "si_meminfo";
/// The function that a BPF program is attached to that takes nearly all of a CPU's time.
const CALLED: &str = "__do_sys_getppid";
/// More moments than it takes to meet that program.
const MOMENTS: usize = 10;
/// How long a program in the guest may take to get somewhere; the host may be busy with other guests.
const PROGRAM_LIMIT: Duration = Duration::from_secs(60);
/// The task that no list names sleeps for 25 s of the guest's time.
const AWAKE_MAX: Duration = Duration::from_secs(120);

struct Bed<'a> {
    guest: &'a Guest,
    modules: &'a Modules,
    vmpatch: Vmpatch,
}

impl Bed<'_> {
    /// Functions in which nobody is are patched; the one in which the task sleeps is not, and the task is named.
    #[track_caller]
    fn is_in_the_way_of_its_own_function_alone(&self, sleeper: &Sleeper, comm: &str) {
        self.vmpatch.apply(&self.modules.applied(Applied::Pair));
        self.vmpatch.revert_all();
        let pause = self.modules.applied(Applied::Pause);
        let refused = self.vmpatch.run(&["apply", "--timeout", "1", &pause]).expect(4);
        let complaint = refused.complaint();
        let [_, function] = SLEPT_IN;
        let inside = format!("{comm} (pid {}) is inside {function}", sleeper.pid());
        assert!(complaint.contains(&inside), "{complaint}");
    }

    /// Tasks asleep below BPF programs, whose trampoline has called the function.
    fn below_bpf(&self) {
        let holder = Sleeper::below_bpf(self.guest, SLEPT_IN[0]);
        self.is_in_the_way_of_its_own_function_alone(&holder, "fexit");
        // the trampoline of programs that are gone stays for as long as it has to return to
        let sleeper = Sleeper::start(self.guest);
        assert_eq!(holder.wake(self.guest), Seen::Fixed);
        self.is_in_the_way_of_its_own_function_alone(&sleeper, "pause");
        assert_eq!(sleeper.wake(self.guest), Seen::Flawed);
    }

    /// A function that has BPF programs is replaced behind its site.
    fn of_a_function_with_bpf(&self) {
        let holder = Sleeper::below_bpf(self.guest, REPLACED);
        let applied = self.vmpatch.apply(&self.modules.applied(Applied::Pair));
        assert!(redirects(&applied).contains(&(REPLACED, "body")), "{applied}");
        let program = Applied::Pair.program();
        assert_eq!(see(self.guest, program), Seen::Fixed);
        self.vmpatch.revert_all();
        assert_eq!(see(self.guest, program), Seen::Flawed);
        assert_eq!(holder.wake(self.guest), Seen::Fixed);
    }

    /// A CPU in the middle of a BPF program: nothing tells how much of its stack the program has taken, and the program is named.
    fn in_bpf(&self) {
        let busy = self
            .guest
            .spawn(&["/opt/fexit", "busy", CALLED])
            .expect("the guest runs a program");
        busy.wait_for_stdout("started", PROGRAM_LIMIT).unwrap();
        let module = self.modules.applied(Applied::Pair);
        // One pause each. Nearly all of the time the CPU is in the program.
        let complaint = (0..MOMENTS).find_map(|_| {
            let tried = self.vmpatch.run(&["apply", "--timeout", "0", &module]);
            if tried.code == Some(0) {
                self.vmpatch.revert_all();
                return None;
            }
            Some(tried.expect(4).complaint().to_owned())
        });
        let complaint = complaint.expect("a pause falls into the program");
        assert!(
            complaint.contains("is in BPF's bpf_prog_") && complaint.contains("which was interrupted there"),
            "{complaint}"
        );
        self.guest.text(&["kill", &busy.pid().to_string()]).unwrap();
        assert_eq!(busy.wait(PROGRAM_LIMIT).unwrap().status.code(), Some(0));
        self.vmpatch.apply(&module);
        self.vmpatch.revert_all();
    }

    /// A task whose return address a return probe, the function graph tracer, or both keep, and which BPF programs have called.
    fn below_tracers(&self) {
        let [function, name] = SLEPT_IN;
        let tracing = Ftrace::of(self.guest);
        let probe = |tracing: &Ftrace<'_>| {
            tracing.set("kprobe_events", &format!("r:returns {name}"));
            tracing.set("events/kprobes/returns/enable", "1");
        };
        let graph = |tracing: &Ftrace<'_>| {
            tracing.set("set_graph_function", function);
            tracing.start("function_graph");
        };
        for set_up in [&probe as &dyn Fn(&Ftrace<'_>), &graph, &|tracing| {
            probe(tracing);
            graph(tracing);
        }] {
            set_up(&tracing);
            let sleeper = Sleeper::start(self.guest);
            self.is_in_the_way_of_its_own_function_alone(&sleeper, "pause");
            assert_eq!(sleeper.wake(self.guest), Seen::Flawed);
            let below_both = Sleeper::below_bpf(self.guest, function);
            self.is_in_the_way_of_its_own_function_alone(&below_both, "fexit");
            assert_eq!(below_both.wake(self.guest), Seen::Fixed);
            tracing.reset();
        }
        tracing.assert_alive();
    }

    /// A task at the end of do_exit() has left all lists, and sleeps in the new code; when it wakes, that must still be there.
    fn on_no_list(&self) {
        let vmpatch = &self.vmpatch;
        vmpatch.apply(&self.modules.exit_tail());
        assert_eq!(self.guest.text(&["/opt/exit_tail"]).unwrap(), "unlisted");
        let revert = ["revert", "--all", "--timeout", "2"];
        let refused = vmpatch.run(&revert).expect(4);
        let complaint = refused.complaint();
        assert!(
            complaint.contains("no list of tasks") && complaint.contains("the new code of test_exit_tail"),
            "{complaint}"
        );
        assert_eq!(states(&vmpatch.status())[0].1, "applied");
        let start = Instant::now();
        while vmpatch.run(&revert).code != Some(0) {
            assert!(start.elapsed() < AWAKE_MAX, "the task never ends");
        }
        std::thread::sleep(Duration::from_secs(1));
    }
}

/// All of it on one guest.
fn tasks_asleep_are_seen_and_in_the_way_of_nothing_else(kernel: Kernel) {
    let modules = Modules::of(&kernel);
    let guest = bed::lend(kit::guest(kernel));
    let bed = Bed {
        guest: &guest,
        modules: &modules,
        vmpatch: Vmpatch::on(&guest),
    };
    bed.below_bpf();
    bed.in_bpf();
    bed.of_a_function_with_bpf();
    bed.below_tracers();
    bed.on_no_list();
    assert_healthy(&guest);
    guest.discard();
}

#[test]
fn tasks_asleep_are_seen_and_in_the_way_of_nothing_else_on_5_10() {
    tasks_asleep_are_seen_and_in_the_way_of_nothing_else(Kernel::CLOUD_5_10);
}

#[test]
fn tasks_asleep_are_seen_and_in_the_way_of_nothing_else_on_6_1() {
    tasks_asleep_are_seen_and_in_the_way_of_nothing_else(Kernel::CLOUD_6_1);
}

#[test]
fn tasks_asleep_are_seen_and_in_the_way_of_nothing_else_on_6_12_with_preempt_rt() {
    tasks_asleep_are_seen_and_in_the_way_of_nothing_else(Kernel::RT_6_12);
}

#[test]
fn tasks_asleep_are_seen_and_in_the_way_of_nothing_else_on_7_2() {
    tasks_asleep_are_seen_and_in_the_way_of_nothing_else(Kernel::CLOUD_7_2);
}

/// A task of which nothing tells where its stack goes on, and which has an address in the old function on it.
#[test]
fn a_task_asleep_in_a_module_without_orc_is_named_with_that_module() {
    const VALUE: &str = "/sys/module/vmpatch_target/parameters/value";
    let modules = Modules::of(&Kernel::CLOUD_6_1);
    let guest = bed::lend(kit::guest(Kernel::CLOUD_6_1));
    let vmpatch = Vmpatch::on(&guest);
    // Without the dot in front, the guest does not find the tables.
    let target = [".orc_unwind", ".orc_unwind_ip"]
        .iter()
        .fold(Spoiled::of(&modules.target().to_string_lossy()), |target, section| {
            target.header(section, Header::Name, |name| name + 1)
        });
    guest.push("/tmp/vmpatch_target.ko", target.bytes(), 0o644).unwrap();
    guest
        .text(&["insmod", "/tmp/vmpatch_target.ko", "delay=3600000"])
        .unwrap();
    let reader = guest.spawn(&["cat", VALUE]).unwrap();
    let (pid, start) = (reader.pid().to_string(), Instant::now());
    let sleeps = || {
        let stat = guest.text(&["cat", &format!("/proc/{pid}/stat")]).unwrap();
        stat.contains("(cat) S ")
    };
    while !sleeps() {
        assert!(start.elapsed() < PROGRAM_LIMIT, "it never sleeps");
    }

    let module = modules.applied(Applied::Module);
    let refused = vmpatch.run(&["apply", "--timeout", "1", &module]).expect(4);
    let complaint = refused.complaint();
    assert!(
        complaint.contains(&format!("cat (pid {pid})"))
            && complaint.contains("is in the module vmpatch_target, which has no ORC table"),
        "{complaint}"
    );
    vmpatch.apply(&modules.applied(Applied::Pair));
    vmpatch.revert_all();

    guest.text(&["kill", &pid]).unwrap();
    reader.wait(PROGRAM_LIMIT).unwrap();
    vmpatch.apply(&module);
    assert_eq!(guest.text(&["cat", VALUE]).unwrap(), "7030");
    vmpatch.revert_all();
    guest.text(&["rmmod", "vmpatch_target"]).unwrap();
    assert_healthy(&guest);
}
