/* A new function that calls what no kernel has. */
#include "livepatch.h"

extern long vmpatch_test_missing(void);

static long livepatch_pause(const struct pt_regs *regs)
{
	return vmpatch_test_missing();
}

LIVEPATCH(PATCH(__x64_sys_pause, livepatch_pause));
