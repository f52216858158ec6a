/* A new function with a jump label (section __jump_table). */
#include <linux/jump_label.h>
#include "livepatch.h"

static DEFINE_STATIC_KEY_FALSE(key);

static long livepatch_pause(const struct pt_regs *regs)
{
	return static_branch_unlikely(&key) ? -EINVAL : -EOPNOTSUPP;
}

LIVEPATCH(PATCH(__x64_sys_pause, livepatch_pause));
