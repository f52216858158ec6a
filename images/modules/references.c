/*
 * A new sysinfo() that takes a reference to its own module, and at the next call
 * gives it back. Its mark says that all of its struct module is as it should be.
 */
#include "livepatch.h"
#include "sysinfo.h"

#define NEW 0x4e52
#define DEFAULT 7

static int vmpatch_default = DEFAULT;
module_param(vmpatch_default, int, 0644);

static bool holds;

static bool changes_references(void)
{
	int before = module_refcount(THIS_MODULE);

	if (holds) {
		module_put(THIS_MODULE);
		holds = false;
		return module_refcount(THIS_MODULE) == before - 1;
	}
	if (!try_module_get(THIS_MODULE))
		return false;
	holds = true;
	return module_refcount(THIS_MODULE) == before + 1;
}

static long livepatch_sysinfo(const struct pt_regs *regs)
{
	struct sysinfo info = { .mem_unit = 1 };
	bool right = changes_references();

	right &= !strcmp(THIS_MODULE->name, KBUILD_MODNAME);
	right &= module_is_live(THIS_MODULE);
	right &= READ_ONCE(vmpatch_default) == DEFAULT;
	info.pad = right ? NEW : 0;
	return sysinfo_reply(regs, &info);
}

LIVEPATCH(PATCH(__x64_sys_sysinfo, livepatch_sysinfo));
