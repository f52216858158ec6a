/*
 * The sections that klp-build (objtool klp diff, Linux 6.19 and later) leaves in a
 * livepatch module, in place of static klp_patch structures: its init makes those
 * at run time, and so does ours.
 */
#include <linux/sched/signal.h>
#include <linux/slab.h>
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

static struct klp_patch *patch;

static int __init livepatch_init(void)
{
	struct klp_object *object;
	struct klp_func *function;

	patch = kzalloc(sizeof(*patch), GFP_KERNEL);
	object = kzalloc(2 * sizeof(*object), GFP_KERNEL);
	function = kzalloc(2 * sizeof(*function), GFP_KERNEL);
	if (!patch || !object || !function) {
		pr_err("no memory\n");
		return -ENOMEM;
	}
	function->old_name = objects->funcs->old_name;
	function->new_func = objects->funcs->new_func;
	function->old_sympos = objects->funcs->sympos;
	object->name = objects->name;
	object->funcs = function;
	memcpy(&object->callbacks, &objects->callbacks, sizeof(object->callbacks));
	patch->mod = THIS_MODULE;
	patch->objs = object;
	return klp_enable_patch(patch);
}

static void __exit livepatch_exit(void)
{
	kfree(patch->objs->funcs);
	kfree(patch->objs);
	kfree(patch);
}

module_init(livepatch_init);
module_exit(livepatch_exit);
MODULE_DESCRIPTION("A module as klp-build leaves it");
MODULE_INFO(livepatch, "Y");
MODULE_LICENSE("GPL");
