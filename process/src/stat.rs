//! What `/proc/PID/task/TID/stat` tells of a thread.

/// What `/proc/PID/task/TID/stat` tells of a thread: see `proc_pid_stat(5)`. Of its flags (`PF_` in include/linux/sched.h) those are read
/// that tell a thread of the program from one of the kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stat {
    /// The thread's name. Any text, with brackets and line ends.
    pub name: String,
    /// What it does: `R` running, `S` sleeping, `D` not to be woken, `T` stopped by a signal, `t` stopped by a tracer, `Z` and `X` ended.
    pub state: char,
    /// Flags of the kernel.
    flags: u64,
    /// When it started, in clock ticks since the host's boot. Together with its number it says which thread it is.
    pub start_time: u64,
    /// Time in which it ran a guest's code, in clock ticks. A guest that ran for less than a tick may show 0.
    pub guest_time: u64,
}

/// `PF_IO_WORKER`, Linux 5.12: a worker of io_uring. Until 5.11 the bit was `PF_VCPU`, set in a vCPU's thread while it is in the guest.
const IO_WORKER: u64 = 0x10;
/// `PF_USER_WORKER`, Linux 6.4: a thread of the kernel that is listed in a process, as KVM's and vhost's are.
const USER_WORKER: u64 = 0x4000;
/// `PF_KTHREAD`.
const KERNEL_THREAD: u64 = 0x20_0000;

impl Stat {
    /// Reads the line. None where it is something else.
    pub fn parse(line: &[u8]) -> Option<Self> {
        // A name may hold all that the fields behind it are told by, but nothing behind it holds a bracket.
        let start = line.iter().position(|byte| *byte == b'(')?;
        let end = line.iter().rposition(|byte| *byte == b')')?;
        let name = String::from_utf8_lossy(line.get(start + 1..end)?).into_owned();
        let rest = std::str::from_utf8(line.get(end + 1..)?).ok()?;
        // The first of them is field 3.
        let fields: Vec<&str> = rest.split_ascii_whitespace().collect();
        let number = |field: usize| fields.get(field - 3)?.parse().ok();
        Some(Self {
            name,
            state: fields.first()?.chars().next()?,
            flags: number(9)?,
            start_time: number(22)?,
            guest_time: number(43)?,
        })
    }

    /// True for a thread of the kernel that is listed in the process: it runs none of the program's code, and its registers are copies of
    /// those of its creator.
    pub fn is_kernel_worker(&self) -> bool {
        self.flags & (IO_WORKER | USER_WORKER | KERNEL_THREAD) != 0
    }

    /// True for a thread that has ended, but is not waited for.
    pub fn has_ended(&self) -> bool {
        matches!(self.state, 'Z' | 'X' | 'x')
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(name: &str, flags: u64, guest_time: u64) -> Vec<u8> {
        let mut line = format!("7 ({name}) S 1 7 7 0 -1 {flags} 0 0 0 0 61 62 0 0 20 0 5 0 22222").into_bytes();
        // Fields 23 to 42.
        line.extend_from_slice(&b" 1".repeat(20));
        line.extend_from_slice(format!(" {guest_time} 0 1 1 1 1 1 1 1 0\n").as_bytes());
        line
    }

    #[test]
    fn the_fields_are_found_behind_any_name() {
        for name in ["CPU 0/KVM", "a) S 1 2 (b", "((", "", "line\nend)"] {
            let stat = Stat::parse(&line(name, 0x40_0140, 43)).unwrap();
            assert_eq!((stat.name.as_str(), stat.state), (name, 'S'));
            assert_eq!((stat.start_time, stat.guest_time), (22222, 43));
            assert!(!stat.is_kernel_worker() && !stat.has_ended(), "{name}");
        }
    }

    #[test]
    fn threads_of_the_kernel_are_told_from_the_programs() {
        for flags in [0x40_4040, 0x40_0050, 0x20_8040] {
            assert!(
                Stat::parse(&line("kvm-nx-lpage-re", flags, 0))
                    .unwrap()
                    .is_kernel_worker()
            );
        }
    }

    #[test]
    fn a_line_that_is_cut_off_is_no_stat() {
        let whole = line("name", 0, 0);
        for len in 0..whole.len() - 30 {
            assert_eq!(Stat::parse(&whole[..len]), None, "{len}");
        }
    }
}
