/*
 * A function that do_exit() calls when its task is on no list any more (kernel/exit.c):
 * proc_exit_connector(). The new one sleeps there for a while if the task asks for that
 * by its name.
 */
#include <linux/delay.h>
#include <linux/sched.h>
#include "livepatch.h"

#define SLEEPS_MS 25000
/*
 * "exit_tai", as a number: a string's address would be taken for one that the guest
 * may keep, and the patch's code would not be wiped.
 */
#define NAME 0x6961745f74697865ULL

static unsigned long woken;

static void livepatch_exit_connector(struct task_struct *task)
{
	if (*(const u64 *)task->comm != NAME)
		return;
	msleep(SLEEPS_MS);
	/* Not the last call: the task comes back to here. */
	WRITE_ONCE(woken, woken + 1);
}

LIVEPATCH(PATCH(proc_exit_connector, livepatch_exit_connector));
