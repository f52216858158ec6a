/* Registers a notifier in its init. */
#include <linux/reboot.h>
#include "with_init.h"

static int calls;

static int count(struct notifier_block *block, unsigned long event, void *data)
{
	WRITE_ONCE(calls, calls + 1);
	return NOTIFY_DONE;
}

static struct notifier_block vmpatch_test_block = { .notifier_call = count };

static long livepatch_pause(const struct pt_regs *regs)
{
	return READ_ONCE(calls) ? -EIO : -EINTR;
}

static int __init set_up(void)
{
	return register_reboot_notifier(&vmpatch_test_block);
}

static void __exit clean_up(void)
{
	unregister_reboot_notifier(&vmpatch_test_block);
}

LIVEPATCH_WITH(set_up, clean_up, PATCH(__x64_sys_pause, livepatch_pause));
