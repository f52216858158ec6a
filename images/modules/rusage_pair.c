/*
 * Two functions with ftrace sites that change together: getrusage(), below the
 * system call of that name, and thread_group_cputime_adjusted(), which it calls.
 * Each sees whether the other one is of its own age, as those of pair.c do.
 *
 * The new caller hands over a token in the place of the answer. An old caller has
 * none, an old callee gives another answer; both are counted, and every new call
 * reports the counts. An old caller that reaches the new callee shows in its own
 * result, too: it gives the callee's mark as seconds.
 */
#include <linux/ktime.h>
#include <linux/resource.h>
#include <linux/sched/cputime.h>
#include <linux/string.h>
#include "livepatch.h"

#define NEW_CALLER 0x4e43
#define NEW_CALLEE 0x4e4557ULL
#define TOKEN 0x766d70617463682eUL

extern void callee(struct task_struct *p, u64 *utime, u64 *stime)
	KLP_SYMBOL("thread_group_cputime_adjusted", "0");

static unsigned long old_callers;
static unsigned long old_callees;

static void count(unsigned long *counter)
{
	__atomic_fetch_add(counter, 1, __ATOMIC_RELAXED);
}

/* A token holds for one place only, so stack left-overs are none. */
static u64 token_at(const u64 *place)
{
	return TOKEN ^ (unsigned long)place;
}

static void livepatch_cputime(struct task_struct *p, u64 *utime, u64 *stime)
{
	if (READ_ONCE(*stime) != token_at(stime))
		count(&old_callers);
	WRITE_ONCE(*utime, NEW_CALLEE * NSEC_PER_SEC);
	WRITE_ONCE(*stime, 0);
}

static void livepatch_getrusage(struct task_struct *p, int who, struct rusage *reply)
{
	u64 utime = 0, stime;

	WRITE_ONCE(stime, token_at(&stime));
	/* By the kernel's symbol, so through whatever redirects it. */
	callee(p, &utime, &stime);
	if (READ_ONCE(utime) != NEW_CALLEE * NSEC_PER_SEC)
		count(&old_callees);
	memset(reply, 0, sizeof(*reply));
	reply->ru_maxrss = NEW_CALLER;
	reply->ru_ixrss = READ_ONCE(old_callees);
	reply->ru_idrss = READ_ONCE(old_callers);
}

LIVEPATCH(PATCH(getrusage, livepatch_getrusage),
	  PATCH(thread_group_cputime_adjusted, livepatch_cputime));
