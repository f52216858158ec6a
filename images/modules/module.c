/*
 * A function of the module target, with what only that module has: a variable of
 * its own, by a livepatch relocation, and a function that it exports.
 */
#include <linux/moduleparam.h>
#include "livepatch.h"

extern int vmpatch_target_secret KLP_SYMBOL_OF("vmpatch_target", "vmpatch_target_secret", "0");
int vmpatch_target_exported(void);

static int livepatch_get(char *buffer, const struct kernel_param *param)
{
	return sprintf(buffer, "%d\n", vmpatch_target_secret * 1000 + vmpatch_target_exported());
}

static struct klp_func klp_funcs[] = { PATCH(vmpatch_target_get, livepatch_get), { } };
static struct klp_object klp_objects[] = { { .name = "vmpatch_target", .funcs = klp_funcs }, { } };
LIVEPATCH_OF(klp_objects);
