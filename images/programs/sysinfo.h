/* Which sysinfo() the kernel has: a new one leaves its module's mark in a field that the old one leaves alone. */
#ifndef SYSINFO_H
#define SYSINFO_H

#include "result.h"

#include <sys/sysinfo.h>

static int see_sysinfo(unsigned short mark)
{
	struct sysinfo info = { 0 };

	if (sysinfo(&info))
		cannot_tell("sysinfo");
	if (info.pad != mark) {
		puts("flawed: sysinfo() is the old one");
		return FLAWED;
	}
	puts("fixed: sysinfo() is the new one");
	return FIXED;
}

#endif
