//! The guest traces itself: kprobes and tracers come and go, on functions that no patch replaces.

use super::{Result, Scene, Storm, Work};

/// A kprobe in a function's ftrace site, and one behind it, which is an int3 or an optimised jump.
const KPROBES: &str = "cd /sys/kernel/tracing
echo 'p:storm_site vfs_read' >>kprobe_events
echo 'p:storm_behind vfs_write+8' >>kprobe_events
echo 'r:storm_return ksys_read' >>kprobe_events
for event in site behind return; do echo 1 >events/kprobes/storm_$event/enable; done
for event in site behind return; do echo 0 >events/kprobes/storm_$event/enable; done
for event in site behind return; do echo -:storm_$event >>kprobe_events; done";
/// What takes out kprobes of a round that failed.
const NO_KPROBES: &str = "echo 0 >/sys/kernel/tracing/events/kprobes/enable; echo >/sys/kernel/tracing/kprobe_events";
/// Tracers with a filter that names no patched function.
const FTRACE: &str = "cd /sys/kernel/tracing
echo 'vfs_*' >set_ftrace_filter
for tracer in function function_graph nop; do echo $tracer >current_tracer; done
echo >set_ftrace_filter";
/// What ends all tracing.
const NO_FTRACE: &str = "cd /sys/kernel/tracing; echo nop >current_tracer; echo >set_ftrace_filter; echo >trace";

/// Kprobes.
pub(super) struct Kprobes;

impl Storm for Kprobes {
    fn name(&self) -> &'static str {
        "kprobes"
    }

    fn what(&self) -> &'static str {
        "kprobes are attached and detached"
    }

    fn start(&self, scene: &Scene<'_>) -> Result<Vec<Work>> {
        Ok(vec![Work::shell(scene, "kprobes", KPROBES, NO_KPROBES)?])
    }
}

/// Tracers.
pub(super) struct Ftrace;

impl Storm for Ftrace {
    fn name(&self) -> &'static str {
        "ftrace"
    }

    fn what(&self) -> &'static str {
        "tracers are started and ended"
    }

    fn start(&self, scene: &Scene<'_>) -> Result<Vec<Work>> {
        Ok(vec![Work::shell(scene, "ftrace", FTRACE, NO_FTRACE)?])
    }
}
