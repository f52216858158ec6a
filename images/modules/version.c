/*
 * One version of a cumulative patch, which replaces all other patches: sysinfo()
 * tells the version. The first one has getppid() too, which later ones give up.
 *
 * VERSION is defined in front of this.
 */
#include "livepatch.h"
#include "sysinfo.h"

#define MARK 0x7663
#define PARENT 40000

static long livepatch_sysinfo(const struct pt_regs *regs)
{
	struct sysinfo info = { .pad = MARK, .totalram = VERSION };

	return sysinfo_reply(regs, &info);
}

#if VERSION == 1
static long livepatch_getppid(const struct pt_regs *regs)
{
	return PARENT + VERSION;
}
#endif

static struct klp_func klp_funcs[] = {
	PATCH(__x64_sys_sysinfo, livepatch_sysinfo),
#if VERSION == 1
	PATCH(__x64_sys_getppid, livepatch_getppid),
#endif
	{ }
};
static struct klp_object klp_objects[] = { { .funcs = klp_funcs }, { } };
static struct klp_patch klp_patch = {
	.mod = THIS_MODULE,
	.objs = klp_objects,
	.replace = true,
};

static int __init klp_module_init(void)
{
	return klp_enable_patch(&klp_patch);
}

static void __exit klp_module_exit(void) { }

module_init(klp_module_init);
module_exit(klp_module_exit);
MODULE_INFO(livepatch, "Y");
MODULE_LICENSE("GPL");
