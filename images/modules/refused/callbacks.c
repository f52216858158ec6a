/* A patch that wants to run code of its own before it is applied. */
#include "livepatch.h"

static long livepatch_pause(const struct pt_regs *regs)
{
	return -EOPNOTSUPP;
}

static int before(struct klp_object *object)
{
	return 0;
}

static struct klp_func klp_funcs[] = { PATCH(__x64_sys_pause, livepatch_pause), { } };
static struct klp_object klp_objects[] = {
	{ .funcs = klp_funcs, .callbacks = { .pre_patch = before } },
	{ }
};

LIVEPATCH_OF(klp_objects);
