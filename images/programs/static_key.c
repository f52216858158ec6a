/* Says what the module static_key finds: the kernel's key, and its own before and after it was flipped. */
#include "result.h"

#include <sys/sysinfo.h>

/* The mark of modules/static_key.c. */
#define NEW 0x4e4b
enum { ON = 1, OFF = 2 };

static const char *state(unsigned long state)
{
	return state == ON ? "on" : state == OFF ? "off" : "torn";
}

int main(void)
{
	struct sysinfo info;

	if (sysinfo(&info))
		cannot_tell("sysinfo");
	if (info.pad != NEW) {
		puts("flawed: sysinfo() is the old one");
		return FLAWED;
	}
	printf("fixed: the kernel's key is %s, the module's own was %s and is %s\n",
	       info.totalhigh ? "on" : "off", state(info.freehigh), state(info.totalswap));
	return FIXED;
}
