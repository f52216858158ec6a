/*
 * As livepatch.h, for a module whose init or exit does more than enabling the patch:
 *
 *	LIVEPATCH_WITH(init, exit, PATCH(old_name, new_function), ...);
 *
 * init() returns whether to go on (0); exit() returns nothing.
 */
#ifndef WITH_INIT_H
#define WITH_INIT_H

#include <linux/sched/signal.h>
#include <asm/ptrace.h>
#include "livepatch.h"

#define LIVEPATCH_WITH(init, exit, ...) \
	static struct klp_func klp_funcs[] = { __VA_ARGS__, { } }; \
	static struct klp_object klp_objects[] = { { .funcs = klp_funcs }, { } }; \
	static struct klp_patch klp_patch = { .mod = THIS_MODULE, .objs = klp_objects }; \
	static int __init klp_module_init(void) \
	{ \
		int error = init(); \
		return error ? error : klp_enable_patch(&klp_patch); \
	} \
	static void __exit klp_module_exit(void) { exit(); } \
	module_init(klp_module_init); \
	module_exit(klp_module_exit); \
	MODULE_INFO(livepatch, "Y"); \
	MODULE_LICENSE("GPL")

#endif
