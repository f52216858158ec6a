/* A new function with more variables on each CPU than any kernel has in reserve. */
#include <linux/percpu.h>
#include "livepatch.h"

static DEFINE_PER_CPU(long[2000], calls);

static long livepatch_pause(const struct pt_regs *regs)
{
	this_cpu_inc(calls[regs->di % 2000]);
	return -EOPNOTSUPP;
}

LIVEPATCH(PATCH(__x64_sys_pause, livepatch_pause));
