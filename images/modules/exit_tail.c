/*
 * A function that do_exit() calls when its task is on no list any more (kernel/exit.c):
 * proc_exit_connector(). The new one sleeps there for a while if the task asks for that
 * by its name.
 */
#include <linux/delay.h>
#include <linux/sched.h>
#include <linux/string.h>
#include "livepatch.h"

#define SLEEPS_MS 25000

static unsigned long woken;

static void livepatch_exit_connector(struct task_struct *task)
{
	if (strcmp(task->comm, "exit_tail"))
		return;
	msleep(SLEEPS_MS);
	/* Not the last call: the task comes back to here. */
	WRITE_ONCE(woken, woken + 1);
}

LIVEPATCH(PATCH(proc_exit_connector, livepatch_exit_connector));
