/* A small new function; the other source file makes the module large. */
#include "livepatch.h"

static long livepatch_pause(const struct pt_regs *regs)
{
	return -EOPNOTSUPP;
}

LIVEPATCH(PATCH(__x64_sys_pause, livepatch_pause));
