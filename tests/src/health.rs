//! The guest kernel's own complaints, as its console shows them.

/// What a kernel prints when something is wrong with it: `lib/bug.c`, `kernel/panic.c`, `arch/x86/kernel/dumpstack.c`,
/// `arch/x86/mm/fault.c`, `kernel/trace/ftrace.c` (6.1).
const COMPLAINTS: [&str; 10] = [
    "BUG:",
    "WARNING:",
    "Oops",
    "Kernel panic",
    "kernel BUG at",
    "general protection fault",
    "invalid opcode",
    "double fault",
    "unable to handle",
    "ftrace bug",
];

/// The lines of a console that no healthy guest shows.
pub fn complaints(console: &str) -> Vec<&str> {
    console
        .lines()
        .filter(|line| COMPLAINTS.iter().any(|complaint| line.contains(complaint)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_warning_is_found_among_ordinary_lines() {
        let console =
            "[ 0.1] x86/cpu: hardening\n[ 9.1] WARNING: CPU: 0 PID: 1 at kernel/trace/ftrace.c:1867\n[ 9.2] ok\n";
        assert_eq!(
            complaints(console),
            ["[ 9.1] WARNING: CPU: 0 PID: 1 at kernel/trace/ftrace.c:1867"]
        );
    }

    #[test]
    fn messages_about_others_are_no_complaints() {
        assert_eq!(complaints("[Firmware Bug]: TSC\nkernel: Warning: unrelated\n"), [""; 0]);
    }
}
