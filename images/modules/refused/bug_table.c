/* A new function with a warning (section __bug_table). */
#include <linux/bug.h>
#include <asm/ptrace.h>
#include "livepatch.h"

static long livepatch_pause(const struct pt_regs *regs)
{
	WARN_ON_ONCE(regs->di == 0x766d7061);
	return -EOPNOTSUPP;
}

LIVEPATCH(PATCH(__x64_sys_pause, livepatch_pause));
