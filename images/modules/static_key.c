/*
 * Branches on static keys, which the kernel rewrites when a key is flipped: one of
 * the kernel's, behind /proc/sys/kernel/sched_schedstats, and one of this module,
 * which the new sysinfo() flips itself at every call.
 */
#include <linux/jump_label.h>
#include "livepatch.h"
#include "sysinfo.h"

#define NEW 0x4e4b

extern struct static_key_false schedstats KLP_SYMBOL("sched_schedstats", "0");
static DEFINE_STATIC_KEY_FALSE(own);

static noinline bool own_is_on(void)
{
	return static_branch_unlikely(&own);
}

static noinline bool own_is_off(void)
{
	return !static_branch_likely(&own);
}

static long livepatch_sysinfo(const struct pt_regs *regs)
{
	struct sysinfo info = {
		.pad = NEW,
		.mem_unit = 1,
	};

	if (static_branch_unlikely(&schedstats))
		info.totalhigh = 1;
	info.freehigh = own_is_on() + 2 * own_is_off();
	if (own_is_on())
		static_branch_disable(&own);
	else
		static_branch_enable(&own);
	info.totalswap = own_is_on() + 2 * own_is_off();
	return sysinfo_reply(regs, &info);
}

LIVEPATCH(PATCH(__x64_sys_sysinfo, livepatch_sysinfo));
