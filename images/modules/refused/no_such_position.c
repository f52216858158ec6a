/* A patch of the 99th function that is named c_start. */
#include "livepatch.h"

static void *livepatch_c_start(struct seq_file *m, loff_t *pos)
{
	return NULL;
}

LIVEPATCH(PATCH_AT(c_start, livepatch_c_start, 99));
