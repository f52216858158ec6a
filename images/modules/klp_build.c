/*
 * The sections that klp-build (objtool klp diff, Linux 6.19 and later) leaves in a
 * livepatch module, in place of static klp_patch structures: its init makes those
 * at run time. Ours registers nothing, as the guest is not to load it.
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

static const char old_name[] SECTION(".rodata.klp.str1.1") = "__x64_sys_pause";

static const struct function {
	const char *old_name;
	long (*new_func)(const struct pt_regs *regs);
	unsigned long sympos;
} functions[] SECTION(".init.klp_funcs") = {
	{ old_name, livepatch_pause, 1 },
};

static const struct {
	const char *name;
	const struct function *funcs;
	struct klp_callbacks callbacks;
	unsigned int nr_funcs;
} objects[] SECTION(".init.klp_objects") = {
	{ .funcs = functions, .nr_funcs = ARRAY_SIZE(functions) },
};

static int __init livepatch_init(void)
{
	return -ENOSYS;
}

module_init(livepatch_init);
MODULE_DESCRIPTION("A module as klp-build leaves it");
MODULE_INFO(livepatch, "Y");
MODULE_LICENSE("GPL");
