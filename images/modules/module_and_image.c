/*
 * One patch for two objects: pause() of the kernel image, and a function of the
 * module target, which need not be loaded.
 */
#include <linux/moduleparam.h>
#include <linux/sched/signal.h>
#include <asm/ptrace.h>
#include "livepatch.h"

extern int vmpatch_target_secret KLP_SYMBOL_OF("vmpatch_target", "vmpatch_target_secret", "0");

static int livepatch_get(char *buffer, const struct kernel_param *param)
{
	return sprintf(buffer, "%d\n", vmpatch_target_secret * 100);
}

static long livepatch_pause(const struct pt_regs *regs)
{
	while (!signal_pending(current)) {
		__set_current_state(TASK_INTERRUPTIBLE);
		schedule();
	}
	return -EOPNOTSUPP;
}

static struct klp_func image_funcs[] = { PATCH(__x64_sys_pause, livepatch_pause), { } };
static struct klp_func module_funcs[] = { PATCH(vmpatch_target_get, livepatch_get), { } };
static struct klp_object klp_objects[] = {
	{ .funcs = image_funcs },
	{ .name = "vmpatch_target", .funcs = module_funcs },
	{ }
};
LIVEPATCH_OF(klp_objects);
