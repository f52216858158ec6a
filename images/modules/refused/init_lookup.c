/* Looks a symbol up in its init, and calls it in its new function. */
#include <linux/kprobes.h>
#include "with_init.h"

static long (*find)(const struct pt_regs *regs);

static long livepatch_pause(const struct pt_regs *regs)
{
	return find(regs);
}

static int __init look_up(void)
{
	struct kprobe probe = { .symbol_name = "__x64_sys_getpid" };
	int error = register_kprobe(&probe);

	if (error)
		return error;
	find = (void *)probe.addr;
	unregister_kprobe(&probe);
	return 0;
}

static inline void nothing(void) { }

LIVEPATCH_WITH(look_up, nothing, PATCH(__x64_sys_pause, livepatch_pause));
