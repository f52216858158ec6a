//! Tasks of the made-up guest: two idle ones, and processes that sleep, each with a stack that unwinds to its end.

use super::guest::{DATA, FUNCTIONS, Guest, VMALLOC, heap, per_cpu_area};

/// Where `init_task` lies.
pub const INIT_TASK: u64 = DATA + 0x5_0000;
/// The function at which tasks start; its ORC entry says that the stack ends there.
pub const START: u64 = FUNCTIONS + 64 * 9;
/// `task_struct.patch_state`.
pub const PATCH_STATE: u64 = 56;
/// Bytes of a stack.
pub const STACK: u64 = 0x4000;

/// A task: where its `struct task_struct` and its stack lie.
#[derive(Debug, Clone, Copy)]
pub struct Task {
    pub at: u64,
    pub stack: u64,
    pub pid: u32,
}

/// The sleeping process number `number`, from 0 on.
pub fn process(number: u64) -> Task {
    let at = heap(0x8_0000 + 0x1000 * number);
    Task {
        at,
        stack: VMALLOC + 2 * STACK * number,
        pid: 100 + number as u32,
    }
}

/// A CPU's idle task.
pub fn idle(cpu: u64) -> Task {
    let at = if cpu == 0 {
        INIT_TASK
    } else {
        heap(0x7_0000 + 0x1000 * cpu)
    };
    Task {
        at,
        stack: heap(0x6_0000 + STACK * cpu),
        pid: 0,
    }
}

/// Fills in two idle tasks, which run, and `sleeping` processes.
pub fn populate(guest: &Guest, sleeping: u64) {
    for cpu in 0..2 {
        let task = idle(cpu);
        write(guest, task, "swapper", &[START + 1]);
        guest.put(task.at + 52, &1_u32.to_le_bytes());
        let area = per_cpu_area(cpu);
        guest.put_u64(area + 0x1000 + 24, task.at);
        guest.put_u64(area + 0x1000 + 32, task.at);
        guest.put_u64(area + 0x1400, task.at);
    }
    let tasks: Vec<Task> = (0..sleeping).map(process).collect();
    for &task in &tasks {
        write(
            guest,
            task,
            "sleeper",
            &[FUNCTIONS + 16, FUNCTIONS + 64 * 7 + 16, START + 1],
        );
        let signal = task.at + 0x800;
        guest.put_u64(task.at + 104, signal);
        guest.link(signal + 16, &[task.at + 88]);
    }
    let nodes: Vec<u64> = tasks.iter().map(|task| task.at + 64).collect();
    guest.link(INIT_TASK + 64, &nodes);
    guest.put(guest.symbol("nr_threads"), &(sleeping as u32).to_le_bytes());
}

/// One task whose stack holds these return addresses, innermost first.
pub fn write(guest: &Guest, task: Task, comm: &str, returns: &[u64]) {
    let mut words = vec![0; 6];
    words.extend_from_slice(returns);
    let sp = task.stack + STACK - 0x100 - 8 * words.len() as u64;
    for (index, word) in words.into_iter().enumerate() {
        guest.put_u64(sp + 8 * index as u64, word);
    }
    guest.put_u64(task.stack, 0x57ac_6e9d);
    guest.put_u64(task.at + 32, task.stack);
    guest.put(task.at + PATCH_STATE, &u32::MAX.to_le_bytes());
    guest.put(task.at + 80, &task.pid.to_le_bytes());
    guest.put(task.at + 84, &task.pid.to_le_bytes());
    guest.put_u64(task.at + 128, 1000 + u64::from(task.pid));
    guest.put(task.at + 136, &[0; 16]);
    guest.put(task.at + 136, comm.as_bytes());
    guest.put_u64(task.at + 256 + 24, sp);
}
