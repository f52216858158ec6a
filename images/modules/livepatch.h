/*
 * What a livepatch module for vmlinux needs beside its new functions:
 *
 *	LIVEPATCH(PATCH(old_name, new_function), ...);
 *
 * and, for symbols of the kernel that are not exported, a declaration such as
 *
 *	extern int nr_threads KLP_SYMBOL("nr_threads", "0");
 *
 * whose relocations are marked for the livepatch loader after linking
 * (Documentation/livepatch/module-elf-format.rst). The second string is the
 * symbol's position among those of its name, from 1; 0 where it is the only one.
 */
#ifndef LIVEPATCH_H
#define LIVEPATCH_H

#include <linux/kernel.h>
#include <linux/livepatch.h>
#include <linux/module.h>

#define KLP_SYMBOL(name, position) KLP_SYMBOL_OF("vmlinux", name, position)

/*
 * A dollar sign is where the format has a comma: the assembler of binutils 2.35
 * takes no comma in a name, not even in quotes.
 */
#define KLP_SYMBOL_OF(object, name, position) \
	asm(".klp.sym." object "." name "$" position)

#define PATCH(old, new) PATCH_AT(old, new, 0)

#define PATCH_AT(old, new, position) \
	{ .old_name = #old, .new_func = new, .old_sympos = position }

/* A patch of vmlinux, of these functions. */
#define LIVEPATCH(...) \
	static struct klp_func klp_funcs[] = { __VA_ARGS__, { } }; \
	static struct klp_object klp_objects[] = { { .funcs = klp_funcs }, { } }; \
	LIVEPATCH_OF(klp_objects)

/* A patch of these objects. */
#define LIVEPATCH_OF(objects) \
	static struct klp_patch klp_patch = { .mod = THIS_MODULE, .objs = objects }; \
	static int __init klp_module_init(void) \
	{ \
		return klp_enable_patch(&klp_patch); \
	} \
	static void __exit klp_module_exit(void) { } \
	module_init(klp_module_init); \
	module_exit(klp_module_exit); \
	MODULE_INFO(livepatch, "Y"); \
	MODULE_LICENSE("GPL")

#endif
