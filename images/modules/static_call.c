/* A new function with a static call (section .static_call_sites). */
#include <linux/sched.h>
#include "livepatch.h"

static long livepatch_pause(const struct pt_regs *regs)
{
	cond_resched();
	return -EOPNOTSUPP;
}

LIVEPATCH(PATCH(__x64_sys_pause, livepatch_pause));
