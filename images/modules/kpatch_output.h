/*
 * What kpatch-build's create-diff-object leaves of a fixed source file, by hand: a
 * new function, and the table that says what it replaces.
 */
#include <linux/sched/signal.h>
#include <asm/ptrace.h>
#include "livepatch.h"

#define SECTION(name) __used __section(name)

extern int nr_threads KLP_SYMBOL("nr_threads", "0");

static long livepatch_pause(const struct pt_regs *regs)
{
	while (!signal_pending(current)) {
		__set_current_state(TASK_INTERRUPTIBLE);
		schedule();
	}
	return READ_ONCE(nr_threads) > 0 ? -EOPNOTSUPP : -EIO;
}

static const char old_name[] SECTION(".kpatch.strings") = "__x64_sys_pause";
static const char object_name[] SECTION(".kpatch.strings") = "vmlinux";

static const struct {
	long (*new_addr)(const struct pt_regs *regs);
	unsigned long new_size, old_addr, old_size, sympos;
	const char *name, *objname;
} functions[] SECTION(".kpatch.funcs") = {
	{
		.new_addr = livepatch_pause,
		.new_size = 64,
		.old_addr = 0xffffffff81000000,
		.old_size = 64,
		.name = old_name,
		.objname = object_name,
	},
};
