/* A patch of a function that no kernel has. */
#include "livepatch.h"

static long livepatch_missing(void)
{
	return -EOPNOTSUPP;
}

LIVEPATCH(PATCH(vmpatch_test_missing, livepatch_missing));
