/*
 * Two functions that change together: the system call sysinfo() and, two calls
 * below it, si_meminfo(). Each sees whether the other one is of its own age.
 *
 * The system call's entry, __x64_sys_sysinfo, would not do: it jumps to
 * __do_sys_sysinfo and is on no stack while that one runs, so nobody could see
 * that an old call is under way.
 *
 * The new caller hands over a struct sysinfo with a token behind it; the new
 * callee answers in the field behind the token. An old caller has no token, an
 * old callee does not answer; both are counted, and every new call reports the
 * counts. An old caller that reaches the new callee shows in its own result too,
 * by the callee's mark, so that the last calls before a revert are seen as well.
 *
 * While this is applied nothing else may ask for si_meminfo(): /proc/meminfo
 * would be counted as an old caller.
 */
#include <linux/mm.h>
#include <linux/vmstat.h>
#include "livepatch.h"
#include "sysinfo.h"

#define NEW_CALLER 0x4e43
#define NEW_CALLEE 0x4e4557
#define TOKEN 0x766d70617463682eUL

struct tagged {
	struct sysinfo info;
	unsigned long token;
	unsigned long answer;
};

static unsigned long old_callers;
static unsigned long old_callees;

static void count(unsigned long *counter)
{
	__atomic_fetch_add(counter, 1, __ATOMIC_RELAXED);
}

/* A token holds for one place only, so stack left-overs are none. */
static unsigned long token_at(const struct tagged *place)
{
	return TOKEN ^ (unsigned long)place;
}

static void livepatch_si_meminfo(struct sysinfo *val)
{
	struct tagged *tagged = container_of(val, struct tagged, info);

	val->totalram = totalram_pages();
	val->sharedram = global_node_page_state(NR_SHMEM);
	val->freeram = global_zone_page_state(NR_FREE_PAGES);
	val->bufferram = NEW_CALLEE;
	val->totalhigh = 0;
	val->freehigh = 0;
	val->mem_unit = PAGE_SIZE;
	if (READ_ONCE(tagged->token) == token_at(tagged))
		tagged->answer = NEW_CALLEE;
	else
		count(&old_callers);
}

static long livepatch_sysinfo(struct sysinfo __user *reply)
{
	struct tagged tagged = {};

	WRITE_ONCE(tagged.token, token_at(&tagged));
	/* By the kernel's symbol, so through whatever redirects it. */
	si_meminfo(&tagged.info);
	if (READ_ONCE(tagged.answer) != NEW_CALLEE)
		count(&old_callees);
	tagged.info.pad = NEW_CALLER;
	tagged.info.totalhigh = READ_ONCE(old_callees);
	tagged.info.freehigh = READ_ONCE(old_callers);
	return sysinfo_copy(reply, &tagged.info);
}

LIVEPATCH(PATCH(__do_sys_sysinfo, livepatch_sysinfo),
	  PATCH(si_meminfo, livepatch_si_meminfo));
