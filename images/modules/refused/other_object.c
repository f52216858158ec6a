/* A patch of a module's function, the module named vmpatch_test. */
#include "livepatch.h"

static long livepatch_pause(const struct pt_regs *regs)
{
	return -EOPNOTSUPP;
}

static struct klp_func klp_funcs[] = { PATCH(vmpatch_test_pause, livepatch_pause), { } };
static struct klp_object klp_objects[] = {
	{ .name = "vmpatch_test", .funcs = klp_funcs },
	{ }
};

LIVEPATCH_OF(klp_objects);
