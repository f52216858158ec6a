/* A function of the module target that begins with a branch on a static key. */
#include "livepatch.h"

static int livepatch_branch(void)
{
	return 2;
}

static struct klp_func klp_funcs[] = { PATCH(vmpatch_target_branch, livepatch_branch), { } };
static struct klp_object klp_objects[] = { { .name = "vmpatch_target", .funcs = klp_funcs }, { } };
LIVEPATCH_OF(klp_objects);
