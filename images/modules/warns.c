/* A new sysinfo() that warns twice, once for all calls each (section __bug_table): as it is, and with a text. */
#include <linux/bug.h>
#include <linux/sched.h>
#include "livepatch.h"
#include "sysinfo.h"

#define NEW 0x4e57

static long livepatch_sysinfo(const struct pt_regs *regs)
{
	struct sysinfo info = { .pad = NEW, .mem_unit = 1 };

	WARN_ON_ONCE(regs->di);
	WARN_ONCE(regs->di, "vmpatch test: %s, %d\n", current->comm, 42);
	return sysinfo_reply(regs, &info);
}

LIVEPATCH(PATCH(__x64_sys_sysinfo, livepatch_sysinfo));
