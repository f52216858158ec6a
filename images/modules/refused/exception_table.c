/* A new function with an instruction that may fault (section __ex_table). */
#include <asm/asm.h>
#include "livepatch.h"

static long livepatch_pause(const struct pt_regs *regs)
{
	asm volatile("1: nop\n2:\n" _ASM_EXTABLE(1b, 2b));
	return -EOPNOTSUPP;
}

LIVEPATCH(PATCH(__x64_sys_pause, livepatch_pause));
