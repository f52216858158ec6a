/* Ends in its exit what its new function has queued. */
#include <linux/workqueue.h>
#include "with_init.h"

static void work(struct work_struct *unused)
{
}

static DECLARE_DELAYED_WORK(vmpatch_test_work, work);

static long livepatch_pause(const struct pt_regs *regs)
{
	schedule_delayed_work(&vmpatch_test_work, HZ);
	return -EINTR;
}

static inline int nothing(void) { return 0; }

static void __exit stop(void)
{
	cancel_delayed_work_sync(&vmpatch_test_work);
}

LIVEPATCH_WITH(nothing, stop, PATCH(__x64_sys_pause, livepatch_pause));
