/* A new sysinfo() that warns, once for all calls (section __bug_table). */
#include <linux/bug.h>
#include "livepatch.h"
#include "sysinfo.h"

#define NEW 0x4e57

static long livepatch_sysinfo(const struct pt_regs *regs)
{
	struct sysinfo info = { .pad = NEW, .mem_unit = 1 };

	WARN_ON_ONCE(regs->di);
	return sysinfo_reply(regs, &info);
}

LIVEPATCH(PATCH(__x64_sys_sysinfo, livepatch_sysinfo));
