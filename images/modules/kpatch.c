/*
 * The sections that kpatch-build 0.9.11 leaves in a livepatch module, in place of
 * static klp_patch structures: its init makes those at run time from the table of
 * functions, and so does ours.
 */
#include <linux/slab.h>
#include "kpatch_output.h"

/* Empty lists, each with eight zero bytes that keep its section. */
static unsigned long pre_patch SECTION(".kpatch.callbacks.pre_patch");
static unsigned long post_patch SECTION(".kpatch.callbacks.post_patch");
static unsigned long pre_unpatch SECTION(".kpatch.callbacks.pre_unpatch");
static unsigned long post_unpatch SECTION(".kpatch.callbacks.post_unpatch");
static unsigned long force SECTION(".kpatch.force");

static struct klp_patch *lpatch;

static int __init kpatch_init(void)
{
	struct klp_object *object;
	struct klp_func *function;

	lpatch = kzalloc(sizeof(*lpatch), GFP_KERNEL);
	object = kzalloc(2 * sizeof(*object), GFP_KERNEL);
	function = kzalloc(2 * sizeof(*function), GFP_KERNEL);
	if (!lpatch || !object || !function)
		return -ENOMEM;
	if (strcmp(functions->objname, "vmlinux"))
		object->name = functions->objname;
	function->old_name = functions->name;
	function->new_func = functions->new_addr;
	object->funcs = function;
	lpatch->mod = THIS_MODULE;
	lpatch->objs = object;
	return klp_enable_patch(lpatch);
}

static void __exit kpatch_exit(void)
{
	kfree(lpatch->objs->funcs);
	kfree(lpatch->objs);
	kfree(lpatch);
}

module_init(kpatch_init);
module_exit(kpatch_exit);
MODULE_INFO(livepatch, "Y");
MODULE_LICENSE("GPL");
