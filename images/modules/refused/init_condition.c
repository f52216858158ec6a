/* Chooses in its init, by a number of the kernel's, which function to enable. */
#include <linux/cpumask.h>
#include "with_init.h"

static long livepatch_pause(const struct pt_regs *regs)
{
	return -EINTR;
}

static long livepatch_pause_on_many(const struct pt_regs *regs)
{
	return -EIO;
}

static int __init choose(void);

static inline void nothing(void) { }

LIVEPATCH_WITH(choose, nothing, PATCH(__x64_sys_pause, livepatch_pause));

static int __init choose(void)
{
	if (num_online_cpus() > 1)
		klp_funcs[0].new_func = livepatch_pause_on_many;
	return 0;
}
