/*
 * A new sysinfo() that hands its own code to the kernel, which calls it later: a
 * timer, a delayed work, an RCU callback, a notifier, and a file in /proc that
 * tells how often each was called. Nothing of it is ever taken back.
 */
#include <linux/notifier.h>
#include <linux/proc_fs.h>
#include <linux/rcupdate.h>
#include <linux/seq_file.h>
#include <linux/timer.h>
#include <linux/workqueue.h>
#include "livepatch.h"
#include "sysinfo.h"

#define NEW 0x4e4c
#define DELAY (20 * HZ)

static unsigned long timers, works, callbacks, notified;
static bool registered, waiting;
static struct rcu_head head;

static void on_timer(struct timer_list *timer)
{
	WRITE_ONCE(timers, timers + 1);
}

static void on_work(struct work_struct *work)
{
	WRITE_ONCE(works, works + 1);
}

static void on_grace_period(struct rcu_head *rcu)
{
	WRITE_ONCE(callbacks, callbacks + 1);
	WRITE_ONCE(waiting, false);
}

static int on_module(struct notifier_block *block, unsigned long event, void *data)
{
	WRITE_ONCE(notified, notified + 1);
	return NOTIFY_DONE;
}

static int show(struct seq_file *file, void *data)
{
	seq_printf(file, "timers %lu works %lu callbacks %lu notified %lu\n", timers, works, callbacks, notified);
	return 0;
}

static DEFINE_TIMER(timer, on_timer);
static DECLARE_DELAYED_WORK(work, on_work);
static struct notifier_block block = { .notifier_call = on_module };

static long livepatch_sysinfo(const struct pt_regs *regs)
{
	struct sysinfo info = { .pad = NEW, .mem_unit = 1 };

	mod_timer(&timer, jiffies + DELAY);
	schedule_delayed_work(&work, DELAY);
	if (!READ_ONCE(waiting)) {
		WRITE_ONCE(waiting, true);
		call_rcu(&head, on_grace_period);
	}
	if (!registered) {
		registered = true;
		register_module_notifier(&block);
		proc_create_single("vmpatch_outlives", 0444, NULL, show);
	}
	return sysinfo_reply(regs, &info);
}

LIVEPATCH(PATCH(__x64_sys_sysinfo, livepatch_sysinfo));
