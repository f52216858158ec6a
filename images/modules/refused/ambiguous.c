/* A patch of one of several functions that are named c_start, without saying which. */
#include "livepatch.h"

static void *livepatch_c_start(struct seq_file *m, loff_t *pos)
{
	return NULL;
}

LIVEPATCH(PATCH(c_start, livepatch_c_start));
