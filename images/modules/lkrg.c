/*
 * An ordinary module that looks like LKRG to whoever reads the guest: its name and
 * the two settings that say what it does when it finds the kernel changed. It checks
 * nothing.
 */
#include <linux/kernel.h>
#include <linux/module.h>
#include <linux/moduleparam.h>
#include <linux/sysctl.h>

static unsigned int interval = 15;
static unsigned int kint_validate = 3;
static unsigned int kint_enforce = 2;
module_param(kint_enforce, uint, 0);

/* False: the module has no settings, as one of a version that nobody knows. */
static bool settings = true;
module_param(settings, bool, 0);

static struct ctl_table table[] = {
	{
		.procname = "interval",
		.data = &interval,
		.maxlen = sizeof(interval),
		.mode = 0600,
		.proc_handler = proc_dointvec,
	},
	{
		.procname = "kint_enforce",
		.data = &kint_enforce,
		.maxlen = sizeof(kint_enforce),
		.mode = 0600,
		.proc_handler = proc_dointvec,
	},
	{
		.procname = "kint_validate",
		.data = &kint_validate,
		.maxlen = sizeof(kint_validate),
		.mode = 0600,
		.proc_handler = proc_dointvec,
	},
	{ }
};

static struct ctl_table_header *header;

static int __init lkrg_init(void)
{
	if (!settings)
		return 0;
	header = register_sysctl("lkrg", table);
	return header ? 0 : -ENOMEM;
}

static void __exit lkrg_exit(void)
{
	if (header)
		unregister_sysctl_table(header);
}

module_init(lkrg_init);
module_exit(lkrg_exit);
MODULE_LICENSE("GPL");
