/*
 * An ordinary module whose functions livepatches replace: its parameter value is
 * what vmpatch_target_get() says when it is read, after so many milliseconds as
 * its parameter delay says.
 */
#include <linux/delay.h>
#include <linux/jump_label.h>
#include <linux/kernel.h>
#include <linux/module.h>
#include <linux/moduleparam.h>

static int vmpatch_target_secret = 7;

static unsigned int vmpatch_target_delay;
module_param_named(delay, vmpatch_target_delay, uint, 0444);

noinline int vmpatch_target_exported(void);
noinline int vmpatch_target_exported(void)
{
	return 30;
}
EXPORT_SYMBOL_GPL(vmpatch_target_exported);

/* Its first instruction behind the ftrace site is a branch on a static key. */
static DEFINE_STATIC_KEY_FALSE(vmpatch_target_key);

noinline int vmpatch_target_branch(void);
noinline int vmpatch_target_branch(void)
{
	if (static_branch_unlikely(&vmpatch_target_key))
		return 1;
	return 8;
}
EXPORT_SYMBOL_GPL(vmpatch_target_branch);

static noinline bool vmpatch_target_wait(void)
{
	return msleep_interruptible(vmpatch_target_delay) != 0;
}

static int vmpatch_target_get(char *buffer, const struct kernel_param *param)
{
	if (vmpatch_target_delay && vmpatch_target_wait())
		return -EINTR;
	return sprintf(buffer, "%d\n", READ_ONCE(vmpatch_target_secret) + 1);
}

static const struct kernel_param_ops operations = { .get = vmpatch_target_get };
module_param_cb(value, &operations, NULL, 0444);

static int __init target_init(void)
{
	return 0;
}

static void __exit target_exit(void) { }

module_init(target_init);
module_exit(target_exit);
MODULE_LICENSE("GPL");
