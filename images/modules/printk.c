/* A new sysinfo() that writes a line to the kernel's log. */
#include <linux/printk.h>
#include <linux/sched.h>
#include "livepatch.h"
#include "sysinfo.h"

#define NEW 0x4e50

static long livepatch_sysinfo(const struct pt_regs *regs)
{
	struct sysinfo info = { .pad = NEW, .mem_unit = 1 };

	pr_info("vmpatch test: sysinfo of %s\n", current->comm);
	return sysinfo_reply(regs, &info);
}

LIVEPATCH(PATCH(__x64_sys_sysinfo, livepatch_sysinfo));
