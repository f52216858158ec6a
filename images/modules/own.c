/*
 * A livepatch that a guest loads itself: getppid() by another function that does
 * the same.
 */
#include <linux/ptrace.h>
#include <linux/sched.h>
#include "livepatch.h"

static long livepatch_getppid(const struct pt_regs *regs)
{
	long pid;

	rcu_read_lock();
	pid = task_tgid_vnr(rcu_dereference(current->real_parent));
	rcu_read_unlock();
	return pid;
}

LIVEPATCH(PATCH(__x64_sys_getppid, livepatch_getppid));
