/*
 * A function that tasks sleep in, old and new: the system call pause(). The new
 * one sleeps until a signal as the old one does, and then says EOPNOTSUPP.
 */
#include <linux/sched.h>
#include <linux/sched/signal.h>
#include <asm/ptrace.h>
#include "livepatch.h"

static long livepatch_pause(const struct pt_regs *regs)
{
	while (!signal_pending(current)) {
		__set_current_state(TASK_INTERRUPTIBLE);
		schedule();
	}
	return -EOPNOTSUPP;
}

LIVEPATCH(PATCH(__x64_sys_pause, livepatch_pause));
