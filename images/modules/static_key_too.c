/* Another function with a branch on the same static key of the kernel's. */
#include <linux/jump_label.h>
#include <linux/sched/signal.h>
#include <asm/ptrace.h>
#include "livepatch.h"

extern struct static_key_false schedstats KLP_SYMBOL("sched_schedstats", "0");

static long livepatch_pause(const struct pt_regs *regs)
{
	while (!signal_pending(current)) {
		__set_current_state(TASK_INTERRUPTIBLE);
		schedule();
	}
	return static_branch_unlikely(&schedstats) ? -EOPNOTSUPP : -EINTR;
}

LIVEPATCH(PATCH(__x64_sys_pause, livepatch_pause));
