/* A new function with a variable on each CPU (section .data..percpu). */
#include <linux/percpu.h>
#include "livepatch.h"

static DEFINE_PER_CPU(long, calls);

static long livepatch_pause(const struct pt_regs *regs)
{
	this_cpu_inc(calls);
	return -EOPNOTSUPP;
}

LIVEPATCH(PATCH(__x64_sys_pause, livepatch_pause));
