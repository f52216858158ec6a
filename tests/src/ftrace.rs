//! The guest's own tracing, as an administrator in the guest uses it.

use std::process::Output;

use images::guest::Guest;

/// Where a guest has mounted it.
const ROOT: &str = "/sys/kernel/tracing";
/// Lines of a trace that are looked at.
const TRACE_LINES_MAX: usize = 2000;
/// What puts everything back that a test here turns on, in an order that the kernel takes.
const RESET: &str = "cd /sys/kernel/tracing || exit
[ -e events/kprobes/enable ] && echo 0 >events/kprobes/enable
echo nop >current_tracer; echo >set_ftrace_filter; echo >set_graph_function; echo >kprobe_events; echo >trace; echo 1 >tracing_on";

/// A guest's tracefs. Dropped, it traces nothing any more.
pub struct Ftrace<'a> {
    guest: &'a Guest,
}

impl<'a> Ftrace<'a> {
    /// Of that guest.
    pub fn of(guest: &'a Guest) -> Self {
        Self { guest }
    }

    /// Writes a line to a file, as `echo` does.
    ///
    /// # Panics
    ///
    /// If the kernel does not take it.
    #[track_caller]
    pub fn set(&self, file: &str, line: &str) {
        let output = self.try_set(file, line);
        assert!(
            output.status.success(),
            "{line:?} to {file}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
    }

    /// Adds a kprobe event on a place, and turns it on.
    ///
    /// # Panics
    ///
    /// If the kernel does not take it.
    #[track_caller]
    pub fn probe(&self, event: &str, place: &str) {
        let script = format!("echo 'p:{event} {place}' >>{ROOT}/kprobe_events");
        self.guest.text(&["sh", "-c", &script]).expect("the kprobe is taken");
        self.set(&format!("events/kprobes/{event}/enable"), "1");
    }

    /// Writes a line to a file, which the kernel may refuse.
    ///
    /// # Panics
    ///
    /// If the guest does not run the command.
    #[track_caller]
    pub fn try_set(&self, file: &str, line: &str) -> Output {
        let script = r#"printf '%s\n' "$2" >"$1""#;
        let command = ["sh", "-c", script, "set", &format!("{ROOT}/{file}"), line];
        self.guest.run(&command).expect("the guest runs a shell")
    }

    /// What a file says.
    ///
    /// # Panics
    ///
    /// If it can't be read.
    #[track_caller]
    pub fn get(&self, file: &str) -> String {
        let bytes = self.guest.pull(&format!("{ROOT}/{file}"));
        String::from_utf8_lossy(&bytes.expect("tracefs can be read")).into_owned()
    }

    /// The first lines of what was traced, without the heading; nothing more is traced meanwhile.
    ///
    /// # Panics
    ///
    /// If it can't be read.
    #[track_caller]
    pub fn trace(&self) -> String {
        self.set("tracing_on", "0");
        let script = format!("grep -v '^#' {ROOT}/trace | head -n {TRACE_LINES_MAX}");
        let trace = self.guest.text(&["sh", "-c", &script]).expect("the trace can be read");
        self.set("trace", "");
        self.set("tracing_on", "1");
        trace
    }

    /// How often the kprobe event of that name was hit.
    ///
    /// # Panics
    ///
    /// If there is no such event.
    #[track_caller]
    pub fn kprobe_hits(&self, event: &str) -> u64 {
        // Each line: the event, its hits, and the times that it could not be recorded.
        let profile = self.get("kprobe_profile");
        let mut lines = profile.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
        let hits = lines.find_map(|words| match words.as_slice() {
            [name, hits, ..] if *name == event => hits.parse().ok(),
            _ => None,
        });
        hits.unwrap_or_else(|| panic!("no {event}: {profile}"))
    }

    /// Makes a tracer the current one.
    ///
    /// # Panics
    ///
    /// If this kernel was built without it, which none that is tested here is.
    #[track_caller]
    pub fn start(&self, tracer: &str) {
        let all = self.get("available_tracers");
        assert!(
            all.split_whitespace().any(|other| other == tracer),
            "this kernel has no tracer {tracer}, only {all}"
        );
        self.set("current_tracer", tracer);
    }

    /// Traces nothing any more.
    ///
    /// # Panics
    ///
    /// If the guest does not run a shell.
    pub fn reset(&self) {
        self.guest.run(&["sh", "-c", RESET]).expect("the guest runs a shell");
    }

    /// Demands that ftrace still does its work: that it sees a function that nobody has patched. A kernel that has found a
    /// site changed turns all of ftrace off and sees nothing any more (`ftrace_kill`, kernel/trace/ftrace.c). Nothing is traced
    /// when this returns.
    ///
    /// # Panics
    ///
    /// If it does not.
    #[track_caller]
    pub fn assert_alive(&self) {
        const WITNESS: &str = "__x64_sys_newuname";
        self.reset();
        self.set("set_ftrace_filter", WITNESS);
        self.start("function");
        let enabled = self.get("enabled_functions");
        self.guest.text(&["uname", "-r"]).expect("the guest tells its release");
        let trace = self.trace();
        self.reset();
        assert!(enabled.contains(WITNESS), "{enabled}");
        assert!(trace.contains(WITNESS), "{trace}");
    }
}

impl Drop for Ftrace<'_> {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.reset();
        }
    }
}
