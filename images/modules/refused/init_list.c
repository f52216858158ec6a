/* Initialises a list in its init, which its new function adds to. */
#include <linux/list.h>
#include "with_init.h"

static struct list_head vmpatch_test_list;
static struct list_head vmpatch_test_entry;

static long livepatch_pause(const struct pt_regs *regs)
{
	list_add(&vmpatch_test_entry, &vmpatch_test_list);
	list_del(&vmpatch_test_entry);
	return -EINTR;
}

static int __init set_up(void)
{
	INIT_LIST_HEAD(&vmpatch_test_list);
	return 0;
}

static inline void nothing(void) { }

LIVEPATCH_WITH(set_up, nothing, PATCH(__x64_sys_pause, livepatch_pause));
