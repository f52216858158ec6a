/*
 * A function without an ftrace site, as all of the kernel's lib/: kstrtoint().
 * The new one says EXDEV to a text that begins with '@', which no number does.
 * Any user reaches it by writing to /proc/self/oom_score_adj.
 */
#include <linux/kstrtox.h>
#include "livepatch.h"

static int livepatch_kstrtoint(const char *s, unsigned int base, int *res)
{
	long long value;
	int err;

	if (*s == '@')
		return -EXDEV;
	err = kstrtoll(s, base, &value);
	if (err)
		return err;
	if (value != (int)value)
		return -ERANGE;
	*res = value;
	return 0;
}

LIVEPATCH(PATCH(kstrtoint, livepatch_kstrtoint));
